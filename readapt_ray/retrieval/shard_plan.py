"""Plan data shards: cut a corpus into ranges of rows that are encoded as one unit of work.

In: name and number of rows of each passages file. Out: shards, each a range of consecutive rows. The plan reads no
passage, so it takes seconds at any size of corpus, and some 460 bytes of memory per shard.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from readapt_ray.dead_rows import MAX_DEAD, partly_name
from readapt_ray.retrieval.parquet_rows import scan_rows
from readapt_ray.retrieval.vector_files import RowRange, cut_into_shards
from readapt_ray.storage import Location

PASSAGE_COLUMNS = ("doc_id", "title", "text")
_READ_ROWS = 65536
_HASH_BYTES = 16
_LEAST_ROWS = 4096
_MOST_SMALL = 32


@dataclass(frozen=True)
class Contents:
    """Hashes of doc_id and content of each row of a corpus, or of its vectors."""

    ids: NDArray[np.int64]
    """[N], Python hashes of the doc_ids; comparable only within one process."""
    hashes: NDArray[np.uint64]
    """[N, 2], content hashes of title and text, 16 bytes each; zeros if unknown."""

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.ids)


@dataclass(frozen=True)
class KeptFile:
    """A file of earlier vectors that the new artifact shares, without writing it again."""

    name: str
    num_bytes: int
    num_rows: int
    """Live rows."""
    num_dead: int
    """All dead rows: those of the earlier artifact, and `dead`."""
    dead: NDArray[np.int64]
    """Rows that become dead now: their numbers among the rows that were live in the earlier artifact."""


@dataclass(frozen=True)
class DataShard:
    """A numbered range of rows of the corpus, whose vectors are computed as one task and written as one file."""

    number: int
    first: int
    """Row number, in the corpus, of its first row."""
    ranges: tuple[RowRange, ...]
    """Its rows, by file; in the order of the corpus."""
    num_drawn: int | None = None
    """How many of the rows get a vector; None for all. In a sample they are drawn at random; otherwise they are those
    without a vector in a kept file."""
    kept: KeptFile | None = None
    """The earlier file that it shares; `ranges` is empty then. None for a shard that is encoded."""
    sources: tuple[str, ...] = ()
    """Digests of the parts of the corpus that hold its passages; empty if unknown."""

    @property
    def name(self) -> str:
        """Return the file name of its vectors: part-00007.parquet, or part-00007-partly.parquet with dead rows."""
        name = shard_name(self.number)
        return partly_name(name) if self.kept and self.kept.num_dead else name

    @property
    def num_rows(self) -> int:
        """Return the number of rows in its ranges; 0 if it shares an earlier file."""
        return sum(each.num_rows for each in self.ranges)

    def __len__(self) -> int:
        """Return how many passages get a vector, in this file or in the earlier file that it shares."""
        if self.kept:
            return self.kept.num_rows
        return self.num_rows if self.num_drawn is None else self.num_drawn


def shard_name(number: int) -> str:
    """Return the file name of a shard's vectors, such as part-00007.parquet.

    A file with dead rows has the name `partly_name` of this one.
    """
    return f"part-{number:05d}.parquet"


def plan_shards(counts: Sequence[tuple[str, int]], rows_per_shard: int) -> list[DataShard]:
    """Cut the rows of a corpus into shards of `rows_per_shard` rows; only the last shard of the corpus may be smaller.

    A shard may span files.

    Args:
        counts: name and number of rows of each file, in the order of the corpus.
        rows_per_shard: at least 1.
    """
    return [
        DataShard(number, number * rows_per_shard, tuple(ranges))
        for number, ranges in enumerate(cut_into_shards(counts, rows_per_shard))
    ]


def files_to_keep(
    counts: Sequence[tuple[str, int]],
    known: Mapping[str, Mapping[str, int]],
    lives: NDArray[np.bool_],
    rows_per_shard: int,
) -> list[KeptFile]:
    """Choose the files of earlier vectors to share, and find their dead rows.

    A file is not kept if none of its rows live, or if more than MAX_DEAD (a fifth) are dead; its live rows are then
    written again. If more files would be kept than twice what a fresh run writes plus 32, the smaller half is not kept,
    so that small files do not accumulate.

    Args:
        counts: name and number of live rows of each earlier file.
        known: counts of each earlier file in its ledger. A file that is missing there, or that has passages without a
            usable vector, is not kept.
        lives: for each earlier row, whether the corpus still has a passage with its doc_id and content.
        rows_per_shard: passages per shard of a fresh run.
    """
    kept, first = [], 0
    for name, count in counts:
        dead = np.flatnonzero(~lives[first : first + count])
        first += count
        figures = known.get(name)
        if figures is None or figures["num_left_out"] or len(dead) == count:
            continue
        num_dead = figures["num_dead"] + len(dead)
        if num_dead <= MAX_DEAD * (figures["num_dead"] + count):
            kept.append(KeptFile(name, figures["num_bytes"], count - len(dead), num_dead, dead))
    if len(kept) > _MOST_SMALL + 2 * len(lives) // rows_per_shard:
        least = sorted(each.num_rows for each in kept)[len(kept) // 2]
        kept = [each for each in kept if each.num_rows > least]
    return kept


def plan_rest(
    counts: Sequence[tuple[str, int]],
    rows_per_shard: int,
    left: Iterable[tuple[int, NDArray[np.int64]]],
    *,
    number: int,
) -> list[DataShard]:
    """Cut the passages without a vector in a kept file into shards of at most `rows_per_shard` passages.

    A shard has an eighth of these passages, so that several workers have work, but at least 4,096 and at most
    `rows_per_shard`. The last shard may be smaller.

    Args:
        counts: name and number of rows of each passages file.
        rows_per_shard: most passages per shard.
        left: pairs in the order of the corpus: the first row of a piece (a range of rows of the corpus), and its rows
            without a vector, rising, counted from that row.
        number: number of the first shard.
    """
    rows = np.concatenate([np.zeros(0, np.int64), *(first + places for first, places in left)])
    size = min(rows_per_shard, max(_LEAST_ROWS, -(-len(rows) // 8)))
    shards: list[DataShard] = []
    for begin in range(0, len(rows), size):
        part = rows[begin : begin + size]
        first, last = int(part[0]), int(part[-1]) + 1
        shards.append(DataShard(number + len(shards), first, tuple(ranges_between(counts, first, last)), len(part)))
    return shards


def plan_fingerprint(shards: Iterable[DataShard], earlier: str) -> str:
    """Return a fingerprint of a plan that reuses earlier vectors: the file or the passages of each shard.

    Args:
        shards: all shards of the plan.
        earlier: fingerprint of the earlier vectors.
    """
    found = hashlib.blake2b(earlier.encode(), digest_size=16)
    for each in shards:
        found.update(repr((each.name, each.first, each.ranges, each.num_drawn)).encode())
        if each.kept:
            found.update(repr((each.kept.name, each.kept.num_bytes, each.kept.num_rows)).encode())
            found.update(each.kept.dead.tobytes())
    return found.hexdigest()


def ranges_between(counts: Sequence[tuple[str, int]], first: int, last: int) -> Iterator[RowRange]:
    """Yield rows `first` to `last` (exclusive), numbered over all files, as one range per file, in order."""
    begin = 0
    for name, num_rows in counts:
        start, end = max(first, begin), min(last, begin + num_rows)
        if start < end:
            yield RowRange(name, start - begin, end - start)
        begin += num_rows


def scan_vectors(folder: Location, counts: Sequence[tuple[str, int]]) -> Contents:
    """Read doc_id and content hash of each vector. A file without content hashes gives zeros, which match nothing.

    Args:
        folder: the folder of the vectors.
        counts: name and number of live rows of each file to read.

    Raises:
        CorruptFileError: a file was cut short or altered, is gone, or has fewer rows.
    """
    ids: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
    hashes = [b""]
    for name, count in counts:
        for start in range(0, count, _READ_ROWS):
            table = scan_rows(folder / name, start, min(_READ_ROWS, count - start), ("doc_id", "content_hash"))
            ids.append(np.fromiter(map(hash, table["doc_id"].to_pylist()), np.int64, table.num_rows))
            hashes.append(hashes_of(table).tobytes())
    return Contents(np.concatenate(ids), np.frombuffer(b"".join(hashes), np.uint64).reshape(-1, 2))


def hashes_of(table: pa.Table) -> NDArray[np.uint64]:
    """Return the content hashes of rows, uint64 [N, 2]; a row without a hash gets zeros, which match nothing.

    Args:
        table: may have the column content_hash (16 bytes each); without it all rows get zeros.
    """
    if "content_hash" not in table.column_names:
        return np.zeros((table.num_rows, 2), np.uint64)
    column = table["content_hash"]
    if column.null_count or column.type != pa.binary(_HASH_BYTES):
        return np.frombuffer(packed_hashes(column.to_pylist()), np.uint64).reshape(-1, 2)
    chunks = [
        np.frombuffer(each.buffers()[1], np.uint64, 2 * len(each), _HASH_BYTES * each.offset)
        for each in column.chunks
        if len(each)
    ]
    return np.concatenate([np.empty(0, np.uint64), *chunks]).reshape(-1, 2)


def packed_hashes(digests: Iterable[bytes | None]) -> bytes:
    """Concatenate content hashes, 16 bytes each; None becomes zeros, which match nothing."""
    return b"".join(digest or bytes(_HASH_BYTES) for digest in digests)


def first_rows(hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return for each row the first row with the same content hash (itself, if none is earlier): int64 [N].

    Unknown hashes, which are zeros, count as equal here.

    Args:
        hashes: [N, 2], as in `Contents`.
    """
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))
    ordered = hashes[order]
    begins = np.ones(len(order), bool)
    begins[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    groups = np.cumsum(begins) - 1
    first = np.empty(len(order), np.int64)
    first[order] = order[begins][groups]  # lexsort is stable, so a group begins with its first row
    return first


def matching_rows(hashes: NDArray[np.uint64], there: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return for each row the first row of `there` with the same content hash, or -1: int64 [N].

    Unknown hashes, which are zeros, match nothing. Both arguments are as `Contents.hashes`.
    """
    first = first_rows(np.concatenate([there, hashes]))[len(there) :]
    known = (first < len(there)) & there[np.minimum(first, len(there) - 1)].any(axis=1) if len(there) else first < 0
    return np.where(known, first, -1)
