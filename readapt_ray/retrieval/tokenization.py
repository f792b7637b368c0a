"""Turn text into token ids: templates, special tokens and truncation are applied here, none by the tokenizer.

Enters: texts (and titles) and the `Encoding` of a retriever. Leaves: one list of token ids a
text, no longer than the encoding allows, with BOS (CLS) and EOS (SEP) where it wants them. A
tokenizer that silently drops its EOS costs a last-token retriever most of its quality (mteb issue
5237: nDCG 0.374 to 0.065), so the first and last id of every text are verified.
About 15,000 passages of 100 tokens a second on one core.
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


def fill_query(encoding: Encoding, text: str) -> str:
    """Return the text of a query as the retriever wants it."""
    filled = _fill(encoding.query_template, text=text, title="", task=encoding.task)
    return filled.lower() if encoding.lower_case else filled


def fill_passage(encoding: Encoding, title: str, text: str) -> str:
    """Return the text of a passage as the retriever wants it, stripped. Without a title no second space is left.

    `passage: {title} {text}` with an empty title gives `passage: text`, not `passage:  text`. A passage without text is
    encoded by its title, also by a template that has no title.
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
    """Return a template as literals, each with the field that follows it."""
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
    """Fills a retriever's templates and tokenises the result.

    Args:
        tokenizer: a transformers tokenizer; it is not changed.
        encoding: how the retriever wants its text.

    Raises:
        ModelError: the encoding wants a BOS or EOS that the tokenizer does not have, or the
            tokenizer adds one where it was asked not to.
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
        """Return the filled templates.

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
        """Return the token ids of each text; see `ids_and_losses`."""
        return self.ids_and_losses(texts, kind, titles)[0]

    def ids_and_losses(
        self, texts: Sequence[str], kind: Kind, titles: Sequence[str] | None = None
    ) -> tuple[list[list[int]], list[int]]:
        """Return the token ids of each text, specials included, and how many tokens truncation took from each.

        What is longer than the encoding allows is cut before the EOS. A text of no tokens gives
        only the specials, and no id at all where there are none.

        Raises:
            InputError: as `texts`, or a text holds half a surrogate pair and so is not Unicode.
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
            return [row.ids for row in self._backend.encode_batch_fast(filled, add_special_tokens=False)]
        except (TypeError, UnicodeEncodeError) as error:
            for index, text in enumerate(filled):
                if text != text.encode("utf-8", "replace").decode("utf-8"):
                    raise InputError(f"texts[{index}] is not valid Unicode: it holds half a surrogate pair") from error
            raise


def _backend_copy(tokenizer: Any) -> Any:
    """Return the Rust tokenizer, neither cutting nor padding; None where there is only a Python one."""
    if not getattr(tokenizer, "is_fast", False):
        return None
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend
