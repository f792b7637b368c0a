"""Find the passages that already have a vector: join digests of the corpus with digests of earlier vectors, on Ray.

In: passages and earlier vectors. Out: files with the row of the earlier vector of each passage, and counts of changes.
There are three rounds of Ray tasks: exchange digests by partition, join each partition, and write the matches in the
order of the corpus. The driver holds only counts. A task holds four million rows of both sides, about 600 MB.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from readapt_ray import artifact_files
from readapt_ray.cluster.bounded_tasks import run_bounded
from readapt_ray.cluster.connection import connect
from readapt_ray.records import content_hash
from readapt_ray.retrieval.parquet_rows import ParquetRows, RowCounts, read_rows, scan_rows
from readapt_ray.retrieval.shard_plan import (
    PASSAGE_COLUMNS,
    DataShard,
    hashes_of,
    matching_rows,
    plan_shards,
)
from readapt_ray.sources.duplicates import digest
from readapt_ray.sources.exchange import partition_of, read_partition, write_partitions
from readapt_ray.storage import Location

_CHUNK_ROWS = 4_000_000
_READ_ROWS = 65_536
NUM_BINS = 4096

_CONTENT = np.dtype([("key", "<u8", 2), ("id", "<u8", 2), ("row", "<i8")])
_ID = np.dtype([("key", "<u8", 2), ("content", "<u8", 2)])
_MATCH = np.dtype([("row", "<i8"), ("earlier", "<i8")])
_EARLIER = np.dtype("<i8")
"""Match of a passage: 2 * (row of an earlier vector with the same content), plus 1 if the doc_id is the same too; -1 if
no earlier vector has its content."""


@dataclass(frozen=True)
class Changes:
    """Counts of passages by how a corpus differs from an earlier one; passages are compared by doc_id and content."""

    num_unchanged: int
    num_changed: int
    """Same doc_id, other content."""
    num_new: int
    """The doc_id has no earlier vector."""
    num_deleted: int
    """Earlier vectors whose doc_id is no longer in the corpus."""


@dataclass(frozen=True)
class Matches:
    """For each passage, the row of its earlier vector; stored in one file per `chunk_rows` passages."""

    folder: Location
    chunk_rows: int
    files: tuple[str, ...] = ()
    """Names of all files of the join."""
    ends: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """End of each earlier file: the row number after its last row."""
    is_kept: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))
    """For each earlier file, whether the new artifact shares it unchanged."""

    def rows(self, first: int, num_rows: int) -> NDArray[np.int64]:
        """Return the row of the earlier vector with the same content, of each passage; -1 for none. int64 [num_rows].

        Args:
            first: row of the first passage in the corpus.
            num_rows: number of passages from there.
        """
        return self._read(first, num_rows) >> 1

    def without_kept_vector(self, first: int, num_rows: int) -> NDArray[np.int64]:
        """Return the passages that have no vector in a kept file, as ascending positions from `first`. See `rows`.

        A passage has one if a vector there has the same doc_id and content. Call it on `Joined.with_kept_files`.
        """
        rows = self._read(first, num_rows)
        own = np.flatnonzero(_has_own(rows))
        in_kept = self.is_kept[np.searchsorted(self.ends, rows[own] >> 1, side="right")]
        return np.setdiff1d(np.arange(num_rows), own[in_kept], assume_unique=True)

    def live_rows(self, first: int, num_rows: int) -> NDArray[np.int64]:
        """Return the rows of earlier vectors with the same doc_id and content as one of these passages. See `rows`."""
        found = self._read(first, num_rows)
        rows: NDArray[np.int64] = found[_has_own(found)] >> 1
        return rows

    def passages_and_files(self, first: int, num_rows: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the passages with an earlier vector of the same doc_id and content, and the file of each vector.

        Passages are rows among all joined passages; files are numbered as in `Joined.earlier_counts`, from 0. Call it
        on `Joined.with_kept_files`.
        """
        found = self._read(first, num_rows)
        own = np.flatnonzero(_has_own(found))
        return first + own, np.searchsorted(self.ends, found[own] >> 1, side="right")

    def _read(self, first: int, num_rows: int) -> NDArray[np.int64]:
        parts = [np.empty(0, _EARLIER)]
        for chunk in range(first // self.chunk_rows, -(-(first + num_rows) // self.chunk_rows)):
            begin = chunk * self.chunk_rows
            start, end = max(first, begin), min(first + num_rows, begin + self.chunk_rows)
            with _file(self.folder, "earlier", chunk).open_input() as file:
                file.seek((start - begin) * _EARLIER.itemsize)
                parts.append(np.frombuffer(file.read((end - start) * _EARLIER.itemsize), _EARLIER))
        return np.concatenate(parts)

    def pieces(self, num_rows: int) -> Iterator[tuple[int, int]]:
        """Yield the first passage and the number of passages of each file of matches, for a corpus of `num_rows`."""
        for first in range(0, num_rows, self.chunk_rows):
            yield first, min(self.chunk_rows, num_rows - first)

    def remove(self) -> None:
        """Remove all files of the join from its folder. The matches cannot be read afterwards."""
        artifact_files.clear(self.folder, self.files)


@dataclass(frozen=True)
class Joined:
    """The result of the join: matches and counts."""

    matches: Matches
    changes: Changes
    num_to_encode: NDArray[np.int64]
    """Number of passages without an earlier vector, in each of the 4,096 parts between `bin_bounds`."""

    earlier_counts: RowCounts
    """Name and number of rows of each file of earlier vectors."""

    def is_live(self, passages: ParquetRows) -> NDArray[np.bool_]:
        """Return for each earlier vector whether a passage still has its doc_id and content, bool [earlier vectors]."""
        found = np.zeros(sum(count for _, count in self.earlier_counts), bool)
        for first, num_rows in self.matches.pieces(passages.num_rows):
            found[self.matches.live_rows(first, num_rows)] = True
        return found

    def with_kept_files(self, names: Set[str]) -> Matches:
        """Return a copy of the matches in which these earlier files (by name) are marked as kept, and no others."""
        return replace(
            self.matches,
            ends=np.cumsum([count for _, count in self.earlier_counts]),
            is_kept=np.array([name in names for name, _ in self.earlier_counts], bool),
        )


def bin_bounds(num_passages: int) -> NDArray[np.int64]:
    """Return the row bounds of 4,096 nearly equal parts of a corpus: 4,097 ascending row numbers, from 0."""
    return np.arange(NUM_BINS + 1) * num_passages // NUM_BINS


def join_digests(passages: ParquetRows, earlier: ParquetRows, folder: Location) -> Joined:
    """Find an earlier vector for each passage by content hash, in Ray tasks; one with the same doc_id is preferred.

    Args:
        passages: passages of the corpus.
        earlier: vectors of an earlier corpus.
        folder: folder for the files of the join; every node must see it. `Matches.remove` deletes them.
    """
    num_partitions = max(1, -(-max(passages.num_rows, earlier.num_rows) // _CHUNK_ROWS))
    if num_partitions == 1:
        ((counts, num_to_encode),) = _tasks(_join_whole, [(passages, earlier, folder)])
        matches = Matches(folder, _CHUNK_ROWS, (_file(folder, "earlier", 0).name,))
        return Joined(matches, Changes(**counts), num_to_encode, earlier.counts)
    sides = {"now": passages, "before": earlier}
    chunks = {side: plan_shards(rows.counts, _CHUNK_ROWS) for side, rows in sides.items()}
    splits = [(side, sides[side].folder, chunk) for side, planned in chunks.items() for chunk in planned]
    for _ in _tasks(_split, ((*split, folder, num_partitions) for split in splits)):
        pass
    num_chunks = {side: len(planned) for side, planned in chunks.items()}
    total: Counter[str] = Counter()
    joins = ((number, folder, num_partitions, num_chunks) for number in range(num_partitions))
    for found in _tasks(_join, ((*join, _CHUNK_ROWS) for join in joins)):
        total.update(found)
    num_to_encode = np.zeros(NUM_BINS, np.int64)
    ordered = ((chunk, folder, num_partitions, num_chunks["now"], passages.num_rows) for chunk in chunks["now"])
    for found in _tasks(_in_order, ordered):
        num_to_encode += found
    written = [(f"{side}-{what}", num) for side, num in num_chunks.items() for what in ("contents", "ids")]
    written += [("matches", num_partitions), ("earlier", num_chunks["now"])]
    files = tuple(_file(folder, what, number).name for what, num in written for number in range(num))
    return Joined(Matches(folder, _CHUNK_ROWS, files), Changes(**total), num_to_encode, earlier.counts)


def _tasks(function: Callable[..., Any], items: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
    import ray

    task = ray.remote(num_cpus=1)(function)
    return run_bounded(lambda item: task.remote(*item), items, max(1, connect().num_cpus))


def _join_whole(
    passages: ParquetRows, earlier: ParquetRows, folder: Location
) -> tuple[dict[str, int], NDArray[np.int64]]:
    """Join all rows in one task, without files of digests; return the counts of changes and of passages to encode."""
    (now, now_ids), (before, before_ids) = (
        _records(rows.folder, chunk)
        for rows in (passages, earlier)
        for chunk in plan_shards(rows.counts, max(1, rows.num_rows)) or [DataShard(0, 0, ())]
    )
    return _count_changes(now_ids, before_ids), _write_in_order(_matched(now, before), 0, folder, 0, passages.num_rows)


def _matched(now: NDArray[np.void], before: NDArray[np.void]) -> NDArray[np.int64]:
    """Return the match of each passage (see `_EARLIER`); prefer an earlier row with the same doc_id."""
    own = matching_rows(_both(now), _both(before))
    place = np.where(own >= 0, own, matching_rows(now["key"], before["key"]))
    rows = before["row"][place] if len(before) else place
    return np.where(place >= 0, 2 * rows + (own >= 0), -1).astype(_EARLIER)


def _has_own(matches: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return for each match whether the earlier row has the same doc_id."""
    own: NDArray[np.bool_] = (matches >= 0) & (matches & 1 == 1)
    return own


def _both(records: NDArray[np.void]) -> NDArray[np.uint64]:
    """Hash doc_id and content together, [N, 2]; zeros, which match nothing, if the content hash is missing."""
    has_content = records["key"].any(axis=1, keepdims=True)
    return np.where(has_content, records["key"] ^ records["id"], np.uint64(0))


def _split(side: str, source: Location, chunk: DataShard, folder: Location, num_partitions: int) -> None:
    """Write the digests of a chunk of rows: contents partitioned by content, ids partitioned by id."""
    contents, ids = _records(source, chunk)
    for what, records in (("contents", contents), ("ids", ids)):
        to = _file(folder, f"{side}-{what}", chunk.number)
        write_partitions(to, records, partition_of(records["key"], num_partitions), num_partitions)


def _records(source: Location, chunk: DataShard) -> tuple[NDArray[np.void], NDArray[np.void]]:
    """Return the records of a chunk of rows: one list keyed by content, one keyed by doc_id."""
    contents, ids = np.zeros(len(chunk), _CONTENT), np.zeros(len(chunk), _ID)
    contents["row"] = np.arange(chunk.first, chunk.first + len(chunk))
    done = 0
    for each in chunk.ranges:
        for start in range(each.start, each.start + each.num_rows, _READ_ROWS):
            num_rows = min(_READ_ROWS, each.start + each.num_rows - start)
            rows = slice(done, done + num_rows)
            contents["key"][rows], ids["key"][rows] = _digests(source / each.name, start, num_rows)
            done += num_rows
    ids["content"], contents["id"] = contents["key"], ids["key"]
    return contents, ids


def _digests(file: Location, start: int, num_rows: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Return the digests of contents and of doc_ids of some passages or vectors, uint64 [N, 2] each."""
    table = scan_rows(file, start, num_rows, ("doc_id", "content_hash"))
    contents = hashes_of(table)
    if "content_hash" not in table.column_names:
        texts = read_rows(file, start, num_rows, PASSAGE_COLUMNS[1:])
        if texts.column_names:  # passages of an older ingest
            pairs = zip(texts["title"].to_pylist(), texts["text"].to_pylist(), strict=True)
            packed = b"".join(content_hash(title, text or "") for title, text in pairs)
            contents = np.frombuffer(packed, np.uint64).reshape(-1, 2)
    packed = b"".join(digest(doc_id or "") for doc_id in table["doc_id"].to_pylist())
    return contents, np.frombuffer(packed, np.uint64).reshape(-1, 2)


def _join(
    number: int, folder: Location, num_partitions: int, num_chunks: dict[str, int], chunk_rows: int
) -> dict[str, int]:
    """Join one partition: write its matches, partitioned by chunk of passages, and count the changes."""

    def read(what: str, dtype: np.dtype[np.void]) -> Sequence[NDArray[np.void]]:
        return [
            read_partition(
                [_file(folder, f"{side}-{what}", chunk) for chunk in range(num)], number, num_partitions, dtype
            )
            for side, num in num_chunks.items()
        ]

    now, before = read("contents", _CONTENT)
    earlier = _matched(now, before)
    known = earlier >= 0
    matches = np.zeros(int(known.sum()), _MATCH)
    matches["row"], matches["earlier"] = now["row"][known], earlier[known]
    write_partitions(_file(folder, "matches", number), matches, matches["row"] // chunk_rows, num_chunks["now"])
    return _count_changes(*read("ids", _ID))


def _count_changes(now: NDArray[np.void], before: NDArray[np.void]) -> dict[str, int]:
    """Count the changes between two lists of ids with contents."""
    place = matching_rows(now["key"], before["key"])
    known = place >= 0
    num_known = int(known.sum())
    num_unchanged = int((now["content"][known] == before["content"][place[known]]).all(axis=1).sum())
    return {
        "num_unchanged": num_unchanged,
        "num_changed": num_known - num_unchanged,
        "num_new": len(now) - num_known,
        "num_deleted": len(before) - num_known,
    }


def _in_order(
    chunk: DataShard, folder: Location, num_partitions: int, num_chunks: int, num_passages: int
) -> NDArray[np.int64]:
    """Write the matches of a chunk in the order of its passages; count passages to encode between `bin_bounds`."""
    files = [_file(folder, "matches", number) for number in range(num_partitions)]
    matches = read_partition(files, chunk.number, num_chunks, _MATCH)
    earlier = np.full(len(chunk), -1, _EARLIER)
    earlier[matches["row"] - chunk.first] = matches["earlier"]
    return _write_in_order(earlier, chunk.number, folder, chunk.first, num_passages)


def _write_in_order(
    earlier: NDArray[np.int64], number: int, folder: Location, first: int, num_passages: int
) -> NDArray[np.int64]:
    with _file(folder, "earlier", number).open_output() as file:
        file.write(earlier.tobytes())
    to_encode = first + np.flatnonzero(earlier < 0)
    return np.diff(np.searchsorted(to_encode, bin_bounds(num_passages)))


def _file(folder: Location, what: str, number: int) -> Location:
    return folder / f"digests-{what}-{number:05d}"
