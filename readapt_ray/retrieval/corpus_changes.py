"""Compare two states of a corpus by doc_id, content and kept columns, without reading texts.

In: the passages of both. Out: how many were added, changed, deleted and kept, and a random sample of the rows of each
kind. What both do not share is read once per part, some 700,000 passages a second. Memory is 32 bytes per such passage of
either state, divided by the number of parts.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from readapt_ray.records import content_hash
from readapt_ray.retrieval.parquet_rows import ParquetRows, read_rows, scan_rows

_READ_ROWS = 65_536
SAMPLE = 2048
"""Passages of each kind that are sampled."""
_BLOCKS, _BLOCK_ROWS = 16, 4096
"""Kept passages are sampled from so many blocks of so many rows, so that reading them does not take the whole corpus."""


@dataclass(frozen=True)
class Changes:
    """How the present state of a corpus differs from an earlier one."""

    added: int
    changed: int
    deleted: int
    kept: int
    other_columns: int
    """Kept passages whose kept columns differ: in a value, or in which columns exist."""
    sample_new: NDArray[np.int64]
    """Rows of the present corpus: a sample of what was added or changed."""
    sample_kept: NDArray[np.int64]
    """Rows of the present corpus: a sample of what is as it was."""

    @property
    def is_empty(self) -> bool:
        """Return whether both states have the same passages with the same columns."""
        return not (self.added or self.changed or self.deleted or self.other_columns)

    def counts(self) -> dict[str, int]:
        """Return the four counts by name."""
        return {name: getattr(self, name) for name in ("added", "changed", "deleted", "kept")}


@dataclass(frozen=True)
class _Keys:
    """What identifies the rows of one part, in the order of `ids`."""

    ids: NDArray[np.uint64]
    contents: NDArray[np.uint64]
    columns: NDArray[np.uint64]
    rows: NDArray[np.int64]


def compare(
    before: ParquetRows,
    now: ParquetRows,
    part: int = 0,
    num_parts: int = 1,
    *,
    columns: Sequence[str] = (),
    shared: Set[str] = frozenset(),
) -> Changes:
    """Compare the passages whose doc_id belongs to one of several parts.

    Args:
        before: passages of the earlier state.
        now: passages of the present state.
        part: number of the part.
        num_parts: how many parts there are.
        columns: the kept columns of either state.
        shared: files of the present state whose rows are those of a file of the earlier one, which `before` is without. They
            belong to the first part.

    Raises:
        CorruptFileError: a file was cut short or altered.
    """
    old, new = _keys(before, part, num_parts, columns), _keys(now, part, num_parts, columns, shared)
    unread = shared if part == 0 else frozenset()
    place = np.minimum(np.searchsorted(old.ids, new.ids), max(0, len(old.ids) - 1))
    known = old.ids[place] == new.ids if len(old.ids) else np.zeros(len(new.ids), bool)
    same = known.copy()
    same[known] = old.contents[place[known]] == new.contents[known]
    num_known, num_same = int(known.sum()), int(same.sum())
    size = max(1, SAMPLE // num_parts)
    return Changes(
        added=len(new.ids) - num_known,
        changed=num_known - num_same,
        deleted=len(old.ids) - num_known,
        kept=num_same + sum(count for name, count in now.counts if name in unread),
        other_columns=int((old.columns[place[same]] != new.columns[same]).sum()),
        sample_new=new.rows[~same][:size],  # in the order of hashes, so a random sample
        sample_kept=_sampled(new.rows[same], now, unread)[:size],
    )


def _sampled(kept: NDArray[np.int64], now: ParquetRows, unread: Set[str]) -> NDArray[np.int64]:
    """Return rows in random order that lie in a few blocks of the corpus, of those that are kept or in some files."""
    random = np.random.default_rng(0)
    firsts = _BLOCK_ROWS * random.permutation(-(-now.num_rows // _BLOCK_ROWS))[:_BLOCKS]
    rows = (firsts[:, None] + np.arange(_BLOCK_ROWS)).ravel()
    rows = rows[rows < now.num_rows]
    is_unread = np.array([name in unread for name, _ in now.counts], bool)
    file = np.searchsorted(np.cumsum([count for _, count in now.counts]), rows, side="right")
    found: NDArray[np.int64] = random.permutation(rows[is_unread[file] | np.isin(rows, kept)])
    return found


def added_up(parts: Sequence[Changes]) -> Changes:
    """Return the changes of all parts together."""
    names = ("added", "changed", "deleted", "kept", "other_columns")
    return Changes(
        **{name: sum(getattr(each, name) for each in parts) for name in names},
        sample_new=np.concatenate([each.sample_new for each in parts]),
        sample_kept=np.concatenate([each.sample_kept for each in parts]),
    )


def known_contents(passages: ParquetRows) -> NDArray[np.uint64]:
    """Return what identifies the contents of a corpus, rising: 8 bytes a passage, for `is_known`.

    Raises:
        CorruptFileError: a file was cut short or altered.
    """
    found = [_contents(hashes) for _, _, hashes, _ in _columns(passages)]
    return np.unique(np.concatenate([np.zeros(0, np.uint64), *found]))


def is_known(known: NDArray[np.uint64], hashes: Sequence[bytes]) -> NDArray[np.bool_]:
    """Return for each content hash whether `known_contents` has it."""
    contents = _contents(hashes)
    place = np.minimum(np.searchsorted(known, contents), max(0, len(known) - 1))
    return known[place] == contents if len(known) else np.zeros(len(contents), bool)


def content_hashes(passages: pa.Table) -> list[bytes]:
    """Return the hash of title and text of each row."""
    pairs = zip(passages["title"].to_pylist(), passages["text"].to_pylist(), strict=True)
    return [content_hash(title, text) for title, text in pairs]


def _contents(hashes: Sequence[bytes]) -> NDArray[np.uint64]:
    return np.frombuffer(b"".join(hashes), np.uint64).reshape(-1, 2)[:, 0]


def _keys(
    passages: ParquetRows, part: int, num_parts: int, columns: Sequence[str], left_out: Set[str] = frozenset()
) -> _Keys:
    """Read the ids, contents and kept columns of a part of the passages, and order them by id."""
    none = np.zeros(0, np.uint64)
    found = [(none, none, none, np.zeros(0, np.int64))]
    for first, doc_ids, hashes, kept in _columns(passages, columns, left_out):
        ids = _hashed(doc_ids)
        mine = np.flatnonzero(ids % np.uint64(num_parts) == part)
        found.append((ids[mine], _contents(hashes)[mine], _hashed_rows(kept, mine), mine + first))
    ids, *others = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.argsort(ids)
    return _Keys(ids[order], *(each[order] for each in others))


def _columns(
    passages: ParquetRows, columns: Sequence[str] = (), left_out: Set[str] = frozenset()
) -> Iterator[tuple[int, list[str], list[bytes], pa.Table]]:
    """Yield the first row, doc_ids, content hashes and kept columns; an older ingest wrote no hashes, then texts are read."""
    ends = np.cumsum([0, *(count for _, count in passages.counts)]).tolist()
    for (name, count), before in zip(passages.counts, ends, strict=False):
        for start in range(0, count if name not in left_out else 0, _READ_ROWS):
            size = min(_READ_ROWS, count - start)
            table = scan_rows(passages.folder / name, start, size, ("doc_id", "content_hash", *columns))
            kept = table.select([each for each in columns if each in table.column_names])
            if "content_hash" in table.column_names:
                yield before + start, table["doc_id"].to_pylist(), table["content_hash"].to_pylist(), kept
                continue
            texts = read_rows(passages.folder / name, start, size, ("title", "text"))
            yield before + start, table["doc_id"].to_pylist(), content_hashes(texts), kept


def _hashed_rows(kept: pa.Table, rows: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Hash the names and values of the columns of some rows, [N]."""
    if not kept.column_names:
        return np.zeros(len(rows), np.uint64)
    return _hashed(map(repr, kept.take(pa.array(rows)).to_pylist()))


def _hashed(texts: Iterable[str]) -> NDArray[np.uint64]:
    """Hash each text to 8 bytes, [N]."""
    digests = (hashlib.blake2b(each.encode("utf-8", "surrogatepass"), digest_size=8).digest() for each in texts)
    return np.frombuffer(b"".join(digests), np.uint64)
