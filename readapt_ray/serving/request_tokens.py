"""Turn the texts of a request into rows of token ids, in blocks that each take a bounded time.

In: texts, or their token ids. Out: blocks of rows; when a request is cancelled, only the current block is still
computed. A text costs no more than the longest text that could be within the limit of tokens: what is longer is cut or
refused before tokenization.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from readapt_ray.catalog.encoding import Encoding
from readapt_ray.errors import InputError
from readapt_ray.retrieval.tokenization import TextTokenizer
from readapt_ray.serving.schema import Kind, RequestError, invalid

_NO_LIMIT_TOKENS = 1 << 40
_CHARACTERS_PER_TOKEN = 32
"""Far more than in any meaningful text; prose has 4 to 5."""
_SPARE_CHARACTERS = 4096
_LAST_WORD_CHARACTERS = 1024
_CUT_TOKENS = 16
"""Maximum number of tokens before a cut in the text that the cut may have changed."""
_BLOCK_CHARACTERS = 200_000
"""Number of characters that are tokenized at once, which takes about 0.1 s."""

Item = str | list[int]


class _KindTokenizer:
    """Tokenizes queries and passages with their templates, and raw text without one."""

    def __init__(self, tokenizer: Any, encoding: Encoding) -> None:
        longest = max(encoding.max_query_tokens, encoding.max_passage_tokens)
        raw = encoding.model_copy(update={"query_template": "{text}", "max_query_tokens": longest})
        self._filled = TextTokenizer(tokenizer, encoding)
        self._raw = TextTokenizer(tokenizer, raw)

    def ids(self, texts: Sequence[str], kind: Kind) -> list[list[int]]:
        return self._raw.ids(texts, "query") if kind == "raw" else self._filled.ids(texts, kind)


class InputTokenizer:
    """Turns the texts of a request into rows of token ids, or raises an error that says what is wrong with them.

    Args:
        tokenizer: the transformers tokenizer of the model.
        encoding: templates, special tokens and maximum lengths.
    """

    def __init__(self, tokenizer: Any, encoding: Encoding) -> None:
        self._tokenizer = tokenizer
        query, passage = encoding.max_query_tokens, encoding.max_passage_tokens
        self._limits: dict[Kind, int] = {"query": query, "passage": passage, "raw": max(query, passage)}
        self._most = {kind: _CHARACTERS_PER_TOKEN * limit + _SPARE_CHARACTERS for kind, limit in self._limits.items()}
        unlimited = {"max_query_tokens": _NO_LIMIT_TOKENS, "max_passage_tokens": _NO_LIMIT_TOKENS}
        self._unlimited = _KindTokenizer(tokenizer, encoding.model_copy(update=unlimited))
        self._truncating = _KindTokenizer(tokenizer, encoding)

    def blocks(
        self, given: str | Sequence[Any], kind: Kind, *, param: str, truncate: bool, max_inputs: int
    ) -> Iterator[list[list[int]]]:
        """Yield the token ids of each text, with template and special tokens, in blocks of about 200,000 characters.

        A block takes about 0.1 s, so the caller can do other work between two. A text is checked with its block: the
        error of a later text is raised after earlier blocks were yielded.

        Args:
            given: a text, a list of texts, or token ids in place of each text.
            kind: query, passage or raw.
            param: name of the request's field, for errors.
            truncate: cut texts that are too long, instead of refusing them.
            max_inputs: maximum number of texts.

        Raises:
            RequestError: a text is empty, too long, or not valid Unicode; an id is not in the vocabulary; or there are
                too many texts.
        """
        is_one = isinstance(given, str) or isinstance(given[0], int)
        items: list[Any] = [given] if is_one else list(given)
        if len(items) > max_inputs:
            raise invalid(f"'{param}' has {len(items):,} texts; this server takes {max_inputs:,} in a request", param)
        names = [f"'{param}'" if is_one else f"'{param}[{place}]'" for place in range(len(items))]
        first, size = 0, 0
        for place, item in enumerate(items, start=1):
            size += min(len(item), self._most[kind])
            if size >= _BLOCK_CHARACTERS or place == len(items):
                yield self._rows(items[first:place], names[first:place], kind, param, truncate=truncate)
                first, size = place, 0

    def max_tokens(self, kind: Kind) -> int:
        """Return the maximum length of a text of this kind, in tokens, with template and special tokens."""
        return self._limits[kind]

    def all_ids(self, text: str, kind: Kind, *, param: str) -> list[int]:
        """Return all token ids of a text with template and special tokens, even if they are more than the limit.

        Raises:
            RequestError: the text is empty, not valid Unicode, or over twice as long as one within the limit can be.
        """
        if len(text) > 2 * self._most[kind]:
            raise self._too_long(f"'{param}' has {_size(text)}", kind, param)
        if not text.strip():
            raise RequestError(f"'{param}' is empty", param=param, code="empty")
        try:
            return self._unlimited.ids([text], kind)[0]
        except InputError:
            raise _not_unicode(param) from None

    def _rows(
        self, items: Sequence[Item], names: Sequence[str], kind: Kind, param: str, *, truncate: bool
    ) -> list[list[int]]:
        texts, cut = [], []
        for item, name in zip(items, names, strict=True):
            text = item if isinstance(item, str) else self._decoded(item, kind, name, param)
            if len(item) > self._most[kind] or len(text) > self._most[kind]:
                if not truncate:
                    raise self._too_long(f"{name} has {_size(item)}", kind, param)
                _check_unicode(text, param)  # an answer may repeat the part that is cut off
                text = _cut_between_words(text, self._most[kind])
                cut.append((name, item, text))
            elif not text.strip():
                raise RequestError(f"{name} is empty; leave it out", param=param, code="empty")
            texts.append(text)
        try:
            rows = (self._truncating if truncate else self._unlimited).ids(texts, kind)
            for name, item, text in cut:
                self._check_cut(name, item, text, kind, param)
        except InputError:
            raise _not_unicode(param) from None
        for row, name in zip(rows, names, strict=True):
            if len(row) > self._limits[kind]:
                raise self._too_long(f"{name} has {len(row):,} tokens", kind, param)
            if not row:  # such as a text of control characters
                raise RequestError(f"{name} has no token of this model; leave it out", param=param, code="empty")
        return rows

    def _check_cut(self, name: str, item: Item, text: str, kind: Kind, param: str) -> None:
        """Refuse a text if cutting its characters may have changed a token within the limit."""
        whole, template = self._unlimited.ids([text, ""], kind)
        num_tokens = len(whole) - len(template)
        if num_tokens < self._limits[kind] + _CUT_TOKENS:
            message = f"{name} has {_size(item)}, and the first {self._most[kind]:,} make only {num_tokens:,} tokens"
            raise RequestError(f"{message}; leave out what is no text", param=param, code="context_length_exceeded")

    def _too_long(self, what: str, kind: Kind, param: str) -> RequestError:
        return RequestError(
            f'{what}; a {"text" if kind == "raw" else kind} may have {self._limits[kind]:,} tokens; shorten it, or send "truncate": true to have it cut',
            param=param,
            code="context_length_exceeded",
        )

    def _decoded(self, ids: list[int], kind: Kind, name: str, param: str) -> str:
        """Return the text of token ids; ids that are certainly beyond the limit are left out."""
        if max(ids) >= len(self._tokenizer):
            raise invalid(
                f"{name} has the token id {max(ids)}; this model's tokenizer has {len(self._tokenizer):,} tokens: "
                f"send text, or ids of its own tokenizer",
                param,
            )
        ids = ids[: self._most[kind]]
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _check_unicode(text: str, param: str) -> None:
    """Refuse a text that holds half a surrogate pair, and so cannot be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _not_unicode(param) from None


def _not_unicode(param: str) -> RequestError:
    return invalid(f"'{param}' holds text that is not valid Unicode", param)


def _cut_between_words(text: str, num_characters: int) -> str:
    """Return the beginning of a text, cut at a space if there is one shortly before the limit."""
    last_word = text[num_characters - _LAST_WORD_CHARACTERS : num_characters]
    kept = last_word.rsplit(maxsplit=1)
    return text[: num_characters - len(kept[1])] if len(kept) == 2 else text[:num_characters]


def _size(item: Item) -> str:
    return f"{len(item):,} {'characters' if isinstance(item, str) else 'token ids'}"
