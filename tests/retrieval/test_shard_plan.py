import numpy as np
import pytest

from readapt_ray.records import content_hash
from readapt_ray.retrieval.shard_plan import (
    Contents,
    first_rows,
    matching_rows,
    plan_shards,
    ranges_between,
    scan_vectors,
)
from readapt_ray.retrieval.vector_files import RowRange, write_vectors
from readapt_ray.storage import Location


def _contents(texts, ids=None):
    hashes = np.frombuffer(b"".join(content_hash("", text) for text in texts), np.uint64).reshape(-1, 2)
    return Contents(np.array(list(ids or range(len(texts))), np.int64), hashes)


def test_a_hash_is_of_title_and_text():
    assert content_hash("a", "b") == content_hash("a", "b") != content_hash("ab", "")
    assert content_hash(None, "x") == content_hash("", "x") != content_hash("x", "")
    assert len(content_hash("", "\ud800")) == 16


@pytest.mark.parametrize("seed", range(5))
def test_first_and_matching_rows_are_those_that_a_dictionary_finds(seed):
    rng = np.random.default_rng(seed)
    texts = [str(number) for number in rng.integers(0, 40, 100)]
    there = [str(number) for number in rng.integers(20, 60, 80)]
    assert first_rows(_contents(texts).hashes).tolist() == [texts.index(text) for text in texts]
    expected = [there.index(text) if text in there else -1 for text in texts]
    assert matching_rows(_contents(texts).hashes, _contents(there).hashes).tolist() == expected
    nothing = np.zeros((0, 2), np.uint64)
    assert matching_rows(_contents(texts).hashes, nothing).tolist() == [-1] * 100
    assert matching_rows(nothing, _contents(there).hashes).tolist() == []


def test_rows_without_a_content_hash_match_nothing():
    contents = _contents(["a", "b"])
    assert matching_rows(contents.hashes, np.zeros((2, 2), np.uint64)).tolist() == [-1, -1]


def test_shards_are_ranges_of_files_with_every_row_once():
    shards = plan_shards([("a", 5), ("b", 0), ("c", 4)], 4)
    assert [shard.ranges for shard in shards] == [
        (RowRange("a", 0, 4),),
        (RowRange("a", 4, 1), RowRange("c", 0, 3)),
        (RowRange("c", 3, 1),),
    ]
    assert [(shard.first, len(shard), shard.name) for shard in shards] == [
        (0, 4, "part-00000.parquet"),
        (4, 4, "part-00001.parquet"),
        (8, 1, "part-00002.parquet"),
    ]
    assert list(ranges_between([("a", 5), ("b", 0), ("c", 4)], 3, 7)) == [RowRange("a", 3, 2), RowRange("c", 0, 2)]


def test_vectors_that_do_not_say_their_content_match_nothing(tmp_path):
    folder = Location(str(tmp_path))
    write_vectors(folder / "v", ["a", "b"], np.ones((2, 3)), dtype="float32", metadata={})
    vectors = scan_vectors(folder, [("v", 2)])
    assert vectors.ids.tolist() == [hash("a"), hash("b")] and not vectors.hashes.any()
