"""Ask a language model behind an OpenAI-compatible endpoint (`POST URL/chat/completions`).

The `openai` client retries after timeouts and after status 429 and 5xx, and waits as long as `Retry-After` says. The
key is read from $READAPT_ENDPOINT_KEY; without it, the text "none" is sent as the key.
"""

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from readapt_ray.errors import InputError, ReadaptError, WorkerError, first_line
from readapt_ray.synthesis.answers import Answer, Ask

KEY_VARIABLE = "READAPT_ENDPOINT_KEY"
_MAX_RETRIES = 6
_FILTERED = "content_filter"
"""Code of the error with which Azure OpenAI and similar endpoints refuse a prompt because of its content."""
_KEY_WORDS = ("key", "token", "secret", "pass", "auth", "sig", "credential")


def check_endpoint(url: str) -> None:
    """Check that the URL of an endpoint is valid and holds no key. Nothing is sent.

    Raises:
        ValueError: the text is no http(s) URL, or it holds a user, a password, or a query parameter whose name looks
            like a key (`?api_key=...`, `?token=...`).
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is no URL such as http://HOST:8000/v1")
    named = [name for name, _ in parse_qsl(parts.query) if any(word in name.lower() for word in _KEY_WORDS)]
    if parts.username or parts.password or named:
        raise ValueError(f"holds a key, which would be written to the manifest; put it into ${KEY_VARIABLE}")


class EndpointWriter:
    """A client of an endpoint, which sends several requests at once."""

    def __init__(self, url: str, model: str, *, timeout_s: float, num_at_once: int) -> None:
        """Open the client; nothing is sent yet.

        Args:
            url: URL of the endpoint, up to and including `/v1`.
            model: name of the model at the endpoint.
            timeout_s: maximum seconds per request.
            num_at_once: maximum number of requests at the same time.

        Raises:
            InputError: the package openai is not installed.
        """
        try:
            import openai
        except ImportError:
            raise InputError('an endpoint needs the package openai: pip install "readapt-ray[endpoint]"') from None
        self._errors, self._url, self._model = openai, url, model
        self._client = openai.OpenAI(
            base_url=url, api_key=os.environ.get(KEY_VARIABLE) or "none", timeout=timeout_s, max_retries=_MAX_RETRIES
        )
        self._num_at_once = num_at_once

    def answer(self, asks: Sequence[Ask], *, temperature: float, max_tokens: int, seed: int) -> list[Answer]:
        """Return an answer to each prompt, in their order.

        A prompt that the endpoint's content filter refuses gets an empty answer with 0 tokens. If the endpoint does not
        report tokens, four characters count as one. After an error no more requests are sent, and the call's other
        answers are lost.

        Args:
            asks: the prompts.
            temperature: sampling temperature; 0 takes the likeliest token.
            max_tokens: maximum number of tokens per answer.
            seed: the seed sent with a prompt is this plus the number of the prompt. Some endpoints ignore it.

        Raises:
            InputError: the endpoint refuses the key, the model or the request.
            WorkerError: the endpoint cannot be reached, is busy or fails, even after retries.
        """
        has_failed = threading.Event()  # after a failure, do not send the waiting requests

        def one(ask: Ask) -> Answer:
            if has_failed.is_set():
                raise WorkerError("another request failed")
            try:
                return self._answer(
                    ask, temperature=temperature, max_tokens=max_tokens, seed=(seed + ask.number) % 2**31
                )
            except ReadaptError:
                has_failed.set()
                raise

        pool = ThreadPoolExecutor(self._num_at_once)
        try:
            return list(pool.map(one, asks))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _answer(self, ask: Ask, **options: Any) -> Answer:
        try:
            found = self._client.chat.completions.create(
                model=self._model, messages=[{"role": "user", "content": ask.prompt}], **options
            )
            text = found.choices[0].message.content or ""
        except (
            self._errors.RateLimitError,
            self._errors.InternalServerError,
            self._errors.APIConnectionError,
        ) as error:
            raise WorkerError(
                f"endpoint {self._url}: {first_line(error)} (asked {_MAX_RETRIES + 1} times); what was answered is kept: run the "
                f"same command again when it is up"
            ) from None
        except self._errors.APIStatusError as error:
            if error.code == _FILTERED:  # only this passage is refused; a retry would not help
                return Answer("", 0)
            raise InputError(
                f"endpoint {self._url}, model {self._model!r}: {first_line(error)}; check the URL, the model's name and ${KEY_VARIABLE}"
            ) from None
        except (self._errors.OpenAIError, LookupError, TypeError, AttributeError, ValueError) as error:
            raise InputError(
                f"endpoint {self._url} gave no chat completion ({first_line(error)}); give the URL of an OpenAI-compatible one, such "
                f"as http://HOST:8000/v1"
            ) from None
        usage = getattr(found, "usage", None)
        num_tokens = getattr(usage, "total_tokens", None) or (len(ask.prompt) + len(text)) // 4
        return Answer(text, int(num_tokens))
