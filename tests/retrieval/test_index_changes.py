"""Which shards of an earlier index stay: worked out here from lists of ids."""

from pathlib import Path

import numpy as np
import pytest

from readapt_ray.retrieval.index_changes import kept_and_added
from readapt_ray.retrieval.index_files import ShardRecord, write_shard
from readapt_ray.retrieval.index_shard import IndexShard, build_shard
from readapt_ray.retrieval.shard_plan import Contents
from readapt_ray.storage import Location


def shard(folder: Location, number: int, ids: list[str]) -> ShardRecord:
    vectors = np.random.default_rng(number).normal(size=(len(ids), 4)).astype(np.float32)
    built = build_shard("Flat", 4, [(ids, vectors)])
    whole = IndexShard(built.index, built.doc_ids, b"".join(map(content_of, ids)), built.trained)
    return write_shard(folder, f"{number:05d}", whole, encoder="e")


def content_of(doc_id: str) -> bytes:
    return doc_id.encode().ljust(16, b"-")


def contents(ids: list[str]) -> Contents:
    hashes = np.frombuffer(b"".join(map(content_of, ids)), np.uint64).reshape(-1, 2)
    return Contents(np.fromiter(map(hash, ids), np.int64, len(ids)), hashes)


@pytest.mark.parametrize(("num_updates", "num_that_stay"), [(16, 18), (17, 2)])
def test_many_small_shards_become_one(tmp_path: Path, num_updates: int, num_that_stay: int) -> None:
    folder = Location(str(tmp_path))
    groups = [[f"a{each}" for each in range(100)], [f"b{each}" for each in range(13)]]
    groups += [[f"c{update}-{each}" for each in range(12)] for update in range(num_updates)]
    records = [shard(folder, number, ids) for number, ids in enumerate(groups)]
    now = ["new", *(each for ids in groups for each in ids if not each.endswith("7"))]
    stay, added = kept_and_added(contents(now), folder, records)
    assert [record.name for record, _ in stay] == [f"{number:05d}" for number in range(num_that_stay)]
    found = [each for (record, kept) in stay for each in np.array(groups[int(record.name)])[kept]]
    assert sorted([*found, *(now[row] for row in added)]) == sorted(now), "each passage once"
    assert len(added) == (1 if num_that_stay > 2 else 1 + 11 * num_updates)
