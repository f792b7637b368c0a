"""Ask a language model behind an OpenAI-compatible endpoint (`POST URL/chat/completions`).

The `openai` client retries after timeouts and after status 408, 409, 429 and 5xx, for some 20 seconds or as `Retry-After`
says. If the endpoint still limits the rate, requests wait for up to five minutes more. The key is read from
$READAPT_ENDPOINT_KEY; without it, the text "none" is sent as the key. The key is removed from error messages.
"""

import email.utils
import logging
import math
import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from readapt_ray.errors import InputError, ReadaptError, WorkerError, first_line
from readapt_ray.synthesis.answers import Answer, Ask
from readapt_ray.synthesis.token_budget import TokenBudget

logger = logging.getLogger("readapt_ray")

KEY_VARIABLE = "READAPT_ENDPOINT_KEY"
_MAX_RETRIES = 6
_RATE_WAITS_S = (10.0, 20.0, 30.0, 60.0, 60.0, 60.0)
"""Seconds to wait for an endpoint that limits the rate and does not say how long, after the client's retries."""
_MAX_WAIT_S = 600.0
"""Longest `Retry-After` that is waited for."""
_FILTERED = "content_filter"
"""Code of the error with which Azure OpenAI and similar endpoints refuse a prompt because of its content."""
_NO_QUOTA = "insufficient_quota"
"""Code of an error of status 429 that does not pass by waiting."""
_TRANSIENT = (408, 409)
_TOO_MANY_TOKENS = 1 << 31
"""No request has so many tokens; such a count is an error of the endpoint."""
_EXCERPT_CHARS = 200
_KEY_WORDS = ("key", "token", "secret", "pass", "auth", "sig", "credential")
_OPTIONAL = ("seed", "temperature")
"""Options of a request that some models and endpoints refuse; they are then left out."""


def check_endpoint(url: str) -> None:
    """Check that the URL of an endpoint is valid and holds no key. Nothing is sent.

    Raises:
        ValueError: the text is no http(s) URL, or it holds a user, a password, or a query parameter whose name looks
            like a key (`?api_key=...`, `?token=...`).
    """
    try:
        parts = urlsplit(url)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_url = False
    if not is_url:
        raise ValueError(f"{url!r} is no URL such as http://HOST:8000/v1")
    named = [name for name, _ in parse_qsl(parts.query) if any(word in name.lower() for word in _KEY_WORDS)]
    if parts.username or parts.password or named:
        raise ValueError(f"holds a key, which would be written to the manifest; put it into ${KEY_VARIABLE}")


def read_key() -> str:
    """Return the key in $READAPT_ENDPOINT_KEY without white space around it; empty if it is not set.

    Raises:
        InputError: it has characters that no HTTP header can hold.
    """
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key.isascii() or not key.isprintable():
        raise InputError(
            f"${KEY_VARIABLE} has line breaks or characters that are not ASCII, which no key has; set it again"
        )
    return key


