"""Compare two states of a corpus by doc_id, content and kept columns, without reading texts.

In: the passages of both states. Out: how many were added, changed, deleted and kept, and random samples of new and of
kept rows. Files that both states share are not read. The others are read once per part, some 700,000 passages per
second; they take 32 bytes of memory per passage of either state, divided by the number of parts.
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
"""Most rows in each sample."""
_BLOCKS, _BLOCK_ROWS = 16, 4096
"""Kept passages are sampled from 16 blocks of 4,096 rows, so that reading them does not read the whole corpus."""


@dataclass(frozen=True)
class Changes:
    """The differences between an earlier and the present state of a corpus, as numbers of passages."""

    added: int
    changed: int
    deleted: int
    kept: int
    """Passages with the same doc_id, title and text in both states."""
    other_columns: int
    """Kept passages whose other columns differ: in a value, or in which columns exist."""
    sample_new: NDArray[np.int64]
    """Row numbers in the present corpus: a sample of added and changed passages."""
    sample_kept: NDArray[np.int64]
    """Row numbers in the present corpus: a sample of unchanged passages."""

    @property
    def is_empty(self) -> bool:
        """Return whether both states have the same passages with the same columns."""
        return not (self.added or self.changed or self.deleted or self.other_columns)

    def counts(self) -> dict[str, int]:
        """Return the counts of added, changed, deleted and kept passages, by name."""
        return {name: getattr(self, name) for name in ("added", "changed", "deleted", "kept")}


@dataclass(frozen=True)
class _Keys:
    """Hashes of the rows of one part, sorted by `ids`."""

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
    """Compare two states of a corpus, for the doc_ids of one part of several; only these count.

    The hash of a doc_id decides its part, so that parts can be compared by different workers. Each part's samples have
    at most SAMPLE / num_parts rows.

    Args:
        before: passages of the earlier state.
        now: passages of the present state.
        part: number of the part, from 0.
        num_parts: how many parts there are.
        columns: the columns of either state beside doc_id, title and text.
        shared: names of files of the present state that are the same in the earlier one. `before` must not have them.
            They are not read; part 0 counts them as kept.

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
        sample_new=new.rows[~same][:size],  # sorted by hashes, so this is a random sample
        sample_kept=_sampled(new.rows[same], now, unread)[:size],
    )


def _sampled(kept: NDArray[np.int64], now: ParquetRows, unread: Set[str]) -> NDArray[np.int64]:
    """Return kept rows, and rows of unread files, from a few random blocks of the corpus, in random order."""
    random = np.random.default_rng(0)
    firsts = _BLOCK_ROWS * random.permutation(-(-now.num_rows // _BLOCK_ROWS))[:_BLOCKS]
    rows = (firsts[:, None] + np.arange(_BLOCK_ROWS)).ravel()
    rows = rows[rows < now.num_rows]
    is_unread = np.array([name in unread for name, _ in now.counts], bool)
    file = np.searchsorted(np.cumsum([count for _, count in now.counts]), rows, side="right")
    found: NDArray[np.int64] = random.permutation(rows[is_unread[file] | np.isin(rows, kept)])
    return found


def added_up(parts: Sequence[Changes]) -> Changes:
    """Add up the changes of all parts of one comparison (at least one); their samples are concatenated."""
    names = ("added", "changed", "deleted", "kept", "other_columns")
    return Changes(
        **{name: sum(getattr(each, name) for each in parts) for name in names},
        sample_new=np.concatenate([each.sample_new for each in parts]),
        sample_kept=np.concatenate([each.sample_kept for each in parts]),
    )


def known_contents(passages: ParquetRows) -> NDArray[np.uint64]:
    """Return the first 8 bytes of each distinct content hash of a corpus, sorted: uint64, for `is_known`.

    Raises:
        CorruptFileError: a file was cut short or altered.
    """
    found = [_contents(hashes) for _, _, hashes, _ in _columns(passages)]
    return np.unique(np.concatenate([np.zeros(0, np.uint64), *found]))


def is_known(known: NDArray[np.uint64], hashes: Sequence[bytes]) -> NDArray[np.bool_]:
    """Return for each content hash of 16 bytes whether it is among `known`, bool [N]; only 8 bytes are compared.

    Args:
        known: from `known_contents`.
        hashes: content hashes, as `content_hashes` computes them.
    """
    contents = _contents(hashes)
    place = np.minimum(np.searchsorted(known, contents), max(0, len(known) - 1))
    return known[place] == contents if len(known) else np.zeros(len(contents), bool)


def content_hashes(passages: pa.Table) -> list[bytes]:
    """Compute the content hash, 16 bytes, of title and text of each row; the table has both columns."""
    pairs = zip(passages["title"].to_pylist(), passages["text"].to_pylist(), strict=True)
    return [content_hash(title, text) for title, text in pairs]


def _contents(hashes: Sequence[bytes]) -> NDArray[np.uint64]:
    return np.frombuffer(b"".join(hashes), np.uint64).reshape(-1, 2)[:, 0]


def _keys(
    passages: ParquetRows, part: int, num_parts: int, columns: Sequence[str], left_out: Set[str] = frozenset()
) -> _Keys:
    """Hash the doc_ids, contents and other columns of one part of the passages, and sort them by doc_id hash."""
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
    """Yield first row, doc_ids, content hashes and other columns. Without stored hashes (old ingest) texts are read."""
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
    """Hash the names and values of the columns of some rows to 8 bytes each, [N]."""
    if not kept.column_names:
        return np.zeros(len(rows), np.uint64)
    return _hashed(map(repr, kept.take(pa.array(rows)).to_pylist()))


def _hashed(texts: Iterable[str]) -> NDArray[np.uint64]:
    """Hash each text to 8 bytes, [N]."""
    digests = (hashlib.blake2b(each.encode("utf-8", "surrogatepass"), digest_size=8).digest() for each in texts)
    return np.frombuffer(b"".join(digests), np.uint64)
