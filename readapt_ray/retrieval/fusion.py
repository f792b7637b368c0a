"""Fuse the rankings of several searches by reciprocal rank (Cormack, Clarke and Buettcher, SIGIR 2009)."""

import heapq
from collections import defaultdict
from collections.abc import Iterable, Sequence

_K = 60
"""As in the paper: how little the first places count above the later ones."""
DEPTH = 100
"""Results of each search that are fused, at least."""


def reciprocal_rank_fusion(rankings: Iterable[Sequence[str]], top_k: int) -> list[tuple[str, float]]:
    """Return the k best doc_ids with their scores, ties by doc_id.

    Args:
        rankings: doc_ids, best first.
        top_k: k.
    """
    scores: defaultdict[str, float] = defaultdict(float)
    for ranking in rankings:
        for rank, doc_id in enumerate(ranking, start=1):
            scores[doc_id] += 1 / (_K + rank)
    return heapq.nsmallest(top_k, scores.items(), key=lambda each: (-each[1], each[0]))
