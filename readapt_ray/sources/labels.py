"""Write the queries and judgements of a source beside its passages, and point judgements of dropped duplicates to the
passages that were kept."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from readapt_ray.artifact_files import named
from readapt_ray.records import QREL_SCHEMA, QUERY_SCHEMA, Qrel, Query
from readapt_ray.sources.bad_rows import BadRows
from readapt_ray.sources.source import Source
from readapt_ray.storage import Location

KeptIds = Callable[[Sequence[str]], Mapping[str, str]]
"""A function that maps doc_ids to the doc_ids of kept passages: a duplicate's to the passage kept instead, any other to
itself. Unknown ids are left out."""


@dataclass
class WrittenLabels:
    """Counts and details of the written queries and judgements for the manifest, and warnings for the log."""

    counts: dict[str, int] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def write_labels(
    source: Source, output: Location, bad_rows: BadRows, kept_ids: KeptIds, *, any_dropped: bool
) -> WrittenLabels:
    """Write the queries and judgements of a source to `queries/` and `qrels/SPLIT.parquet` of an artifact.

    Both are held in memory. Nothing is written for what the source lacks. Judgements of unknown queries or passages are
    written too, and counted in the warnings. If the queries were made from passages, those without a kept passage or
    with an ambiguous text are left out (see `with_passage`).

    Args:
        source: the source of the passages.
        output: the artifact's folder.
        bad_rows: counts the rows that are not queries or judgements.
        kept_ids: maps doc_ids to the doc_ids of kept passages.
        any_dropped: whether any duplicates were dropped, so that judgements must be moved to kept passages.

    Raises:
        CorpusError: a row is bad, and the policy of `bad_rows` is "fail".
    """
    queries = bad_rows.good(source.queries())
    splits = {split: bad_rows.good(qrels) for split, qrels in source.qrels().items()}
    kept = kept_ids(list(dict.fromkeys(qrel.doc_id for qrels in splits.values() for qrel in qrels)))
    written = WrittenLabels()
    if source.labels_from_passages:
        for split, qrels in splits.items():
            queries, splits[split], left_out = with_passage(queries, qrels, lambda doc_id: kept.get(doc_id) == doc_id)
            written.details["queries_left_out"] = left_out
    elif any_dropped:
        done = {split: repointed(qrels, lambda doc_id: kept.get(doc_id, doc_id)) for split, qrels in splits.items()}
        splits = {split: qrels for split, (qrels, _) in done.items()}
        written.details["qrels_moved_to_kept_duplicates"] = sum(count for _, count in done.values())
    if queries:
        _write(output / "queries" / "part-00000.parquet", queries, QUERY_SCHEMA)
        written.counts["num_queries"] = len(queries)
    for split, qrels in splits.items():
        if qrels:
            _write(output / "qrels" / f"{split}.parquet", qrels, QREL_SCHEMA)
    if splits:
        written.counts["num_qrels"] = sum(map(len, splits.values()))
        _count_unknown(written, queries, [qrel for qrels in splits.values() for qrel in qrels], set(kept.values()))
    return written


def _count_unknown(written: WrittenLabels, queries: list[Query], qrels: list[Qrel], doc_ids: set[str]) -> None:
    """Count the judgements whose passage or query does not exist."""
    query_ids = {query.query_id for query in queries}
    lost = {
        "passages": [qrel.doc_id for qrel in qrels if qrel.doc_id not in doc_ids],
        "queries": [qrel.query_id for qrel in qrels if qrel.query_id not in query_ids],
    }
    for what, ids in lost.items():
        written.details[f"qrels_of_unknown_{what}"] = len(ids)
        if ids:
            distinct = list(dict.fromkeys(ids))
            written.warnings.append(
                f"{len(ids)} of {len(qrels)} judgements are of unknown {what} ({len(distinct)}): {named(distinct)}"
            )


def _write(target: Location, records: list[Query] | list[Qrel], schema: pa.Schema) -> None:
    columns = [list(column) for column in zip(*records, strict=True)]
    table = pa.Table.from_arrays([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema)
    with target.open_output() as file:
        pq.write_table(table, file)


def repointed(qrels: Iterable[Qrel], kept_id: Callable[[str], str]) -> tuple[list[Qrel], int]:
    """Move the judgements of dropped duplicates to the passages that were kept.

    Args:
        qrels: the judgements of one split.
        kept_id: maps a doc_id to the doc_id of the kept passage (itself if it was not dropped).

    Returns:
        The judgements, and how many were moved. If a query has two judgements of one passage now, only the higher one
        is returned.
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
    """Keep the queries (made from passages) whose passage was kept and whose text no other such query has.

    Of queries with the same text, none is kept.

    Args:
        queries: all queries.
        qrels: the judgements of one split.
        is_kept: returns whether the passage with a doc_id was kept.

    Returns:
        The kept queries, their judgements, and how many queries were left out, by reason: "passage_dropped" or
        "ambiguous".
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
