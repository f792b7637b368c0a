"""Build the BM25 scores of index shards on Ray, with statistics of the whole corpus.

In: the shards of an index, and the corpus of its passages. Out: `shards/00000.bm25.npz` and so on. All passages are
read twice: to count their words, then to score them. The driver holds each distinct word of the corpus; a task holds
the passages of one shard.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from readapt_ray.artifacts import Artifact, Workspace
from readapt_ray.cluster import connection, on_worker
from readapt_ray.cluster.bounded_tasks import run_bounded
from readapt_ray.errors import CorpusError
from readapt_ray.retrieval.bm25 import WordCounts, WordIndex, words
from readapt_ray.retrieval.footers import listed_footers, row_counts
from readapt_ray.retrieval.parquet_rows import ParquetRows
from readapt_ray.storage import Location

if TYPE_CHECKING:
    from readapt_ray.retrieval.index_files import ShardRecord

_TEXTS = ("doc_id", "title", "text")


@dataclass(frozen=True)
class _Shard:
    """A shard of the index, and the part of the corpus that holds its passages."""

    record: "ShardRecord"
    first: int
    """Row of its first passage in the corpus, if the index has the order of the corpus."""
    folder: Location
    passages: ParquetRows


def build_word_shards(
    records: Sequence["ShardRecord"], folder: Location, corpus: Artifact, workspace: Workspace
) -> dict[str, str]:
    """Write the BM25 scores of all index shards: one file per shard, with a row per vector. Files there are replaced.

    Args:
        records: all index shards, in order.
        folder: folder of the shards; the files of scores are written there. Every node must see it.
        corpus: corpus with the passages of the index.
        workspace: receives the progress.

    Returns:
        The SHA-256 of each file of scores, by the name of its shard ("00000").

    Raises:
        CorpusError: a passage of the index is not in the corpus.
    """
    import ray

    location = on_worker.absolute(corpus.location / "passages")
    passages = ParquetRows(location, row_counts(listed_footers(corpus.location, "passages")))
    firsts = np.cumsum([0, *(each.num_vectors for each in records)])
    shards = [_Shard(each, int(first), folder, passages) for each, first in zip(records, firsts, strict=False)]
    num_at_once = max(1, connection.connect().num_cpus)
    connection.check_seen_by_all(folder)
    whole = WordCounts()
    count, build = ray.remote(num_cpus=1)(_count), ray.remote(num_cpus=1)(_build)
    for number, counts in enumerate(run_bounded(count.remote, shards, num_at_once), start=1):
        whole.merge(counts)
        workspace.progress(number, 2 * len(shards), unit="shards of words")
    kept = ray.put(whole)
    written = {}
    for name, sha256 in run_bounded(lambda shard: build.remote(shard, kept), shards, num_at_once):
        written[name] = sha256
        workspace.progress(len(shards) + len(written), 2 * len(shards), unit="shards of words")
    return dict(sorted(written.items()))


def _count(shard: _Shard) -> WordCounts:
    """Count the words of a shard's passages, in a Ray task."""
    counts = WordCounts()
    counts.add(each for each in _passages(shard) if each is not None)
    return counts


def _build(shard: _Shard, whole: WordCounts) -> tuple[str, str]:
    """Write the BM25 scores of a shard in a Ray task; return the file's name and SHA-256."""
    from readapt_ray.retrieval.index_files import words_file

    content = WordIndex.build([each or [] for each in _passages(shard)], whole).to_bytes()
    words_file(shard.folder, shard.record.name).write_bytes(content)
    return shard.record.name, hashlib.sha256(content).hexdigest()


def _passages(shard: _Shard) -> list[list[str] | None]:
    """Return the words of each passage, in the order of the shard; None for a deleted passage."""
    from readapt_ray.retrieval.index_files import read_ids
    from readapt_ray.retrieval.index_shard import DELETED

    doc_ids, _ = read_ids(shard.folder, shard.record)
    there = doc_ids != DELETED
    texts: Any = _texts(shard, pa.array(doc_ids[there], pa.string()))
    found: list[list[str] | None] = [None] * len(doc_ids)
    for row, title, text in zip(np.flatnonzero(there), texts["title"], texts["text"], strict=True):
        found[row] = words(f"{title.as_py() or ''} {text.as_py() or ''}")
    return found


def _texts(shard: _Shard, doc_ids: pa.Array) -> pa.Table:
    """Return the passages with these doc_ids, in this order. Try the rows at `shard.first`; else search the corpus."""
    rows = np.arange(shard.first, min(shard.first + len(doc_ids), shard.passages.num_rows))
    table = shard.passages.take(rows, _TEXTS)
    if len(table) == len(doc_ids) and table["doc_id"].combine_chunks().cast(pa.string()).equals(doc_ids):
        return table
    starts = np.cumsum([0, *(count for _, count in shard.passages.counts)])
    parts = []
    for start, (_, count) in zip(starts, shard.passages.counts, strict=False):
        ids = shard.passages.take(np.arange(start, start + count), ("doc_id",))["doc_id"]
        chosen = np.flatnonzero(pc.is_in(ids, value_set=doc_ids).to_numpy())
        parts.append(shard.passages.take(start + chosen, _TEXTS))
    table = pa.concat_tables([each for each in parts if len(each)])
    places = pc.index_in(doc_ids, value_set=table["doc_id"].combine_chunks().cast(pa.string()))
    if places.null_count:
        missing = doc_ids.filter(pc.is_null(places))[0].as_py()
        raise CorpusError(f"the corpus has no passage {missing!r}, which the index holds; ingest and embed it again")
    return table.take(places)
