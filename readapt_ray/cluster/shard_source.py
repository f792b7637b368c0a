"""Where the passages of embed enter Ray Data: read tasks yield data shards, and tokenise them.

In: planned shards. Out: a row per shard, with the doc_ids, content hashes and token ids of its passages; a text that
stands twice in a shard is tokenised once. Both run on any node that has an idle core. A core tokenises some 15,000
passages of 100 tokens a second; memory of a task is one shard.
"""

import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from ray.data import Datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask

from readapt_ray import errors
from readapt_ray.catalog.encoding import Encoding
from readapt_ray.catalog.models import open_model
from readapt_ray.cluster import on_worker
from readapt_ray.cluster.shard_encoder import EmbedJob, cell
from readapt_ray.errors import CorpusError
from readapt_ray.retrieval.parquet_rows import ParquetRows
from readapt_ray.retrieval.shard_plan import PASSAGE_COLUMNS, DataShard, content_hash, first_rows
from readapt_ray.storage import Location

logger = logging.getLogger("readapt_ray")

_MAX_READ_TASKS = 2000
_DIGEST_COLUMN = "content_hash"


class ShardSource(Datasource):  # type: ignore[misc]  # Ray's classes have no types
    """The shards of a run as a source of Ray Data: a block of one row per shard."""

    def __init__(self, shards: Sequence[DataShard], job: EmbedJob) -> None:
        super().__init__()
        self._shards, self._job = shards, job

    def estimate_inmemory_data_size(self) -> int | None:
        """Return nothing: blocks are one row each however large they are."""
        return None

    def get_read_tasks(self, *_: Any, **__: Any) -> list[ReadTask]:
        """Return tasks that have a share of the shards each, in turn, so that the first shards are read first."""
        num_tasks = min(len(self._shards), _MAX_READ_TASKS)
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [
            ReadTask(functools.partial(_read_shards, self._shards[number::num_tasks], self._job), unknown)
            for number in range(num_tasks)
        ]


def _read_shards(shards: Sequence[DataShard], job: EmbedJob) -> Iterator[pa.Table]:
    for shard in shards:
        yield _or_error(shard.number, functools.partial(_read, shard, job))


def tokenize_shard(shard: pa.Table, job: EmbedJob) -> pa.Table:
    """Return the row of a shard with token ids in place of texts."""
    if shard["error"][0].as_py():
        return shard
    return _or_error(shard["number"][0].as_py(), functools.partial(_tokenized, shard, job))


def _or_error(number: int, make: Callable[[], pa.Table]) -> pa.Table:
    """Hand an error on as a row: raised here, Ray Data would bury its message in stack traces."""
    try:
        return make()
    except errors.ReadaptError as error:
        return _row(number, error=type(error).__name__, message=str(error))
    except Exception as error:
        logger.exception("data shard %d failed", number)
        message = f"data shard {number}: {type(error).__name__}: {error}"
        return _row(number, error=errors.WorkerError.__name__, message=message)


def _row(number: int, *, error: str = "", message: str = "", **cells: pa.Array) -> pa.Table:
    """A table of one row, in which each array is one cell."""
    return pa.table(
        {
            "number": [number],
            "error": [error],
            "message": [message],
            **{name: one_cell(array) for name, array in cells.items()},
        }
    )


def one_cell(array: pa.Array) -> pa.LargeListArray:
    """Put an array into a single cell; nothing is copied."""
    return pa.LargeListArray.from_arrays(pa.array([0, len(array)], pa.int64()), array)


def _read(shard: DataShard, job: EmbedJob) -> pa.Table:
    """Read the passages of a shard; a sample draws some of those that have no vector yet."""
    earlier = job.matches.rows(shard.first, shard.num_rows) if job.matches else None
    rows = np.arange(shard.num_rows)
    if shard.num_drawn is not None:
        todo = rows if earlier is None else np.flatnonzero(earlier < 0)
        rows = np.sort(np.random.default_rng(shard.number).choice(todo, shard.num_drawn, replace=False))
    table = _take(shard, job.passages, rows, (*PASSAGE_COLUMNS, _DIGEST_COLUMN))
    hashes = _checked_hashes(table)
    cells = {name: table[name].combine_chunks() for name in PASSAGE_COLUMNS}
    cells["hashes"] = pa.array(hashes.reshape(-1))
    if earlier is not None and shard.num_drawn is None:
        cells["earlier"] = pa.array(earlier)
    return _row(shard.number, **cells)


def _take(shard: DataShard, folder: Location, rows: NDArray[np.int64], columns: Sequence[str]) -> pa.Table:
    """Read rows of a shard, numbered from its first one."""
    ends = [each.start + each.num_rows for each in shard.ranges]
    begins = itertools.accumulate(ends[:-1], initial=0)
    numbers = np.concatenate(
        [begin + each.start + np.arange(each.num_rows) for begin, each in zip(begins, shard.ranges, strict=True)]
    )
    files = ParquetRows(folder, tuple((each.name, end) for each, end in zip(shard.ranges, ends, strict=True)))
    return files.take(numbers[rows], columns)


def _checked_hashes(table: pa.Table) -> NDArray[np.uint64]:
    """Return the content hashes of passages, [N, 2].

    Raises:
        CorpusError: a passage has no doc_id or text, or is not the one that was ingested.
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


def _tokenized(shard: pa.Table, job: EmbedJob) -> pa.Table:
    """Tokenise the distinct texts of a shard that have no vector yet."""
    hashes = cell(shard, "hashes").to_numpy().reshape(-1, 2)
    first = first_rows(hashes)
    earlier = cell(shard, "earlier").to_numpy() if "earlier" in shard.column_names else np.full(len(first), -1)
    fresh = np.unique(first[earlier[first] < 0])
    texts, titles, doc_ids = (cell(shard, name).take(pa.array(fresh)) for name in ("text", "title", "doc_id"))
    tokenizer = _tokenizer(job.model_name, job.encoding.model_dump_json(), job.tokenizer, job.driver_node)
    ids = tokenizer.ids(texts.to_pylist(), "passage", [title or "" for title in titles.to_pylist()])
    lengths = np.fromiter(map(len, ids), np.int32, len(ids))
    if len(lengths) and not lengths.all():
        doc_id = doc_ids[int(np.flatnonzero(lengths == 0)[0])].as_py()
        raise CorpusError(f"passage {doc_id!r} gives no token, so it has no vector; leave it out of the corpus")
    tokens = np.fromiter(itertools.chain.from_iterable(ids), np.int32, int(lengths.sum()))
    # A row takes the vector of a distinct text by its place, or the earlier vector in row e, written as -1 - e.
    vector = np.where(earlier[first] < 0, np.searchsorted(fresh, first), -1 - earlier[first])
    cells = {"doc_id": cell(shard, "doc_id"), "hashes": cell(shard, "hashes"), "vector": pa.array(vector)}
    cells |= {"lengths": pa.array(lengths), "tokens": pa.array(tokens)}
    return _row(shard["number"][0].as_py(), **cells)


@functools.lru_cache(maxsize=2)
def _tokenizer(model_name: str, encoding: str, due: str, driver_node: str) -> Any:
    """The tokenizer of this process, seen to be the driver's; weights are not fetched."""
    from readapt_ray.retrieval.tokenization import TextTokenizer

    model = open_model(model_name, with_weights=False)
    on_worker.check_same_model(model_name, lambda: model.tokenizer_fingerprint, {due}, driver_node=driver_node)
    return TextTokenizer(model.tokenizer, Encoding.model_validate_json(encoding))
