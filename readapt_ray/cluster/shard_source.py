"""Read the passages of data shards in Ray Data tasks, for embed.

In: planned shards. Out: one row per shard, with the doc_ids, content hashes, and texts (or token ids) of its passages,
and the rows of their earlier vectors if there are any. Texts that have an earlier vector are not read. A task holds one
shard in memory.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from ray.data import Datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask

from readapt_ray.cluster.embed_job import EmbedJob, or_error, shard_row
from readapt_ray.cluster.shard_tokens import tokenize_in_task
from readapt_ray.errors import CorpusError
from readapt_ray.records import content_hash
from readapt_ray.retrieval.parquet_rows import ParquetRows
from readapt_ray.retrieval.shard_plan import PASSAGE_COLUMNS, DataShard, packed_hashes
from readapt_ray.storage import Location

_MAX_READ_TASKS = 2000
_DIGEST_COLUMN = "content_hash"


class ShardSource(Datasource):  # type: ignore[misc]  # Ray's classes have no types
    """A source of Ray Data that yields each data shard as a block of one row.

    Args:
        shards: the shards to read.
        job: the embedding job.
        tokenizes: whether tasks tokenise: rows then have token ids instead of texts.
    """

    def __init__(self, shards: Sequence[DataShard], job: EmbedJob, *, tokenizes: bool) -> None:
        super().__init__()
        self._shards, self._job, self._tokenizes = shards, job, tokenizes

    def estimate_inmemory_data_size(self) -> int | None:
        """Return None: the size is unknown."""
        return None

    def get_read_tasks(self, *_: Any, **__: Any) -> list[ReadTask]:
        """Return the read tasks; shards are dealt to them in turn, so that the first shards are read first."""
        num_tasks = min(len(self._shards), _MAX_READ_TASKS)
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [
            ReadTask(functools.partial(_rows, self._shards[number::num_tasks], self._job, self._tokenizes), unknown)
            for number in range(num_tasks)
        ]


def _rows(shards: Sequence[DataShard], job: EmbedJob, tokenizes: bool) -> Iterator[pa.Table]:
    for shard in shards:
        yield or_error(shard.number, functools.partial(_row, shard, job, tokenizes))


def _row(shard: DataShard, job: EmbedJob, tokenizes: bool) -> pa.Table:
    row = _read(shard, job)
    return tokenize_in_task(row, job) if tokenizes else row


def _read(shard: DataShard, job: EmbedJob) -> pa.Table:
    """Read passages of a shard: all of them, a random draw (of a sample), or those without a vector in a kept file."""
    rows = np.arange(shard.num_rows)
    if job.matches is None or not job.rows_per_shard:
        if shard.num_drawn is not None:
            todo = rows if job.matches is None else np.flatnonzero(job.matches.rows(shard.first, shard.num_rows) < 0)
            rows = np.sort(np.random.default_rng(shard.number).choice(todo, shard.num_drawn, replace=False))
        table = _take(shard, job.passages, rows, (*PASSAGE_COLUMNS, _DIGEST_COLUMN))
        hashes = _checked_hashes(table)
        cells = {name: table[name].combine_chunks() for name in PASSAGE_COLUMNS}
        return shard_row(shard.number, **cells, hashes=pa.array(hashes.reshape(-1)))
    rows = job.matches.without_kept_vector(shard.first, shard.num_rows)
    earlier = job.matches.rows(shard.first, shard.num_rows)[rows]
    return shard_row(shard.number, **_new_texts(shard, job, rows, earlier), earlier=pa.array(earlier))


def _new_texts(
    shard: DataShard, job: EmbedJob, rows: NDArray[np.int64], earlier: NDArray[np.int64]
) -> dict[str, pa.Array]:
    """Read some passages of a shard; title and text are null if the passage has an earlier vector."""
    ids = _take(shard, job.passages, rows, ("doc_id", _DIGEST_COLUMN))
    if ids["doc_id"].null_count:
        raise CorpusError("a passage has no doc_id; ingest the corpus again")
    stored = ids[_DIGEST_COLUMN].combine_chunks() if _DIGEST_COLUMN in ids.column_names else pa.nulls(len(rows))
    wanted = np.flatnonzero((earlier < 0) | stored.is_null().to_numpy(zero_copy_only=False))
    texts = _take(shard, job.passages, rows[wanted], (*PASSAGE_COLUMNS, _DIGEST_COLUMN))
    hashes = np.frombuffer(packed_hashes(stored.to_pylist()), np.uint64).reshape(-1, 2).copy()
    place = np.full(len(rows), -1)
    place[wanted] = np.arange(len(wanted))
    cells = {"doc_id": ids["doc_id"].combine_chunks()}
    if len(wanted):
        hashes[wanted] = _checked_hashes(texts)
        where = pa.array(place, mask=place < 0)
        cells |= {name: texts[name].combine_chunks().take(where) for name in ("title", "text")}
    else:
        cells |= {name: pa.nulls(len(rows), pa.string()) for name in ("title", "text")}
    return {**cells, "hashes": pa.array(hashes.reshape(-1))}


def _take(shard: DataShard, folder: Location, rows: NDArray[np.int64], columns: Sequence[str]) -> pa.Table:
    """Read rows of a shard, numbered from its first row."""
    ends = [each.start + each.num_rows for each in shard.ranges]
    begins = itertools.accumulate(ends[:-1], initial=0)
    numbers = np.concatenate(
        [begin + each.start + np.arange(each.num_rows) for begin, each in zip(begins, shard.ranges, strict=True)]
    )
    files = ParquetRows(folder, tuple((each.name, end) for each, end in zip(shard.ranges, ends, strict=True)))
    return files.take(numbers[rows], columns)


def _checked_hashes(table: pa.Table) -> NDArray[np.uint64]:
    """Compute the content hashes of passages, uint64 [N, 2], and compare them with the stored ones.

    Raises:
        CorpusError: a passage has no doc_id or text, or was altered after it was ingested.
    """
    doc_ids, titles, texts = (table[name].to_pylist() for name in PASSAGE_COLUMNS)
    stored = table[_DIGEST_COLUMN].to_pylist() if _DIGEST_COLUMN in table.column_names else itertools.repeat(None)
    packed = bytearray()
    for doc_id, title, text, digest in zip(doc_ids, titles, texts, stored, strict=False):
        if doc_id is None or text is None:
            raise CorpusError(f"passage {doc_id!r} has no doc_id or text; ingest the corpus again")
        found = content_hash(title, text)
        if digest is not None and digest != found:
            raise CorpusError(f"passage {doc_id!r} was altered after it was ingested; ingest the corpus again")
        packed += found
    return np.frombuffer(bytes(packed), np.uint64).reshape(-1, 2)
