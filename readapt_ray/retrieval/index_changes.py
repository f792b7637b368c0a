"""What an index of an earlier state of a corpus still says of the present one.

Enters: the passages that have vectors now, and the ids of an earlier index. Leaves: which of its shards stay, and which of
their vectors are still found; and which vectors they lack. 24 bytes a vector of either, some seconds for a million.
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
"""Share of the vectors of the largest shard below which a shard is small."""
_MIX = np.uint64(0x9E3779B97F4A7C15)


def kept_and_added(
    now: Contents, folder: Location, records: Sequence[ShardRecord]
) -> tuple[list[tuple[ShardRecord, NDArray[np.bool_]]], NDArray[np.int64]]:
    """Return which vectors of each shard belong to a passage as it is now, and the rows of `now` that have none.

    A passage whose content changed has none; neither has one whose content is not known. A shard more than MAX_DEAD of which
    are lost does not stay; those of its vectors that are still meant are among the rows that have none. Of more than 16 small
    shards, which as many updates made, none stays: a query pays for each.

    Args:
        now: the vectors as they are now.
        folder: the `shards` folder of the earlier index.
        records: what its manifest says of each shard.

    Raises:
        CorruptFileError: the ids of a shard are gone, or are not those that were written.
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
    """Return what `kept_and_added` returns, without looking at vectors that are the same before and now.

    Args:
        before: those of the vectors that the index was made of that may have gone since.
        now: those of the present vectors that may be new; the rows that have none are counted in these.
        num_now: how many present vectors there are.
        folder, records: as for `kept_and_added`.

    Returns:
        None if a shard does not stay, a content is not known, or the index is not that of the vectors before: all present
        vectors are to be looked at then.
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
    """Return which vectors of a shard are still found once some are lost."""
    table = read_id_table(folder, record)
    kept = ~deleted_rows(folder, record, table)
    hashes = hashes_of(table)
    rows = np.flatnonzero(kept & np.isin(hashes[:, 0], lost.hashes[:, 0]))
    ids = table["doc_id"].take(rows).to_pylist()
    keys = _keys(Contents(np.fromiter(map(hash, ids), np.int64, len(ids)), hashes[rows]))
    kept[rows[matching_rows(keys, _keys(lost)) >= 0]] = False
    return kept


def _small(parts: Sequence[NDArray[np.int64]]) -> set[int]:
    """Return which shards have few vectors, of those that are still found."""
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
    """Hash doc_id and content to 16 bytes, [N, 2]; zeros, which match nothing, where the content is not known."""
    keys = contents.hashes.copy()
    keys[:, 0] ^= contents.ids.view(np.uint64) * _MIX
    keys[~contents.hashes.any(axis=1)] = 0
    return keys
