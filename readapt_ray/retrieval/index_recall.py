"""How much of the truth an index finds: measured on vectors of its own, each without itself.

Enters: an index with its vectors. Leaves: recall at 10 and 100 against exact search, the time of a query,
and the least search depth at which both reach the recall that is asked for. 100 queries over a million vectors of
384 numbers take some 10 s on one core.
"""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from readapt_ray.errors import InputError
from readapt_ray.retrieval.faiss_build import faiss
from readapt_ray.retrieval.index_kinds import IndexOptions, IndexSpec
from readapt_ray.seeds import random_generator

_NUM_QUERIES = 100
_QUERY_BLOCK = 10
_RANKS = (10, 100)
_TOLERANCE = 1e-5
"""Score by which a result may miss the k-th best and count as tied with it."""
_FIRST_DEPTH = {"nprobe": 1, "efSearch": 16}
_LAST_EF_SEARCH = 2048


@dataclass(frozen=True)
class IndexRecall:
    """What an index finds and takes."""

    recall_at_10: float
    recall_at_100: float
    query_ms: float
    """Milliseconds a query at 10 results, on the threads that FAISS had."""
    depth: int | None
    """nprobe or efSearch that it is set to."""

    @property
    def least_recall(self) -> float:
        """The lower of both."""
        return min(self.recall_at_10, self.recall_at_100)


def calibrate(index: Any, vectors: NDArray[np.float32], spec: IndexSpec, options: IndexOptions) -> IndexRecall:
    """Set an index to the least depth that reaches the recall at 10 and at 100, and measure it.

    Args:
        index: holds `vectors` [N, D], in their order.
        spec: how it was made.
        options: the recall, and the depth where the user gave one.

    Raises:
        InputError: it finds too little even when it looks everywhere; the message says which option to raise.
    """
    refined = faiss.downcast_index(index)
    if hasattr(refined, "k_factor"):
        refined.k_factor = spec.reranked
    rows = random_generator(0, "recall queries").choice(len(vectors), min(_NUM_QUERIES, len(vectors)), replace=False)
    bounds = _kth_scores(vectors, rows)
    measured = None
    for depth in _depths(index, spec, options):
        if depth is not None:
            faiss.ParameterSpace().set_index_parameter(index, str(spec.depth), depth)
        measured = _measure(index, vectors, rows, bounds, depth)
        if measured.least_recall >= options.min_recall:
            return measured
    assert measured is not None
    raise InputError(_too_low(measured, spec, options))


def _depths(index: Any, spec: IndexSpec, options: IndexOptions) -> list[int | None]:
    if spec.depth is None:
        return [None]
    if options.depth is not None:
        return [options.depth]
    last = faiss.extract_index_ivf(index).nlist if spec.depth == "nprobe" else _LAST_EF_SEARCH
    first = _FIRST_DEPTH[spec.depth]
    return [*(first << step for step in range(32) if first << step < last), last]


def _kth_scores(vectors: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """The exact score of the 10th and 100th best of each query other than itself, [Q, 2]."""
    bounds = np.empty((len(rows), len(_RANKS)), np.float32)
    for first in range(0, len(rows), _QUERY_BLOCK):
        block = rows[first : first + _QUERY_BLOCK]
        scores = vectors[block] @ vectors.T
        scores[np.arange(len(block)), block] = -np.inf
        for place, rank in enumerate(_RANKS):
            kth = min(rank, scores.shape[1] - 1)
            bounds[first : first + len(block), place] = -np.partition(-scores, kth - 1, axis=1)[:, kth - 1]
    return bounds


def _measure(
    index: Any, vectors: NDArray[np.float32], rows: NDArray[np.int64], bounds: NDArray[np.float32], depth: int | None
) -> IndexRecall:
    queries = np.ascontiguousarray(vectors[rows])
    started_s = time.perf_counter()
    index.search(queries, _RANKS[0])
    query_ms = 1000 * (time.perf_counter() - started_s) / len(rows)
    _, found = index.search(queries, min(_RANKS[-1] + 1, len(vectors)))
    recalls = []
    for place, rank in enumerate(_RANKS):
        num_due = min(rank, len(vectors) - 1)
        hits = 0
        for query, row, bound in zip(found, rows, bounds[:, place], strict=True):
            others = query[(query >= 0) & (query != row)][:num_due]
            hits += int((vectors[others] @ vectors[row] >= bound - _TOLERANCE).sum())
        recalls.append(hits / max(1, num_due * len(rows)))
    return IndexRecall(recalls[0], recalls[1], query_ms, depth)


def _too_low(measured: IndexRecall, spec: IndexSpec, options: IndexOptions) -> str:
    if options.depth is not None and spec.depth is not None:
        mend = f"raise --depth ({spec.depth}, {options.depth} now), or leave it out to have it found"
    elif options.kind == "ivf-pq" and not options.refine:
        mend = "raise --code-bytes, or give --refine"
    elif options.kind == "rabitq" and not options.refine:
        mend = "give --refine"
    elif options.storage == "int8":
        mend = "give --storage float16"
    else:
        mend = "give another --kind (flat is exact)"
    return (
        f"the index {spec.factory!r} finds {measured.recall_at_10:.3f} of the 10 best and {measured.recall_at_100:.3f} of the "
        f"100 best, and min_recall = {options.min_recall:g} is asked for of both; {mend}, or lower --min-recall"
    )
