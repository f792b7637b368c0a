"""Measure the recall of an approximate index, and find the least search depth that reaches the recall asked for.

The queries are 100 real queries, or else 100 vectors of the index, each without itself as a result. In: the shards of
an index, and the exact best rows of each query (the ground truth). Out: recall at 10 and at 100 over all shards, and
the time per query. Each shard is measured where it is built, into a file of about a megabyte, so no process needs all
vectors.
"""

import functools
import io
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from readapt_ray.errors import InputError
from readapt_ray.retrieval.faiss_build import faiss
from readapt_ray.retrieval.index_kinds import IndexOptions, IndexSpec
from readapt_ray.seeds import random_generator

_NUM_QUERIES = 100
_RANKS = (10, 100)
_NUM_TRUE = 256
"""Exact best rows kept per query. A result outside them counts as a miss."""
_TOLERANCE = 1e-5
"""A result whose score is below the k-th best by at most this much counts as tied with it."""
_FIRST_DEPTH = {"nprobe": 1, "efSearch": 16}
_LAST_EF_SEARCH = 2048


@dataclass(frozen=True)
class IndexRecall:
    """Measured recall and time of an index at one search depth."""

    recall_at_10: float
    recall_at_100: float
    query_ms: float
    """Milliseconds per query for 10 results, summed over all shards, on the threads that FAISS had."""
    depth: int | None
    """nprobe or efSearch; None for an index without such a parameter."""

    @property
    def least_recall(self) -> float:
        """Return the lower of both recalls."""
        return min(self.recall_at_10, self.recall_at_100)


class BestRows:
    """The exact 256 best rows of each query among vectors that come in chunks: the ground truth.

    Args:
        queries: [Q, D].
        own_rows: [Q], the row of each query among the vectors, which does not count as a result; any number outside
            0 to N - 1 if the query is not among them.
    """

    def __init__(self, queries: NDArray[np.float32], own_rows: NDArray[np.int64]) -> None:
        self.queries = queries
        self.own_rows = own_rows
        self.num_rows = 0
        self.scores = np.empty((len(queries), 0), np.float32)
        """[Q, K], falling."""
        self.rows = np.empty((len(queries), 0), np.int64)

    def add(self, vectors: NDArray[np.float32]) -> None:
        """Score the next vectors [N, D], whose rows follow those added earlier, and keep the best so far."""
        rows = np.arange(self.num_rows, self.num_rows + len(vectors))
        self.num_rows += len(vectors)
        scores = self.queries @ vectors.T
        scores[rows == self.own_rows[:, None]] = -np.inf
        scores = np.concatenate([self.scores, scores], axis=1)
        rows = np.concatenate([self.rows, np.broadcast_to(rows, (len(self.queries), len(rows)))], axis=1)
        best = np.argpartition(-scores, _NUM_TRUE, axis=1)[:, :_NUM_TRUE] if scores.shape[1] > _NUM_TRUE else None
        if best is not None:
            scores, rows = np.take_along_axis(scores, best, axis=1), np.take_along_axis(rows, best, axis=1)
        order = np.argsort(-scores, axis=1)
        self.scores, self.rows = np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)


@dataclass(frozen=True)
class ShardRecall:
    """Results of one shard, or of several together, at each of the T depths that were tried."""

    num_rows: int
    depths: NDArray[np.int64]
    """[T], rising; 0 if the index has no depth."""
    truth: NDArray[np.float32]
    """[Q, 100], the exact best scores; filled up with -inf."""
    scores: NDArray[np.float32]
    """[T, Q, 100], the scores that the index gives its results; filled up with -inf."""
    exact: NDArray[np.float32]
    """[T, Q, 100], the exact scores of the same results; -inf for one that is not among the best 256."""
    query_ms: NDArray[np.float64]
    """[T], milliseconds per query for 10 results."""

    def to_bytes(self) -> bytes:
        """Return the results as the content of an npz file."""
        sink = io.BytesIO()
        arrays: dict[str, Any] = vars(self)
        np.savez_compressed(sink, **arrays)
        return sink.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> "ShardRecall":
        """Read what `to_bytes` wrote."""
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            values: dict[str, Any] = {name: arrays[name] for name in arrays.files}
        return cls(**values | {"num_rows": int(values["num_rows"])})

    def at(self, depth: int) -> int:
        """Return the index in `depths` of the largest depth that is at most `depth`; 0 if all are larger."""
        return max(0, int(np.searchsorted(self.depths, depth, side="right")) - 1)


def query_rows(num_rows: int) -> NDArray[np.int64]:
    """Choose at random the rows whose vectors are the queries: up to 100 of `num_rows`, always the same."""
    rows = random_generator(0, "recall queries").choice(num_rows, min(_NUM_QUERIES, num_rows), replace=False)
    return np.asarray(rows, np.int64)


def calibrate(index: Any, vectors: NDArray[np.float32], spec: IndexSpec, options: IndexOptions) -> IndexRecall:
    """Set an index to the least search depth (nprobe or efSearch) that reaches `min_recall`; return what was measured.

    Both recall at 10 and recall at 100 must reach it. Queries are up to 100 of `vectors`, each without itself as a
    result.

    Args:
        index: holds `vectors` [N, D], in their order.
        spec: how it was made.
        options: hold `min_recall`, and the `depth` if the user gave one, which is then the only one tried.

    Raises:
        InputError: no depth reaches it; the message says which option to raise.
    """
    rows = query_rows(len(vectors))
    best = BestRows(np.ascontiguousarray(vectors[rows]), rows)
    best.add(vectors)
    measured = choose_depth([measure_shard(index, best, spec, options)], spec, options)
    set_depth(index, measured.depth)
    return measured


def set_depth(index: Any, depth: int | None) -> None:
    """Set nprobe or efSearch of an index in place, whichever it has; None changes nothing."""
    if depth is None:
        return
    name = "nprobe" if faiss.try_extract_index_ivf(index) is not None else "efSearch"
    faiss.ParameterSpace().set_index_parameter(index, name, depth)


def measure_shard(index: Any, best: BestRows, spec: IndexSpec, options: IndexOptions) -> ShardRecall:
    """Measure a shard at rising depths, until one depth after the first that reaches the recall for this shard alone.

    The index is left at the depth that reached it, or at the last if none did, which is no error here. All shards
    together often need less depth, since each holds only some of the best 100 of all.

    Args:
        index: the FAISS index of the shard.
        best: the queries, and their exact best rows among all vectors of the shard.
        spec: how it was made.
        options: hold `min_recall`, and perhaps the only `depth` to try.
    """
    refined = faiss.downcast_index(index)
    if hasattr(refined, "k_factor"):
        refined.k_factor = spec.reranked
    tried: list[tuple[int, NDArray[np.float32], NDArray[np.float32], float]] = []
    reached = None
    for depth in _depths(index, spec, options):
        set_depth(index, depth)
        tried.append((depth or 0, *_found(index, best)))
        if reached is not None:
            break
        alone = _recalls(_gathered(best, tried[-1:]), 0)
        reached = depth if min(alone) >= options.min_recall else None
    set_depth(index, reached)
    return _gathered(best, tried)


def _gathered(
    best: BestRows, tried: Sequence[tuple[int, NDArray[np.float32], NDArray[np.float32], float]]
) -> ShardRecall:
    depths, scores, exact, query_ms = zip(*tried, strict=True)
    return ShardRecall(
        num_rows=best.num_rows,
        depths=np.array(depths),
        truth=_padded(best.scores[:, : _RANKS[-1]]),
        scores=np.stack(scores),
        exact=np.stack(exact),
        query_ms=np.array(query_ms),
    )


def _found(index: Any, best: BestRows) -> tuple[NDArray[np.float32], NDArray[np.float32], float]:
    """Search; return the index's scores and the exact ones, both [Q, 100], and milliseconds per query."""
    started_s = time.perf_counter()
    index.search(best.queries, _RANKS[0])
    query_ms = 1000 * (time.perf_counter() - started_s) / max(1, len(best.queries))
    scores, rows = index.search(best.queries, min(_RANKS[-1] + 1, best.num_rows))
    exact = np.full(scores.shape, -np.inf, np.float32)
    for query, (true_rows, true_scores) in enumerate(zip(best.rows, best.scores, strict=True)):
        order = np.argsort(true_rows)
        places = order[np.minimum(np.searchsorted(true_rows[order], rows[query]), len(order) - 1)]
        exact[query] = np.where(true_rows[places] == rows[query], true_scores[places], -np.inf)
    scores = np.where((rows < 0) | (rows == best.own_rows[:, None]), -np.inf, scores).astype(np.float32)
    order = np.argsort(-scores, axis=1, kind="stable")[:, : _RANKS[-1]]
    scores, exact = np.take_along_axis(scores, order, axis=1), np.take_along_axis(exact, order, axis=1)
    return _padded(scores), _padded(exact), query_ms


def _padded(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    missing = _RANKS[-1] - scores.shape[1]
    return np.pad(scores, ((0, 0), (0, missing)), constant_values=-np.inf)


def choose_depth(shards: Iterable[ShardRecall], spec: IndexSpec, options: IndexOptions) -> IndexRecall:
    """Return the recall of the index at the least search depth (nprobe or efSearch) that reaches `min_recall`.

    Both recall at 10 and recall at 100, over all shards together, must reach it.

    Args:
        shards: the measurements of all shards, with the same queries; at least one.
        spec: the kind of index; used in the error.
        options: hold `min_recall`.

    Raises:
        InputError: no depth reaches it; the message says which option to raise.
    """
    whole = functools.reduce(_together, shards)
    measured = None
    for place, depth in enumerate(whole.depths.tolist()):
        measured = IndexRecall(*_recalls(whole, place), float(whole.query_ms[place]), depth or None)
        if measured.least_recall >= options.min_recall:
            return measured
    assert measured is not None
    raise InputError(_too_low(measured, spec, options))


def _together(one: ShardRecall, other: ShardRecall) -> ShardRecall:
    """Merge the results of two parts of an index. A part that was not tried at a depth counts with a lower one."""
    depths = np.union1d(one.depths, other.depths)
    places = [(one.at(depth), other.at(depth)) for depth in depths]
    scores = np.stack([np.concatenate([one.scores[a], other.scores[b]], axis=1) for a, b in places])
    exact = np.stack([np.concatenate([one.exact[a], other.exact[b]], axis=1) for a, b in places])
    order = np.argsort(-scores, axis=2, kind="stable")[:, :, : _RANKS[-1]]
    truth = -np.sort(-np.concatenate([one.truth, other.truth], axis=1), axis=1)
    return ShardRecall(
        num_rows=one.num_rows + other.num_rows,
        depths=depths,
        truth=truth[:, : _RANKS[-1]],
        scores=np.take_along_axis(scores, order, axis=2),
        exact=np.take_along_axis(exact, order, axis=2),
        query_ms=np.array([one.query_ms[a] + other.query_ms[b] for a, b in places]),
    )


def _recalls(found: ShardRecall, place: int) -> tuple[float, float]:
    """Return recall at 10 and at 100 at one of the depths."""
    recalls = []
    for rank in _RANKS:
        num_due = min(rank, found.num_rows - 1)
        if num_due < 1:
            recalls.append(1.0)
            continue
        bound = found.truth[:, num_due - 1 : num_due] - _TOLERANCE
        recalls.append(float((found.exact[place][:, :num_due] >= bound).mean()))
    return recalls[0], recalls[1]


def _depths(index: Any, spec: IndexSpec, options: IndexOptions) -> list[int | None]:
    if spec.depth_parameter is None:
        return [None]
    if options.depth is not None:
        return [options.depth]
    last = faiss.extract_index_ivf(index).nlist if spec.depth_parameter == "nprobe" else _LAST_EF_SEARCH
    first = _FIRST_DEPTH[spec.depth_parameter]
    return [*(first << step for step in range(32) if first << step < last), last]


def _too_low(measured: IndexRecall, spec: IndexSpec, options: IndexOptions) -> str:
    if options.depth is not None and spec.depth_parameter is not None:
        advice = f"raise --depth ({spec.depth_parameter}, {options.depth} now), or leave it out to have it found"
    elif options.kind == "ivf-pq" and not options.refine:
        advice = "raise --code-bytes, or give --refine"
    elif options.kind == "rabitq" and not options.refine:
        advice = "give --refine"
    elif options.storage == "int8":
        advice = "give --storage float16"
    else:
        advice = "give another --kind (flat is exact)"
    return (
        f"the index {spec.factory!r} finds {measured.recall_at_10:.3f} of the 10 best and {measured.recall_at_100:.3f} of the "
        f"100 best, and min_recall = {options.min_recall:g} is asked for of both; {advice}, or lower --min-recall"
    )
