"""Turn texts into token ids. This module applies templates, special tokens and truncation, not the tokenizer.

In: texts, titles and the `Encoding` of a retriever. Out: one list of token ids per text, at most as long as the
encoding allows, with BOS (CLS) and EOS (SEP) if it wants them. A tokenizer that silently drops its EOS costs a
last-token retriever most of its quality (mteb issue 5237: nDCG 0.374 to 0.065), so the first and last id of every text
are verified. About 15,000 passages of 100 tokens per second on one core.
"""

import functools
import string
from collections.abc import Sequence
from typing import Any, Literal

from readapt_ray.catalog.encoding import Encoding
from readapt_ray.errors import InputError, ModelError
from readapt_ray.progress import amount
from readapt_ray.weights.tokenizer import edge_tokens

Kind = Literal["query", "passage"]

_FIELDS = ("text", "title", "task")
_TEXTS_AT_ONCE = 8192
"""Texts per call of the Rust tokenizer, whose results take some 100 bytes per token until their ids are taken."""


def fill_query(encoding: Encoding, text: str) -> str:
    """Fill the query template of a retriever with a text; lower-case the result if the encoding says so.

    The result is not stripped, unlike that of `fill_passage`. `{title}` is empty in a query.

    Raises:
        InputError: the template has a wrong brace, a field other than {text}, {title} and {task}, or no {text}.
    """
    filled = _fill(encoding.query_template, text=text, title="", task=encoding.task)
    return filled.lower() if encoding.lower_case else filled


def fill_passage(encoding: Encoding, title: str, text: str) -> str:
    """Fill the passage template of a retriever with a title and a text, and strip the result.

    An empty title leaves no second space: `passage: {title} {text}` gives `passage: text`, not `passage:  text`. If the
    text is empty and the template has no title, the title takes the place of the text. The result is lower-cased if the
    encoding says so.
    """
    if not text and "title" not in {field for _, field in _parts(encoding.passage_template)}:
        text = title
    filled = _fill(encoding.passage_template, text=text, title=title, task=encoding.task).strip()
    return filled.lower() if encoding.lower_case else filled


def _fill(template: str, **values: str) -> str:
    pieces = []
    without_title = False
    for literal, field in _parts(template):
        pieces.append(literal.removeprefix(" ") if without_title else literal)
        value = values[field].strip() if field == "title" else values.get(field or "", "")
        pieces.append(value)
        without_title = field == "title" and not value
    return "".join(pieces)


@functools.lru_cache(maxsize=64)
def _parts(template: str) -> tuple[tuple[str, str | None], ...]:
    """Split a template into literals, each with the field that follows it (None after the last)."""
    allowed = ", ".join(f"{{{field}}}" for field in _FIELDS)
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise InputError(
            f"template {template!r} cannot be read: {error}; write {{{{ for a brace, and {allowed} for fields"
        ) from error
    for _, field, spec, conversion in parsed:
        if field is not None and (field not in _FIELDS or spec or conversion):
            raise InputError(f"template {template!r} has the field {{{field}}}; allowed are {allowed}, with no format")
    if "text" not in {field for _, field, _, _ in parsed}:
        raise InputError(f"template {template!r} has no {{text}}: every text would give the same vector")
    return tuple((literal, field) for literal, field, _, _ in parsed)


