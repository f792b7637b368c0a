"""Data shards: which passages are encoded as one unit of work, planned from the sizes of files alone.

Enters: name and number of rows of each passages file. Leaves: shards, each a range of consecutive rows. No passage is
read for the plan, so it takes seconds and memory of some 460 bytes per shard at any size of corpus.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from readapt_ray.retrieval.parquet_rows import read_rows
from readapt_ray.retrieval.vector_files import RowRange, cut
from readapt_ray.storage import Location

PASSAGE_COLUMNS = ("doc_id", "title", "text")
_READ_ROWS = 65536
_HASH_BYTES = 16


@dataclass(frozen=True)
class Contents:
    """What identifies the rows of a corpus, or of its vectors."""

    ids: NDArray[np.int64]
    """[N], of the doc_ids; comparable within one process."""
    hashes: NDArray[np.uint64]
    """[N, 2], of title and text."""

    def __len__(self) -> int:
        """Rows."""
        return len(self.ids)


@dataclass(frozen=True)
class DataShard:
    """A numbered range of the corpus, the unit of work and of commit; rows are in the order of the corpus."""

    number: int
    first: int
    """Number of its first row in the corpus."""
    ranges: tuple[RowRange, ...]
    """The same rows by file."""
    num_drawn: int | None = None
    """How many of the rows are encoded, drawn at random; None for all of them. For samples."""

    @property
    def name(self) -> str:
        """Name of the file of its vectors."""
        return shard_name(self.number)

    @property
    def num_rows(self) -> int:
        """Return the rows of its range."""
        return sum(each.num_rows for each in self.ranges)

    def __len__(self) -> int:
        """Return passages that it has vectors of."""
        return self.num_rows if self.num_drawn is None else self.num_drawn


def shard_name(number: int) -> str:
    """Return the name of the file of a shard's vectors."""
    return f"part-{number:05d}.parquet"


def plan_shards(counts: Sequence[tuple[str, int]], rows_per_shard: int) -> list[DataShard]:
    """Cut the rows of files into shards of equal size, the last one smaller."""
    return [
        DataShard(number, number * rows_per_shard, tuple(ranges))
        for number, ranges in enumerate(cut(counts, rows_per_shard))
    ]


def plan_shards_like(
    counts: Sequence[tuple[str, int]],
    rows_per_shard: int,
    earlier_counts: Sequence[tuple[str, int]],
    earlier_rows: Iterable[NDArray[np.int64]],
) -> list[DataShard]:
    """Cut the rows of files where the files of earlier vectors end, so that vectors of unchanged passages can be kept whole.

    A shard has the rows of an earlier file with what was added there, half as many again at most, and half at least.

    Args:
        counts: of the passages.
        rows_per_shard: as for `plan_shards`.
        earlier_counts: of the earlier vectors.
        earlier_rows: for all passages in their order, in pieces, the row of the earlier vector; -1 where there is none.
    """
    ends = np.cumsum([count for _, count in earlier_counts])
    largest = max((count for _, count in earlier_counts), default=0)
    most = max(2, largest if rows_per_shard < largest <= 2 * rows_per_shard else rows_per_shard)
    cuts, first, file_before = [0], 0, np.int64(-1)
    for rows in earlier_rows:
        known = np.flatnonzero(rows >= 0)
        files = np.searchsorted(ends, rows[known], side="right")
        changes = first + known[files != np.concatenate([[file_before], files[:-1]])]
        first, file_before = first + len(rows), files[-1] if len(files) else file_before
        while True:
            place = np.searchsorted(changes, cuts[-1] + most // 2)
            if place < len(changes) and changes[place] <= cuts[-1] + 3 * most // 2:
                cuts.append(int(changes[place]))
            elif cuts[-1] + 3 * most // 2 < first:
                cuts.append(cuts[-1] + most)
            else:
                break
    bounds = zip(cuts, [*cuts[1:], first], strict=True)
    return [
        DataShard(number, start, tuple(ranges_between(counts, start, end)))
        for number, (start, end) in enumerate(bounds)
    ]


def ranges_between(counts: Sequence[tuple[str, int]], first: int, last: int) -> Iterator[RowRange]:
    """Return rows `first` to `last` of all files, by file."""
    begin = 0
    for name, num_rows in counts:
        start, end = max(first, begin), min(last, begin + num_rows)
        if start < end:
            yield RowRange(name, start - begin, end - start)
        begin += num_rows


def scan_vectors(folder: Location, counts: Sequence[tuple[str, int]]) -> Contents:
    """Return which passages have vectors; a file that does not say has none that can be used again."""
    ids: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
    hashes = [b""]
    for name, count in counts:
        for start in range(0, count, _READ_ROWS):
            table = read_rows(folder / name, start, min(_READ_ROWS, count - start), ("doc_id", "content_hash"))
            ids.append(np.fromiter(map(hash, table["doc_id"].to_pylist()), np.int64, table.num_rows))
            hashes.append(hashes_of(table).tobytes())
    return Contents(np.concatenate(ids), np.frombuffer(b"".join(hashes), np.uint64).reshape(-1, 2))


def hashes_of(table: pa.Table) -> NDArray[np.uint64]:
    """Return the content hashes of rows, [N, 2]; zeros, which match nothing, where there are none."""
    if "content_hash" not in table.column_names:
        return np.zeros((table.num_rows, 2), np.uint64)
    digests = table["content_hash"].to_pylist()
    return np.frombuffer(packed_hashes(digests), np.uint64).reshape(-1, 2)


def packed_hashes(digests: Iterable[bytes | None]) -> bytes:
    """Concatenate content hashes; zeros, which match nothing, if there is none."""
    return b"".join(digest or bytes(_HASH_BYTES) for digest in digests)


def first_rows(hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return for each row the first row of the same content, [N]."""
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))
    ordered = hashes[order]
    begins = np.ones(len(order), bool)
    begins[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    groups = np.cumsum(begins) - 1
    first = np.empty(len(order), np.int64)
    first[order] = order[begins][groups]  # lexsort is stable, so a group begins with its first row
    return first


def matching_rows(hashes: NDArray[np.uint64], there: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return for each row a row of `there` of the same content, or -1: [N]."""
    first = first_rows(np.concatenate([there, hashes]))[len(there) :]
    known = (first < len(there)) & there[np.minimum(first, len(there) - 1)].any(axis=1) if len(there) else first < 0
    return np.where(known, first, -1)
