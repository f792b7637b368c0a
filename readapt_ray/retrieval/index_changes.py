"""Find which shards and vectors of an earlier index can be reused for the present state of a corpus.

In: the passages that have vectors now, and the ids of an earlier index. Out: the shards to keep, which of their vectors
may still be found, and the present vectors that they lack. Takes 24 bytes per vector of either, and some seconds per
million.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from readapt_ray.dead_rows import MAX_DEAD
from readapt_ray.retrieval.index_files import ShardRecord, deleted_rows, read_id_table, read_ids
from readapt_ray.retrieval.index_shard import DELETED
from readapt_ray.retrieval.shard_plan import Contents, hashes_of, matching_rows
from readapt_ray.storage import Location

_MOST_SMALL = 16
_SMALL = 1 / 8
"""A shard with less than this share of the vectors of the largest shard is small."""
_MIX = np.uint64(0x9E3779B97F4A7C15)


def kept_and_added(
    now: Contents, folder: Location, records: Sequence[ShardRecord]
) -> tuple[list[tuple[ShardRecord, NDArray[np.bool_]]], NDArray[np.int64]]:
    """Choose the shards of an earlier index to keep, and find the present vectors that must be added.

    A vector is kept if doc_id and content hash of its passage are unchanged; an unknown content hash matches nothing. A
    shard is dropped if it would lose more than MAX_DEAD of its vectors. If more than 16 shards are small (each update
    adds one), all small ones are dropped, since a query searches each. Live vectors of dropped shards are added again.

    Args:
        now: doc_id and content hashes of the present vectors.
        folder: the `shards` folder of the earlier index.
        records: entry of each shard in its manifest.

    Returns:
        Each kept shard with bool [N], which of its vectors may still be found; and the rows of `now` to add.

    Raises:
        CorruptFileError: the ids of a shard are gone, or their checksum is wrong.
    """
    there = [_contents(folder, record) for record in records]
    keys = [_keys(each) for each in there]
    rows = matching_rows(np.concatenate([np.zeros((0, 2), np.uint64), *keys]), _keys(now))
    parts = np.split(rows, np.cumsum([len(each) for each in there]))[: len(records)]
    stay = [(record, part) for record, part in zip(records, parts, strict=True) if np.mean(part < 0) <= MAX_DEAD]
    if len(small := _small([part for _, part in stay])) > _MOST_SMALL:
        stay = [each for number, each in enumerate(stay) if number not in small]
    present = np.zeros(len(now), bool)
    for _, part in stay:
        present[part[part >= 0]] = True
    return [(record, part >= 0) for record, part in stay], np.flatnonzero(~present)


def kept_and_added_by_changes(
    before: Contents, now: Contents, num_now: int, folder: Location, records: Sequence[ShardRecord]
) -> tuple[list[tuple[ShardRecord, NDArray[np.bool_]]], NDArray[np.int64]] | None:
    """Return what `kept_and_added` returns, but compare only vectors in files that changed.

    Args:
        before: vectors of the earlier artifact in files that the present one does not share.
        now: vectors of the present artifact in files that the earlier one does not share. The rows to add are numbered
            within these.
        num_now: number of all present vectors.
        folder, records: as in `kept_and_added`.

    Returns:
        As `kept_and_added`; or None if this shortcut is not possible: a shard must be dropped, a content hash is
        unknown, or the index is not of the earlier vectors. Then call `kept_and_added`.

    Raises:
        CorruptFileError: as in `kept_and_added`.
    """
    if not (before.hashes.any(axis=1).all() and now.hashes.any(axis=1).all()):
        return None
    gone = np.flatnonzero(matching_rows(_keys(before), _keys(now)) < 0)
    added = np.flatnonzero(matching_rows(_keys(now), _keys(before)) < 0)
    lost = Contents(before.ids[gone], before.hashes[gone])
    stay = [(record, _without(folder, record, lost)) for record in records]
    sizes = [int(np.count_nonzero(mask)) for _, mask in stay]
    if any(np.mean(~mask) > MAX_DEAD for _, mask in stay) or len(_small_sizes(sizes)) > _MOST_SMALL:
        return None
    return (stay, added) if sum(sizes) + len(added) == num_now else None


def _without(folder: Location, record: ShardRecord, lost: Contents) -> NDArray[np.bool_]:
    """Return which vectors of a shard may still be found after the `lost` ones are deleted, bool [N]."""
    table = read_id_table(folder, record)
    kept = ~deleted_rows(folder, record, table)
    hashes = hashes_of(table)
    rows = np.flatnonzero(kept & np.isin(hashes[:, 0], lost.hashes[:, 0]))
    ids = table["doc_id"].take(rows).to_pylist()
    keys = _keys(Contents(np.fromiter(map(hash, ids), np.int64, len(ids)), hashes[rows]))
    kept[rows[matching_rows(keys, _keys(lost)) >= 0]] = False
    return kept


def _small(parts: Sequence[NDArray[np.int64]]) -> set[int]:
    """Return the numbers of the shards with few live vectors."""
    return _small_sizes([int(np.count_nonzero(part >= 0)) for part in parts])


def _small_sizes(numbers: Sequence[int]) -> set[int]:
    sizes = np.array(numbers)
    return set(np.flatnonzero(sizes < _SMALL * sizes.max(initial=0)).tolist())


def _contents(folder: Location, record: ShardRecord) -> Contents:
    doc_ids, hashes = read_ids(folder, record)
    digests = np.frombuffer(hashes, np.uint64).reshape(-1, 2).copy()
    digests[doc_ids == DELETED] = 0
    return Contents(np.fromiter(map(hash, doc_ids), np.int64, len(doc_ids)), digests)


def _keys(contents: Contents) -> NDArray[np.uint64]:
    """Hash doc_id and content to 16 bytes, [N, 2]. An unknown content gives zeros, which match nothing."""
    keys = contents.hashes.copy()
    keys[:, 0] ^= contents.ids.view(np.uint64) * _MIX
    keys[~contents.hashes.any(axis=1)] = 0
    return keys
