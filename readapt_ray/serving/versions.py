"""One version as the gateway sees it: what it is, how to have texts encoded and searched.

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

from readapt_ray.catalog.encoding import Encoding

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
    """Where the titles and texts of its passages lie."""
    corpus_fingerprint: str | None = None
    """Of that corpus; another one at the same place has other texts."""
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