class TextTokenizer:
    """A tokenizer that first fills the templates of a retriever.

    Args:
        tokenizer: a transformers tokenizer; it is not changed.
        encoding: templates, special tokens and maximum lengths of the retriever.

    Raises:
        ModelError: the encoding wants a BOS or EOS that the tokenizer lacks, or the tokenizer adds one although it
            was told not to.
        InputError: a template or a maximum length cannot be used.
    """

    def __init__(self, tokenizer: Any, encoding: Encoding) -> None:
        self.encoding = encoding
        self._tokenizer = tokenizer
        self._backend = _backend_copy(tokenizer)
        before, after = edge_tokens(tokenizer, encoding)
        self._bos = None if before is None else int(tokenizer.convert_tokens_to_ids(before))
        self._eos = None if after is None else int(tokenizer.convert_tokens_to_ids(after))
        for kind, template in (("query", encoding.query_template), ("passage", encoding.passage_template)):
            _parts(template)
            if self._room(kind) < 1:
                raise InputError(
                    f"max_{kind}_tokens = {self._room(kind) + self._num_specials} leaves no token for the text; "
                    f"it must be at least {self._num_specials + 1}"
                )
        probe = self._plain_ids(["a"])[0]
        if probe and (probe[0] == self._bos or probe[-1] == self._eos):
            raise ModelError(f"the tokenizer adds BOS or EOS although it was told not to: 'a' gives the ids {probe}")

    @property
    def _num_specials(self) -> int:
        return (self._bos is not None) + (self._eos is not None)

    def _room(self, kind: str) -> int:
        limits = {"query": self.encoding.max_query_tokens, "passage": self.encoding.max_passage_tokens}
        return limits[kind] - self._num_specials

    def texts(self, texts: Sequence[str], kind: Kind, titles: Sequence[str] | None = None) -> list[str]:
        """Fill the templates with texts and titles, and return the filled texts.

        Args:
            texts: the texts.
            kind: query or passage; decides the template.
            titles: one per passage, may be empty; None for queries, or if no passage has a title.

        Raises:
            InputError: a text is not a string, titles are given for queries, or their number differs.
        """
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise InputError(f"texts[{index}] is {type(text).__name__}; every text must be a string")
        if titles is not None and (kind == "query" or len(titles) != len(texts)):
            raise InputError(
                f"{amount(len(titles), 'titles')} for {amount(len(texts), 'texts')} of kind {kind!r}; give one title a "
                "passage, and none for queries"
            )
        if kind == "query":
            return [fill_query(self.encoding, text) for text in texts]
        paired = zip(titles if titles is not None else [""] * len(texts), texts, strict=True)
        return [fill_passage(self.encoding, title or "", text) for title, text in paired]

    def ids(self, texts: Sequence[str], kind: Kind, titles: Sequence[str] | None = None) -> list[list[int]]:
        """Return the token ids of each text, special tokens included; arguments and errors as in `ids_and_losses`."""
        return self.ids_and_losses(texts, kind, titles)[0]

    def ids_and_losses(
        self, texts: Sequence[str], kind: Kind, titles: Sequence[str] | None = None
    ) -> tuple[list[list[int]], list[int]]:
        """Return the token ids of each text, special tokens included, and how many tokens truncation cut from each.

        A text that is longer than the encoding allows is cut before the EOS. A text without tokens gives only the
        special tokens, or an empty list if there are none. Arguments are as in `texts`.

        Raises:
            InputError: as in `texts`, or a text is not valid Unicode, since it holds half a surrogate pair.
            ModelError: the ids do not begin and end with the BOS and EOS that the encoding wants.
        """
        room = self._room(kind)
        head = [] if self._bos is None else [self._bos]
        tail = [] if self._eos is None else [self._eos]
        whole = self._plain_ids(self.texts(texts, kind, titles))
        rows = [[*head, *ids[:room], *tail] for ids in whole]
        for ids in rows:
            if (head and ids[0] != self._bos) or (tail and ids[-1] != self._eos):
                raise ModelError(f"ids {ids[:2]}...{ids[-2:]} do not begin and end with {self._bos} and {self._eos}")
        return rows, [max(0, len(ids) - room) for ids in whole]

    def _plain_ids(self, filled: list[str]) -> list[list[int]]:
        try:
            if self._backend is None:
                rows = (
                    self._tokenizer(filled, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
                    if filled
                    else []
                )
                return [list(ids) for ids in rows]
            parts = (filled[first : first + _TEXTS_AT_ONCE] for first in range(0, len(filled), _TEXTS_AT_ONCE))
            return [
                row.ids for part in parts for row in self._backend.encode_batch_fast(part, add_special_tokens=False)
            ]
        except (TypeError, UnicodeEncodeError) as error:
            for index, text in enumerate(filled):
                if text != text.encode("utf-8", "replace").decode("utf-8"):
                    raise InputError(f"texts[{index}] is not valid Unicode: it holds half a surrogate pair") from error
            raise


def _backend_copy(tokenizer: Any) -> Any:
    """Copy the Rust tokenizer, without truncation and padding; None if there is only a Python one."""
    if not getattr(tokenizer, "is_fast", False):
        return None
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend
