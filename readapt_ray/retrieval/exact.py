"""Find the k passages of highest inner product exactly, over chunks of vectors, and merge the results of shards.

In: query vectors and chunks of passage vectors. Out: for each query its `top_k` passages by falling inner product, ties
by doc_id, whatever the order of the chunks. Memory is one chunk, its scores for a block of queries, and the k best so
far. 1,000 queries over 100,000 vectors of 384 numbers take about 3 s on one core.
"""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from readapt_ray.errors import InputError
from readapt_ray.records import ScoredDoc
from readapt_ray.retrieval.half_products import HalfQueries, has_half_products

QUERY_BLOCK = 1024
"""Queries whose scores are computed at once."""


Vectors = NDArray[np.float32] | NDArray[np.float16] | torch.Tensor
"""Vectors [N, D], float32 or float16; a tensor may be on any device."""


@dataclass(frozen=True)
class Hits:
    """The best passages of Q queries, best first. If a query has fewer than K, its row ends with scores of -inf.

    The doc_ids at such places mean nothing. K is less than `top_k` if there are fewer passages.
    """

    scores: NDArray[np.float32]
    """[Q, K], falling."""
    doc_ids: NDArray[np.object_]
    """[Q, K]."""

    def of_query(self, index: int, query_id: str) -> list[ScoredDoc]:
        """Return the passages of query number `index`, best first, without places that are empty.

        Args:
            index: number of the query among the Q.
            query_id: id to store in the results.
        """
        pairs = zip(self.doc_ids[index].tolist(), self.scores[index].tolist(), strict=True)
        return [ScoredDoc(query_id, doc_id, score) for doc_id, score in pairs if score != -np.inf]


def joined(parts: Sequence[Hits]) -> Hits:
    """Concatenate the hits of parts of the queries, in the order of the parts; at least one part."""
    return Hits(np.concatenate([each.scores for each in parts]), np.concatenate([each.doc_ids for each in parts]))


class TopK:
    """The k best passages of each query so far, while scores arrive in any order.

    If k exceeds the number of passages, all are kept.

    Raises:
        InputError: top_k is under 1, or a score is NaN.
    """

    def __init__(self, num_queries: int, top_k: int) -> None:
        if top_k < 1:
            raise InputError(f"top_k = {top_k}; it must be at least 1")
        self._top_k = top_k
        self._scores = np.empty((num_queries, 0), np.float32)
        self._doc_ids = np.empty((num_queries, 0), object)

    def add(self, scores: NDArray[np.float32], doc_ids: NDArray[np.object_]) -> None:
        """Add scored passages, and keep the k best.

        Args:
            scores: [Q, N]; -inf means no passage.
            doc_ids: [Q, N], or [N] if they are the same for every query.
        """
        columns = best_columns(torch.from_numpy(scores), doc_ids, self._top_k).numpy()
        self.merge(np.take_along_axis(scores, columns, axis=1), _taken(doc_ids, columns))

    def merge(self, scores: NDArray[np.float32], doc_ids: NDArray[np.object_]) -> None:
        """Add the best of some passages.

        Args:
            scores: [Q, K], for any K; -inf means no passage.
            doc_ids: [Q, K].
        """
        _check_scores(scores, doc_ids)  # covers add() too, since torch.topk puts NaN first
        scores = np.concatenate([self._scores, scores], axis=1)
        doc_ids = np.concatenate([self._doc_ids, doc_ids], axis=1)
        if scores.shape[1] > self._top_k:
            columns = best_columns(torch.from_numpy(scores), doc_ids, self._top_k).numpy()
            scores, doc_ids = np.take_along_axis(scores, columns, axis=1), np.take_along_axis(doc_ids, columns, axis=1)
        self._scores, self._doc_ids = scores, doc_ids

    def hits(self) -> Hits:
        """Return the best passages so far, by falling score, ties by doc_id: fewer than k if fewer were added."""
        order = np.argsort(-self._scores, axis=1, kind="stable")
        scores = np.take_along_axis(self._scores, order, axis=1)
        doc_ids = np.take_along_axis(self._doc_ids, order, axis=1)
        for row in np.flatnonzero((scores[:, 1:] == scores[:, :-1]).any(axis=1)):
            pairs = sorted(zip((-scores[row]).tolist(), doc_ids[row].tolist(), strict=True), key=_known_first)
            doc_ids[row] = [doc_id for _, doc_id in pairs]
        return Hits(scores, doc_ids)


def best_columns(scores: torch.Tensor, doc_ids: NDArray[np.object_], top_k: int) -> torch.Tensor:
    """Return the columns of the k best scores of each row, unordered. If the k-th place ties, the lower doc_id wins.

    Only rows with such a tie are processed one by one.

    Args:
        scores: [Q, N], on any device.
        doc_ids: [N] or [Q, N].

    Returns:
        int64 [Q, min(k, N)], on the device of the scores.
    """
    num_columns = scores.shape[1]
    if top_k >= num_columns:
        return torch.arange(num_columns, device=scores.device).expand(len(scores), -1)
    values, columns = torch.topk(scores, top_k + 1, dim=1)
    worst, chosen = values[:, top_k - 1], columns[:, :top_k].contiguous()
    crowded = (worst == values[:, top_k]) & torch.isfinite(worst)
    for row in torch.nonzero(crowded)[:, 0].tolist():
        candidates = torch.nonzero(scores[row] >= worst[row])[:, 0]
        falling, places = (-scores[row, candidates]).tolist(), candidates.tolist()
        names = (doc_ids[row] if doc_ids.ndim == 2 else doc_ids)[places]
        ranked = sorted(zip(falling, names.tolist(), places, strict=True))
        chosen[row] = torch.tensor([place for _, _, place in ranked[:top_k]])
    return chosen


def search_exact(
    queries: NDArray[np.float32],
    chunks: Iterable[tuple[Sequence[str] | NDArray[np.object_], Vectors]],
    top_k: int,
    *,
    device: str = "cpu",
) -> Hits:
    """Return the k best passages of each query by inner product, best first, ties by doc_id.

    Args:
        queries: [Q, D].
        chunks: doc_ids and vectors [N, D], a chunk at a time. float16 vectors are copied to the device as float16;
            their products are summed in float32.
        top_k: passages per query; if it exceeds the number of passages, all are returned.
        device: torch device on which scores are computed.

    Raises:
        InputError: top_k is under 1, the dimensions differ, or a query holds NaN or infinity.
    """
    blocks = [torch.from_numpy(queries[first : first + QUERY_BLOCK]) for first in range(0, len(queries), QUERY_BLOCK)]
    best = [TopK(len(block), top_k) for block in blocks]
    placed = [_PlacedQueries(block.to(device)) for block in blocks]
    for names, vectors in chunks:
        check_queries(queries, vectors.shape[1])
        doc_ids = np.asarray(names, dtype=object)
        passages = vectors if isinstance(vectors, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(vectors))
        passages = passages.to(device)
        if not has_half_products(passages.device, passages.dtype):
            passages = passages.float()
        for block, kept in zip(placed, best, strict=True):
            scores = block.scores(passages)
            columns = best_columns(scores, doc_ids, top_k)
            found = torch.gather(scores, 1, columns).cpu().numpy()
            kept.merge(found, _taken(doc_ids, columns.cpu().numpy()))
    found_hits = [kept.hits() for kept in best]
    if not found_hits:
        return TopK(0, top_k).hits()
    return Hits(
        np.concatenate([each.scores for each in found_hits]), np.concatenate([each.doc_ids for each in found_hits])
    )


class _PlacedQueries:
    """A block of queries [Q, D] on a device."""

    def __init__(self, queries_QD: torch.Tensor) -> None:
        self._whole_QD = queries_QD

    @functools.cached_property
    def _halves(self) -> HalfQueries:
        return HalfQueries(self._whole_QD)

    def scores(self, vectors_ND: torch.Tensor) -> torch.Tensor:
        """Return float32 inner products [Q, N] with float32 vectors, or float16 ones if the device multiplies them."""
        if vectors_ND.dtype == torch.float16:
            return self._halves.scores(vectors_ND)
        return self._whole_QD @ vectors_ND.T


def check_queries(queries: NDArray[np.float32], dimension: int) -> None:
    """Refuse queries [Q, D] whose D is not `dimension`, or that hold NaN or infinity.

    Raises:
        InputError: the dimensions differ, or a query is not finite; the message names the first.
    """
    if queries.ndim != 2 or queries.shape[1] != dimension:
        raise InputError(
            f"query vectors of shape {queries.shape} cannot be searched among vectors of {dimension} numbers; "
            f"encode the queries with the model that made the vectors"
        )
    broken = np.flatnonzero(~np.isfinite(queries).all(axis=1))
    if len(broken):
        raise InputError(
            f"{len(broken)} of {len(queries)} query vectors hold NaN or infinity, first number {broken[0]}; encode them in "
            f"bfloat16 or float32, or leave them out"
        )


def _check_scores(scores: NDArray[np.float32], doc_ids: NDArray[np.object_]) -> None:
    broken = np.argwhere(np.isnan(scores))
    if len(broken):
        query, column = broken[0]
        raise InputError(
            f"query {query} has the score NaN with {doc_ids[query, column]!r}; encode queries and passages in bfloat16 or "
            f"float32, or leave that text out"
        )


def _taken(doc_ids: NDArray[np.object_], columns: NDArray[np.int64]) -> NDArray[np.object_]:
    return doc_ids[columns] if doc_ids.ndim == 1 else np.take_along_axis(doc_ids, columns, axis=1)


def _known_first(pair: tuple[float, Any]) -> tuple[float, str]:
    """Sort by falling score, then doc_id; a place without a passage has the doc_id None."""
    return pair[0], pair[1] or ""
