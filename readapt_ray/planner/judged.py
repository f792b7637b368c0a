"""Count the queries that a run will search: the queries with judgements in the evaluated split."""

from collections.abc import Iterable

from readapt_ray.config import Config
from readapt_ray.recipes.chain import GeneralCollection, RunConfig
from readapt_ray.records import Qrel, Query
from readapt_ray.sources.columns import ColumnsOption
from readapt_ray.sources.judgements import keep_judged, read_qrels, read_queries
from readapt_ray.sources.source import BadRow, Source
from readapt_ray.storage import Location


class _Columns(Config):
    columns: ColumnsOption = ()


def num_given(run: RunConfig | GeneralCollection) -> int | None:
    """Return the number of judged queries in the files that a run names: its options `queries` and `qrels`.

    None if one of them is not given or does not exist. Both files are read whole.
    """
    if not run.queries or not run.qrels or not Location(run.queries).exists() or not Location(run.qrels).exists():
        return None
    columns: ColumnsOption = ()
    if isinstance(run, RunConfig):
        columns = _Columns(columns=run.search.get("columns", run.ingest.get("columns", ()))).columns
    return len(keep_judged(read_queries(run.queries, columns), read_qrels(run.qrels, columns)))


def num_ingested(corpus: Location, split: str) -> int | None:
    """Return the number of judged queries in a split of an ingested corpus; None if it has no queries or no such split.

    Args:
        corpus: folder of the output of ingest.
        split: name of the judgements, such as "test".
    """
    queries, qrels = corpus / "queries", corpus / "qrels" / f"{split}.parquet"
    if not queries.exists() or not qrels.exists():
        return None
    return len(keep_judged(read_queries(queries.uri), read_qrels(qrels.uri)))


def num_in_source(source: Source, split: str) -> int | None:
    """Return the number of judged queries in a split of a source; bad rows are left out.

    None if the source has no such split, or if it makes judgements while its passages are read.
    """
    splits = source.qrels() if source.has_qrels and not source.labels_from_passages else {}
    if split not in splits:
        return None
    return len(keep_judged(_good_queries(source.queries()), _good_qrels(splits[split])))


def _good_queries(rows: Iterable[Query | BadRow]) -> list[Query]:
    return [row for row in rows if not isinstance(row, BadRow)]


def _good_qrels(rows: Iterable[Qrel | BadRow]) -> list[Qrel]:
    return [row for row in rows if not isinstance(row, BadRow)]
