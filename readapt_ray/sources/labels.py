"""Queries and judgements after duplicates were dropped: none may point at a passage that is gone."""

from collections import Counter
from collections.abc import Callable, Iterable

from readapt_ray.records import Qrel, Query


def repointed(qrels: Iterable[Qrel], kept_id: Callable[[str], str]) -> tuple[list[Qrel], int]:
    """Judgements of dropped duplicates, moved to the passage that was kept.

    Args:
        qrels: the judgements of one split.
        kept_id: the id that stands for an id now; its own where nothing was dropped.

    Returns:
        The judgements, the highest relevance where two now meet, and how many were moved.
    """
    best: dict[tuple[str, str], int] = {}
    num_moved = 0
    for qrel in qrels:
        doc_id = kept_id(qrel.doc_id)
        num_moved += doc_id != qrel.doc_id
        pair = (qrel.query_id, doc_id)
        best[pair] = max(qrel.relevance, best.get(pair, qrel.relevance))
    return [Qrel(query_id, doc_id, relevance) for (query_id, doc_id), relevance in best.items()], num_moved


def with_passage(
    queries: Iterable[Query], qrels: Iterable[Qrel], is_kept: Callable[[str], bool]
) -> tuple[list[Query], list[Qrel], dict[str, int]]:
    """Queries that were made from passages: those whose passage was kept and whose text no other has.

    Returns:
        The queries, their judgements, and how many queries were left out for which reason.
    """
    answered = [qrel for qrel in qrels if is_kept(qrel.doc_id)]
    with_answer = {qrel.query_id for qrel in answered}
    queries = list(queries)
    remaining = [query for query in queries if query.query_id in with_answer]
    times = Counter(query.text for query in remaining)
    chosen = [query for query in remaining if times[query.text] == 1]
    chosen_ids = {query.query_id for query in chosen}
    left_out = {"passage_dropped": len(queries) - len(remaining), "ambiguous": len(remaining) - len(chosen)}
    return chosen, [qrel for qrel in answered if qrel.query_id in chosen_ids], left_out
