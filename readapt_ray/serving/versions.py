"""One version as the gateway sees it: what it is, how to have texts tokenised, encoded and searched.

A version is an encoder with the index of its own vectors: one unit with one fingerprint. Every call carries the
fingerprint that it was meant for, and whoever holds another refuses it, so a query is never searched in the index
of another encoder, not even while versions change.
"""

import heapq
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from readapt_ray.catalog.retrievers import Encoding
from readapt_ray.errors import InputError
from readapt_ray.retrieval.templates import Kind, TextTokenizer
from readapt_ray.serving.schema import RequestError

_NO_LIMIT_TOKENS = 1 << 40

LostShards = Literal["wait", "partial", "error"]


@dataclass(frozen=True)
class DocFilter:
    """Which passages may be found: those whose doc_id begins so, or is one of these."""

    prefix: str | None = None
    doc_ids: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class VersionInfo:
    """What a version says of itself when it is up."""

    fingerprint: str
    """Of encoder, index and corpus together."""
    encoder_fingerprint: str
    encoding: Encoding
    tokenizer: Any
    """The transformers tokenizer."""
    dimension: int
    batch_tokens: int
    num_slots: int
    """Batches that its replicas can encode at once."""
    slices: Mapping[str, int] = field(default_factory=dict)
    """The parts of its index, each with the number of its vectors; empty without an index."""
    corpus: str | None = None
    created: int = 0
    """Seconds since 1970."""
    processes: Mapping[str, Any] = field(default_factory=dict)
    """The options of its processes."""

    @property
    def num_vectors(self) -> int:
        """Vectors in the whole index."""
        return sum(self.slices.values())


class Ranked(NamedTuple):
    """A passage that was found."""

    doc_id: str
    score: float


@dataclass(frozen=True)
class Found:
    """What a search found for each query, best first, and which parts of the index did not answer."""

    ranked: list[list[Ranked]]
    missing: list[str]


class Version(Protocol):
    """Whoever encodes and searches; on Ray Serve, or in one process for a test."""

    info: VersionInfo

    async def encode(self, rows: list[Sequence[int]]) -> NDArray[np.float32]:
        """The vectors [N, D] of N rows of token ids."""

    async def search(self, vectors: NDArray[np.float32], top_k: int, wanted: DocFilter | None) -> Found:
        """The k best of each query [Q, D]."""

    async def check(self) -> float:
        """Encode and search for real, now: the seconds that the encoder took.

        Raises:
            Exception: it cannot.
        """


def merged(parts: Sequence[Sequence[Sequence[Ranked]]], num_queries: int, top_k: int) -> list[list[Ranked]]:
    """The k best of each query from what each part of an index found for it, best first, ties by doc_id."""
    return [
        list(itertools.islice(heapq.merge(*(part[query] for part in parts), key=_best_first), top_k))
        for query in range(num_queries)
    ]


def _best_first(each: Ranked) -> tuple[float, str]:
    return -each.score, each.doc_id


class InputTokenizer:
    """Makes rows of token ids from what a request gives, or says what is wrong with it."""

    def __init__(self, tokenizer: Any, encoding: Encoding) -> None:
        self._tokenizer = tokenizer
        self._limits = {"query": encoding.max_query_tokens, "passage": encoding.max_passage_tokens}
        unlimited = {"max_query_tokens": _NO_LIMIT_TOKENS, "max_passage_tokens": _NO_LIMIT_TOKENS}
        self._whole = TextTokenizer(tokenizer, encoding.model_copy(update=unlimited))
        self._cut = TextTokenizer(tokenizer, encoding)

    def rows(self, given: Any, kind: Kind, *, param: str, truncate: bool, max_inputs: int) -> list[list[int]]:
        """Token ids of each text, template and specials included.

        Args:
            given: a text, a list of texts, or token ids in either form.
            kind: query or passage.
            param: the request's name for it, for errors.
            truncate: cut what is too long, instead of refusing it.
            max_inputs: texts at most.

        Raises:
            RequestError: a text is empty, too long, or not Unicode; an id is not in the vocabulary; too many texts.
        """
        is_one = isinstance(given, str) or isinstance(given[0], int)
        items = [given] if is_one else list(given)
        if len(items) > max_inputs:
            raise RequestError(
                f"'{param}' has {len(items):,} texts; this server takes {max_inputs:,} in a request",
                param=param,
                code="invalid_value",
            )
        names = [f"'{param}'" if is_one else f"'{param}[{place}]'" for place in range(len(items))]
        texts = [
            item if isinstance(item, str) else self._decoded(item, name, param)
            for item, name in zip(items, names, strict=True)
        ]
        for text, name in zip(texts, names, strict=True):
            if not text.strip():
                raise RequestError(f"{name} is empty; leave it out", param=param, code="empty")
        try:
            rows = (self._cut if truncate else self._whole).ids(texts, kind)
        except InputError:
            raise RequestError(
                f"'{param}' holds text that is not valid Unicode", param=param, code="invalid_value"
            ) from None
        for row, name in zip(rows, names, strict=True):
            if len(row) > self._limits[kind]:
                raise RequestError(
                    f"{name} has {len(row):,} tokens; a {kind} may have {self._limits[kind]:,}; "
                    f'shorten it, or send "truncate": true to have it cut',
                    param=param,
                    code="context_length_exceeded",
                )
        return rows

    def _decoded(self, ids: list[int], name: str, param: str) -> str:
        if max(ids) >= len(self._tokenizer):
            raise RequestError(
                f"{name} has the token id {max(ids)}; this model's tokenizer has {len(self._tokenizer):,} tokens: "
                f"send text, or ids of its own tokenizer",
                param=param,
                code="invalid_value",
            )
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
