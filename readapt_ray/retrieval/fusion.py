"""Fuse the rankings of several searches by reciprocal rank (Cormack, Clarke and Buettcher, SIGIR 2009)."""

import heapq
from collections import defaultdict
from collections.abc import Iterable, Sequence

_K = 60
"""Constant k of the paper. The larger it is, the less the first places count above later ones."""
DEPTH = 100
"""Least number of results of each search that are fused."""


def reciprocal_rank_fusion(rankings: Iterable[Sequence[str]], top_k: int) -> list[tuple[str, float]]:
    """Fuse rankings by reciprocal rank; return the k best doc_ids with their fused scores, ties by doc_id.

    A score is the sum of 1 / (60 + rank) over the rankings that have the doc_id; ranks start at 1.

    Args:
        rankings: doc_ids, best first, each once per ranking.
        top_k: k; fewer are returned if the rankings have fewer.
    """
    scores: defaultdict[str, float] = defaultdict(float)
    for ranking in rankings:
        for rank, doc_id in enumerate(ranking, start=1):
            scores[doc_id] += 1 / (_K + rank)
    return heapq.nsmallest(top_k, scores.items(), key=lambda each: (-each[1], each[0]))