class _RateLimitError(Exception):
    """The endpoint is busy. `wait_s` is how long it asks to wait; None if it does not say."""

    def __init__(self, said: str, wait_s: float | None = None) -> None:
        super().__init__(said)
        self.wait_s = wait_s


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
            InputError: the package openai is not installed, or the key cannot be sent.
        """
        try:
            import openai
        except ImportError:
            raise InputError('an endpoint needs the package openai: pip install "readapt-ray[endpoint]"') from None
        self._errors, self._url, self._model, self._key = openai, url, model, read_key()
        self._client = openai.OpenAI(
            base_url=url, api_key=self._key or "none", timeout=timeout_s, max_retries=_MAX_RETRIES
        )
        self._num_at_once = num_at_once
        self._limit_name = "max_tokens"
        self._refused: set[str] = set()

    def answers(
        self,
        asks: Sequence[Ask],
        budget: TokenBudget,
        *,
        temperature: float,
        max_tokens: int,
        seed: int,
    ) -> Iterator[tuple[Ask, Answer]]:
        """Yield each prompt with its answer, in the order in which answers arrive.

        A prompt that the endpoint's content filter refuses gets an empty answer with 0 tokens. If the endpoint does not
        report tokens, four characters count as one. Prompts for which the budget has no room are left out. After an
        error no more requests are sent; answers that are under way are still yielded before the error is raised.

        Args:
            asks: the prompts.
            budget: counts the tokens of these requests.
            temperature: sampling temperature; 0 takes the likeliest token.
            max_tokens: maximum number of tokens per answer.
            seed: the seed sent with a prompt is this plus the number of the prompt. Some endpoints ignore it.

        Raises:
            InputError: the endpoint refuses the key, the model or the request.
            WorkerError: the endpoint cannot be reached, is busy or fails, even after retries.
        """
        is_over = threading.Event()  # after a failure, do not send the waiting requests

        def one(ask: Ask) -> tuple[Ask, Answer] | None:
            expected = len(ask.prompt) // 4 + max_tokens
            if not budget.reserve(expected):
                return None
            used = 0
            try:
                if is_over.is_set():
                    return None
                options = {"temperature": temperature, "seed": (seed + ask.number) % 2**31}
                answer = self._patiently(ask, is_over, max_tokens=max_tokens, **options)
                used = answer.num_tokens
                return ask, answer
            except ReadaptError:
                is_over.set()
                raise
            finally:
                budget.settle(expected, used)

        failure: ReadaptError | None = None
        pool = ThreadPoolExecutor(self._num_at_once)
        try:
            for future in as_completed([pool.submit(one, ask) for ask in asks]):
                try:
                    found = future.result()
                except ReadaptError as error:
                    failure = failure or error
                    continue
                if found is not None:
                    yield found
        finally:
            is_over.set()
            pool.shutdown(wait=False, cancel_futures=True)
        if failure is not None:
            raise failure

    def _patiently(self, ask: Ask, is_over: threading.Event, **options: Any) -> Answer:
        """Ask, and wait while the endpoint limits the rate."""
        for usual_s in _RATE_WAITS_S:
            try:
                return self._answer(ask, **options)
            except _RateLimitError as error:
                wait_s = usual_s if error.wait_s is None else error.wait_s
                if wait_s > _MAX_WAIT_S:
                    raise self._down(f"{error}, and asks to wait for {wait_s:,.0f} s") from None
                logger.warning("endpoint %s limits the rate (%s): waiting for %.0f s", self._url, error, wait_s)
                is_over.wait(wait_s)
        try:
            return self._answer(ask, **options)
        except _RateLimitError as error:
            raise self._down(str(error)) from None

    def _answer(self, ask: Ask, **options: Any) -> Answer:
        try:
            found = self._completion(ask, **options)
            self._refuse_error(found)
            text = _text(found.choices[0].message.content)
        except self._errors.RateLimitError as error:
            if error.code == _NO_QUOTA:
                raise self._refusal(error) from None
            raise _RateLimitError(
                self._said(error), _retry_after_s(error.response.headers.get("retry-after"))
            ) from None
        except (self._errors.InternalServerError, self._errors.APIConnectionError) as error:
            raise self._down(self._said(error)) from None
        except self._errors.APIStatusError as error:
            if error.code == _FILTERED:  # only this passage is refused; a retry would not help
                return Answer("", 0)
            raise (self._down(self._said(error)) if error.status_code in _TRANSIENT else self._refusal(error)) from None
        except (self._errors.OpenAIError, LookupError, TypeError, AttributeError, ValueError) as error:
            raise InputError(
                f"endpoint {self._url} gave no chat completion ({self._said(error)}); give the URL of an OpenAI-compatible one, such "
                f"as http://HOST:8000/v1"
            ) from None
        return Answer(text, _num_tokens(getattr(found, "usage", None)) or (len(ask.prompt) + len(text)) // 4)

    def _completion(self, ask: Ask, *, max_tokens: int, **options: Any) -> Any:
        """Send a request; leave out options that the endpoint does not take, and rename the limit of tokens."""
        while True:
            limit_name, refused = self._limit_name, set(self._refused)
            given = {name: value for name, value in options.items() if name not in refused}
            try:
                return self._client.chat.completions.create(
                    model=self._model,
                    messages=[{"role": "user", "content": ask.prompt}],
                    **{**given, limit_name: max_tokens},
                )
            except (self._errors.BadRequestError, self._errors.UnprocessableEntityError) as error:
                said = f"{error} {error.param!r} {error.body!r}"
                if limit_name == "max_tokens" and "max_completion_tokens" in said:
                    self._limit_name = "max_completion_tokens"  # OpenAI's models that think first
                    continue
                named = [name for name in given if name in _OPTIONAL and re.search(rf"['\"`]{name}['\"`]", said)]
                if not named:
                    raise
                if not self._refused.issuperset(named):
                    logger.warning("endpoint %s does not take %s: it is left out", self._url, ", ".join(named))
                self._refused.update(named)

    def _refuse_error(self, found: Any) -> None:
        """Raise the error that some endpoints send with status 200, in place of an answer."""
        told = getattr(found, "error", None)
        if not told:
            return
        values = told if isinstance(told, dict) else {"message": told}
        said, code = self._said(values.get("message") or told), values.get("code")
        if code == 429:
            raise _RateLimitError(said)
        if isinstance(code, int) and code >= 500:
            raise self._down(said)
        raise self._refusal(said)

    def _refusal(self, what: Any) -> InputError:
        return InputError(
            f"endpoint {self._url}, model {self._model!r}: {self._said(what)}; check the URL, the model's name and ${KEY_VARIABLE}"
        )

    def _down(self, said: str) -> WorkerError:
        return WorkerError(
            f"endpoint {self._url}: {said}, also after retries; what was answered is kept: run the same command again when "
            f"it is up"
        )

    def _said(self, what: Any) -> str:
        """Return the first line of what an endpoint said, without the key, which some endpoints repeat."""
        said = first_line(what) if isinstance(what, Exception) else str(what).strip().partition("\n")[0]
        if isinstance(what, self._errors.APIStatusError) and said == f"Error code: {what.status_code}":
            said += f" {' '.join(what.response.text.split())[:_EXCERPT_CHARS]}"
        return said.replace(self._key, f"${KEY_VARIABLE}") if self._key else said


def _text(content: Any) -> str:
    """Return the text of an answer, whose content may be a text, a list of parts, or None.

    Of parts, only texts count, not what the model thought. Half surrogate pairs, which no file can hold, become `?`.

    Raises:
        TypeError: the content is something else.
    """
    if isinstance(content, list):
        parts = [each if isinstance(each, dict) else {"text": each} for each in content]
        content = "".join(each["text"] for each in parts if isinstance(each.get("text"), str))
    if not isinstance(content, str | None):
        raise TypeError(f"the content of its message is {content!r}")
    return (content or "").encode("utf-8", "replace").decode()


def _num_tokens(usage: Any) -> int:
    """Return the tokens of a request as the endpoint counts them; 0 if it gives no plausible number."""
    count = getattr(usage, "total_tokens", None)
    if isinstance(count, bool) or not isinstance(count, int | float) or not 0 < count < _TOO_MANY_TOKENS:
        return 0  # NaN too, as it is not over 0
    return int(count)


def _retry_after_s(header: str | None) -> float | None:
    """Return the seconds that a `Retry-After` header asks to wait; None if there is none. It may be a date."""
    if not header:
        return None
    try:
        seconds = float(header)
    except ValueError:
        parsed = email.utils.parsedate_tz(header)
        seconds = math.nan if parsed is None else email.utils.mktime_tz(parsed) - time.time()
    return None if math.isnan(seconds) else max(0.0, seconds)
