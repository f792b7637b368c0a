"""Merge the search results of parts of a corpus by row number, so that doc_ids are looked up only once at the end.

In: scores and row numbers [Q, K] of each part. Out: the k best of each query, and all results that tie with the k-th,
since ties are broken by doc_id later. Memory is 12 bytes per query and result, twice.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray


@dataclass(frozen=True)
class RankedRows:
    """The best rows of Q queries, by falling score."""

    scores: NDArray[np.float32]
    """[Q, K], falling; -inf for an empty place."""
    rows: NDArray[np.int64]
    """[Q, K], row numbers; -1 for an empty place."""


def merge_rows(
    parts: Iterable[tuple[NDArray[np.float32], NDArray[np.int64]]], num_queries: int, top_k: int
) -> RankedRows:
    """Merge the results of parts, which may come in any order.

    Each part must have broken its own ties by doc_id, so that at most k rows of a part are needed.

    Args:
        parts: scores and row numbers of each part, [Q, K]; a score of -inf is an empty place. Row numbers are those of
            the whole corpus.
        num_queries: Q.
        top_k: k.

    Returns:
        The k best of each query, with more columns if for any query others tie with the k-th; fewer if there are fewer.
    """
    scores, rows = np.empty((num_queries, 0), np.float32), np.empty((num_queries, 0), np.int64)
    for more_scores, more_rows in parts:
        scores = np.concatenate([scores, more_scores], axis=1)
        rows = np.concatenate([rows, more_rows], axis=1)
        order = np.argsort(-scores, axis=1, kind="stable")
        scores, rows = np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)
        if scores.shape[1] > top_k:
            last = scores[:, top_k - 1 : top_k]
            width = int(((scores > last) | ((scores == last) & (scores > -np.inf))).sum(axis=1).max(initial=0))
            scores, rows = scores[:, : max(width, top_k)], rows[:, : max(width, top_k)]
    return RankedRows(scores, rows)


def ordered_ties(
    scores: NDArray[np.float32], codes: NDArray[np.int64], names: pa.Array, top_k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Sort ties by doc_id, and keep the k best of each query, so that the order of parts has no influence.

    Fusion by rank and the merging of passages to documents depend on this order. `codes` is changed in place.

    Args:
        scores: [Q, K], falling.
        codes: [Q, K], indices into `names`.
        names: distinct doc_ids.
        top_k: results per query.
    """
    is_tied = (scores[:, 1:] == scores[:, :-1]) & (scores[:, 1:] > -np.inf)
    queries = np.flatnonzero(is_tied.any(axis=1))
    if len(queries):
        alphabetical = np.empty(len(names), np.int64)
        alphabetical[pc.sort_indices(names).to_numpy()] = np.arange(len(names))
        order = np.lexsort((alphabetical[codes[queries]], -scores[queries]), axis=1)
        codes[queries] = np.take_along_axis(codes[queries], order, axis=1)
    return scores[:, :top_k], codes[:, :top_k]
