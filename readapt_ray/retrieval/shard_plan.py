"""What must be encoded, and where each passage goes: decided before any model is loaded.

Enters: the passages of a corpus, and the vectors of an earlier one where there are any. Leaves: data shards
of row numbers, in which a text that stands more than once is encoded once, and a text that was encoded
before is copied. It reads the corpus once (some 300,000 passages a second on one core) and keeps 48 bytes
a passage.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from readapt_ray.errors import CorpusError
from readapt_ray.records import content_hash
from readapt_ray.retrieval.parquet_rows import read_rows
from readapt_ray.storage import Location

PASSAGE_COLUMNS = ("doc_id", "title", "text")
_READ_ROWS = 16384
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
    """A numbered piece of the corpus, the unit of work and of commit; rows stand in the order of the corpus."""

    number: int
    rows: NDArray[np.int64]
    """Row numbers of its passages in the corpus."""
    representatives: NDArray[np.int64]
    """For each row, the index in `rows` of the row whose vector it shares (itself unless its text is a duplicate)."""
    earlier: NDArray[np.int64]
    """For each row that of an earlier vector of the same content; -1 where there is none."""
    hashes: NDArray[np.uint64]
    """[N, 2], the content of each row when the shard was planned."""

    @property
    def name(self) -> str:
        """Name of the file of its vectors."""
        return f"part-{self.number:05d}.parquet"

    def __len__(self) -> int:
        """Passages in it."""
        return len(self.rows)


@dataclass(frozen=True)
class Changes:
    """How a corpus differs from an earlier one."""

    num_unchanged: int
    num_changed: int
    num_new: int
    num_deleted: int


def scan_passages(folder: Location, counts: Sequence[tuple[str, int]]) -> Contents:
    """Read a corpus once.

    Raises:
        CorpusError: a passage has no doc_id or text, or a doc_id stands twice.
        CorruptFileError: a file was cut short or altered.
    """
    ids = array("q")  # 8 bytes a row, where a list has 40
    hashes = bytearray()
    for name, columns in _columns(folder, counts, PASSAGE_COLUMNS):
        for doc_id, title, text in zip(*columns, strict=True):
            if doc_id is None or text is None:
                raise CorpusError(
                    f"passage {doc_id!r} in {folder / name} has no doc_id or text; ingest the corpus again"
                )
            ids.append(hash(doc_id))
            hashes += content_hash(title, text)
    contents = _contents(ids, hashes)
    _check_unique_ids(contents.ids, folder, counts)
    return contents


def scan_vectors(folder: Location, counts: Sequence[tuple[str, int]]) -> Contents:
    """Which passages have vectors; a file that does not say has none that can be used again."""
    ids = array("q")
    hashes = bytearray()
    for _, columns in _columns(folder, counts, ("doc_id", "content_hash")):
        ids.extend(map(hash, columns[0]))
        digests = columns[1] if len(columns) > 1 else [None] * len(columns[0])
        hashes += packed_hashes(digests)
    return _contents(ids, hashes)


def _contents(ids: "array[int]", hashes: bytearray) -> Contents:
    return Contents(np.frombuffer(ids, np.int64), np.frombuffer(hashes, np.uint64).reshape(-1, 2))


def packed_hashes(digests: Iterable[bytes | None]) -> bytes:
    """Content hashes end to end; zeros, which match nothing, where there is none."""
    return b"".join(digest or bytes(_HASH_BYTES) for digest in digests)


def _columns(
    folder: Location, counts: Sequence[tuple[str, int]], columns: Sequence[str]
) -> Iterator[tuple[str, list[list[Any]]]]:
    for name, count in counts:
        for start in range(0, count, _READ_ROWS):
            table = read_rows(folder / name, start, min(_READ_ROWS, count - start), columns)
            yield name, [column.to_pylist() for column in table.columns]


def _check_unique_ids(ids: NDArray[np.int64], folder: Location, counts: Sequence[tuple[str, int]]) -> None:
    ordered = np.sort(ids)
    suspects = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    seen: dict[str, str] = {}
    for name, columns in _columns(folder, counts, ("doc_id",)) if suspects else ():
        for doc_id in columns[0]:
            if doc_id is not None and hash(doc_id) in suspects:
                if doc_id in seen:
                    raise CorpusError(
                        f"doc_id {doc_id!r} stands in {seen[doc_id]} and again in {name} of {folder}; ingest the corpus again"
                    )
                seen[doc_id] = name


def first_rows(hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
    """For each row the first row of the same content, [N]."""
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))
    ordered = hashes[order]
    begins = np.ones(len(order), bool)
    begins[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    groups = np.cumsum(begins) - 1
    first = np.empty(len(order), np.int64)
    first[order] = order[begins][groups]  # lexsort is stable, so a group begins with its first row
    return first


def matching_rows(hashes: NDArray[np.uint64], there: NDArray[np.uint64]) -> NDArray[np.int64]:
    """For each row a row of `there` of the same content, -1 where there is none: [N]."""
    first = first_rows(np.concatenate([there, hashes]))[len(there) :]
    known = (first < len(there)) & there[np.minimum(first, len(there) - 1)].any(axis=1) if len(there) else first < 0
    return np.where(known, first, -1)


def cut_shards(
    contents: Contents, rows_per_shard: int, earlier: NDArray[np.int64] | None = None
) -> Iterable[DataShard]:
    """Data shards of `rows_per_shard` rows; a row whose content stood before goes to the shard where it stood.

    Not more than `rows_per_shard` rows are taken in by a shard, so that memory keeps its bound: the rest is
    encoded once more where it stands. Where rows go does not depend on `earlier`.

    Args:
        contents: of the corpus.
        rows_per_shard: at least 1.
        earlier: as `matching_rows` gives it.
    """
    num_rows = len(contents)
    earlier = np.full(num_rows, -1, np.int64) if earlier is None else earlier
    own = np.arange(num_rows) // rows_per_shard
    target = first_rows(contents.hashes) // rows_per_shard
    moved = np.flatnonzero(target != own)
    moved = moved[np.argsort(target[moved], kind="stable")]
    rank = np.arange(len(moved)) - np.searchsorted(target[moved], target[moved], side="left")
    surplus = moved[rank >= rows_per_shard]
    target[surplus] = own[surplus]
    order = np.argsort(target, kind="stable")
    for number, rows in enumerate(np.split(order, np.searchsorted(target[order], np.arange(1, own[-1] + 1)))):
        if len(rows):
            hashes = contents.hashes[rows]
            yield DataShard(number, rows, first_rows(hashes), earlier[rows], hashes)


def rows_of_ids(ids: NDArray[np.int64], there: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each id its row in `there`, -1 where it has none: [N]."""
    if not len(there):
        return np.full(len(ids), -1, np.int64)
    order = np.argsort(there)
    place = order[np.minimum(np.searchsorted(there[order], ids), len(there) - 1)]
    return np.where(there[place] == ids, place, -1)


def changes_since(contents: Contents, there: Contents) -> Changes:
    """Count the passages that are the same, have another content, are new, or are gone."""
    place = rows_of_ids(contents.ids, there.ids)
    known = place >= 0
    same = int((contents.hashes[known] == there.hashes[place[known]]).all(axis=1).sum())
    num_known = int(known.sum())
    return Changes(same, num_known - same, len(contents) - num_known, len(there) - num_known)
