"""Which passages have a vector already: digests of the corpus and of earlier vectors, joined on the cluster.

In: passages and earlier vectors. Out: files that say for each passage of known content which earlier row has its vector,
and counts of what changed. Tasks cut the digests into partitions by their first bits, then each partition is joined by
a task of its own; the driver sees counts alone. A task holds four million rows of either side, some 600 MB.
"""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from readapt_ray.cluster.bounded_tasks import run_bounded
from readapt_ray.cluster.connection import connect
from readapt_ray.retrieval.footers import at_once
from readapt_ray.retrieval.parquet_rows import ParquetRows, read_rows
from readapt_ray.retrieval.shard_plan import (
    PASSAGE_COLUMNS,
    DataShard,
    content_hash,
    hashes_of,
    matching_rows,
    plan_shards,
)
from readapt_ray.storage import Location

_CHUNK_ROWS = 4_000_000
_READ_ROWS = 65_536
_MATCH_GROUP_ROWS = 65_536
NUM_BINS = 4096


@dataclass(frozen=True)
class Changes:
    """How a corpus differs from an earlier one."""

    num_unchanged: int
    num_changed: int
    num_new: int
    num_deleted: int


@dataclass(frozen=True)
class Matches:
    """Earlier vectors of the passages, in files of their own."""

    folder: Location
    num_partitions: int

    def rows(self, first: int, num_rows: int) -> NDArray[np.int64]:
        """Return for each passage from `first` on the earlier row that has its vector; -1 where there is none."""
        earlier = np.full(num_rows, -1, np.int64)
        wanted = [("row", ">=", first), ("row", "<", first + num_rows)]

        def read(partition: int) -> pa.Table:
            with (self.folder / _match_name(partition)).open_input() as stream:
                return pq.read_table(stream, filters=wanted)

        for table in at_once(read, range(self.num_partitions)):
            earlier[table["row"].to_numpy() - first] = table["earlier"].to_numpy()
        return earlier

    def remove(self) -> None:
        """Remove the files."""
        at_once(lambda file: file.delete(), self.folder.files(".parquet"))


@dataclass(frozen=True)
class Joined:
    """What the join found."""

    matches: Matches
    changes: Changes
    num_to_encode: NDArray[np.int64]
    """Passages without an earlier vector in each of 4,096 equal parts of the corpus."""


def join_digests(passages: ParquetRows, earlier: ParquetRows, folder: Location) -> Joined:
    """Join the contents of passages and earlier vectors.

    Args:
        passages: of the corpus.
        earlier: vectors of an earlier corpus.
        folder: where the files go; every node sees it.
    """
    import ray

    slots = max(1, connect().num_cpus)
    num_partitions = -(-max(passages.num_rows, earlier.num_rows, 1) // _CHUNK_ROWS)
    split = ray.remote(num_cpus=1)(_split)
    sides = {"now": passages, "before": earlier}
    chunks = [(side, chunk) for side, rows in sides.items() for chunk in plan_shards(rows.counts, _CHUNK_ROWS)]

    def start_split(item: tuple[str, DataShard]) -> Any:
        side, chunk = item
        return split.remote(side, sides[side].folder, chunk, folder, num_partitions)

    for _ in run_bounded(start_split, chunks, slots):
        pass
    join = ray.remote(num_cpus=1)(_join)
    numbers = {side: [chunk.number for each, chunk in chunks if each == side] for side in sides}

    def start_join(partition: int) -> Any:
        return join.remote(partition, numbers, folder, passages.num_rows)

    counts = dict.fromkeys(asdict(Changes(0, 0, 0, 0)), 0)
    bins = np.zeros(NUM_BINS, np.int64)
    for found, part in run_bounded(start_join, range(num_partitions), slots):
        counts = {name: count + found[name] for name, count in counts.items()}
        bins += part
    return Joined(Matches(folder, num_partitions), Changes(**counts), bins)


def _split(side: str, source: Location, chunk: DataShard, folder: Location, num_partitions: int) -> None:
    """Write the digests of some rows by the partition of their content, and those of their ids by that of the id."""
    hashes, ids = [], []
    for each in chunk.ranges:
        for start in range(each.start, each.start + each.num_rows, _READ_ROWS):
            num_rows = min(_READ_ROWS, each.start + each.num_rows - start)
            found = _digests(source / each.name, start, num_rows, of_passages=side == "now")
            hashes.append(found[0])
            ids.append(found[1])
    content, named = np.concatenate(hashes), np.concatenate(ids)
    rows = np.arange(chunk.first, chunk.first + len(content))
    _write_parts(folder / f"{side}-content-{chunk.number:05d}.parquet", content, {"row": rows}, num_partitions)
    values = {"content_0": content[:, 0], "content_1": content[:, 1]}
    _write_parts(folder / f"{side}-ids-{chunk.number:05d}.parquet", named, values, num_partitions)


def _digests(file: Location, start: int, num_rows: int, *, of_passages: bool) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the digests of the contents and of the doc_ids of some rows, [N, 2] each."""
    table = read_rows(file, start, num_rows, ("doc_id", "content_hash"))
    doc_ids = table["doc_id"].to_pylist()
    if of_passages and "content_hash" not in table.column_names:
        texts = read_rows(file, start, num_rows, PASSAGE_COLUMNS[1:])
        pairs = zip(texts["title"].to_pylist(), texts["text"].to_pylist(), strict=True)
        packed = b"".join(content_hash(title, text or "") for title, text in pairs)
        contents = np.frombuffer(packed, np.uint64).reshape(-1, 2)
    else:
        contents = hashes_of(table)
    packed = b"".join(hashlib.blake2b((each or "").encode(), digest_size=16).digest() for each in doc_ids)
    return contents, np.frombuffer(packed, np.uint64).reshape(-1, 2)


def _write_parts(file: Location, keys: NDArray[Any], values: dict[str, NDArray[Any]], num_partitions: int) -> None:
    """Write one row group per partition; a key's partition follows from its first bits."""
    partition = ((keys[:, 0] >> np.uint64(32)) * np.uint64(num_partitions)) >> np.uint64(32)
    order = np.argsort(partition, kind="stable")
    ends = np.searchsorted(partition[order], np.arange(num_partitions + 1))
    table = pa.table({"key_0": keys[order, 0], "key_1": keys[order, 1], **{k: v[order] for k, v in values.items()}})
    with (
        file.open_output() as stream,
        pq.ParquetWriter(stream, table.schema, use_dictionary=False, compression="none") as writer,
    ):
        for start, end in itertools.pairwise(ends.tolist()):
            writer.write_table(table.slice(start, end - start), row_group_size=max(1, end - start))


def _read_parts(folder: Location, side: str, what: str, numbers: Sequence[int], partition: int) -> pa.Table:
    def read(number: int) -> pa.Table:
        with (folder / f"{side}-{what}-{number:05d}.parquet").open_input() as stream, pq.ParquetFile(stream) as file:
            return file.read_row_group(partition)

    return pa.concat_tables(at_once(read, numbers))


def _join(
    partition: int, numbers: dict[str, list[int]], folder: Location, num_passages: int
) -> tuple[dict[str, int], NDArray[np.int64]]:
    """Join one partition: write its matches, and return the changes and the passages to encode by part of the corpus."""
    now, before = (_read_parts(folder, side, "content", numbers[side], partition) for side in ("now", "before"))
    place = matching_rows(_pairs(now, "key"), _pairs(before, "key"))
    rows, known = now["row"].to_numpy(), place >= 0
    matched, order = rows[known], np.argsort(rows[known])
    earlier = before["row"].to_numpy()[place[known]]
    with (folder / _match_name(partition)).open_output() as stream:
        pq.write_table(
            pa.table({"row": matched[order], "earlier": earlier[order]}), stream, row_group_size=_MATCH_GROUP_ROWS
        )
    bins = np.bincount(rows[~known] * NUM_BINS // num_passages, minlength=NUM_BINS)
    now, before = (_read_parts(folder, side, "ids", numbers[side], partition) for side in ("now", "before"))
    place = matching_rows(_pairs(now, "key"), _pairs(before, "key"))
    known = place >= 0
    same = (_pairs(now, "content")[known] == _pairs(before, "content")[place[known]]).all(axis=1).sum()
    counts = {"num_unchanged": int(same), "num_changed": int(known.sum() - same)}
    return counts | {"num_new": int((~known).sum()), "num_deleted": before.num_rows - int(known.sum())}, bins


def _pairs(table: pa.Table, name: str) -> NDArray[Any]:
    return np.stack([table[f"{name}_0"].to_numpy(), table[f"{name}_1"].to_numpy()], axis=1)


def _match_name(partition: int) -> str:
    return f"matches-{partition:05d}.parquet"
