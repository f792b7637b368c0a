import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from readapt_ray.errors import CorpusError
from readapt_ray.records import content_hash
from readapt_ray.retrieval.shard_plan import (
    Changes,
    Contents,
    changes_since,
    cut_shards,
    first_rows,
    matching_rows,
    scan_passages,
    scan_vectors,
)
from readapt_ray.retrieval.vector_files import write_vectors
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


def test_a_text_that_stood_before_goes_to_the_shard_where_it_stood():
    contents = _contents(list("abcdeafaghib"))
    earlier = np.arange(100, 112)
    shards = list(cut_shards(contents, 4, earlier))
    assert [shard.rows.tolist() for shard in shards] == [[0, 1, 2, 3, 5, 7, 11], [4, 6], [8, 9, 10]]
    assert [shard.representatives.tolist() for shard in shards] == [[0, 1, 2, 3, 0, 0, 1], [0, 1], [0, 1, 2]]
    assert [shard.earlier.tolist() for shard in shards] == [
        [100, 101, 102, 103, 105, 107, 111],
        [104, 106],
        [108, 109, 110],
    ]
    assert [shard.name for shard in shards] == [f"part-{number:05d}.parquet" for number in range(3)]


@pytest.mark.parametrize("rows_per_shard", [1, 3, 7, 100])
def test_every_row_stands_in_one_shard_and_none_grows_without_bound(rows_per_shard):
    rng = np.random.default_rng(0)
    contents = _contents([str(number) for number in rng.integers(0, 5, 90)])
    shards = list(cut_shards(contents, rows_per_shard))
    assert sorted(np.concatenate([shard.rows for shard in shards]).tolist()) == list(range(90))
    assert max(map(len, shards)) <= 2 * rows_per_shard
    for shard in shards:
        np.testing.assert_array_equal(shard.hashes[shard.representatives], contents.hashes[shard.rows])


def test_a_shard_may_have_nothing_of_its_own_left():
    shards = list(cut_shards(_contents(list("abab")), 2))
    assert [(shard.number, shard.rows.tolist()) for shard in shards] == [(0, [0, 1, 2, 3])]


def test_changes_are_counted():
    before = _contents(list("abcd"), ids=[1, 2, 3, 4])
    after = _contents(list("abxe"), ids=[4, 2, 3, 9])
    assert changes_since(after, before) == Changes(num_unchanged=1, num_changed=2, num_new=1, num_deleted=1)
    assert changes_since(after, _contents([])) == Changes(0, 0, 4, 0)
    assert changes_since(_contents([]), before) == Changes(0, 0, 0, 4)


def test_a_corpus_and_its_vectors_are_scanned(tmp_path):
    folder = Location(str(tmp_path))
    rows = {"doc_id": ["b", "a"], "title": ["t", None], "text": ["x", "y"]}
    pq.write_table(pa.table(rows), tmp_path / "p")
    contents = scan_passages(folder, [("p", 2)])
    assert contents.hashes.tobytes() == content_hash("t", "x") + content_hash("", "y")
    write_vectors(folder / "v", ["a", "b"], np.ones((2, 3)), dtype="float32", metadata={})
    vectors = scan_vectors(folder, [("v", 2)])
    assert vectors.ids.tolist() == contents.ids[::-1].tolist() and not vectors.hashes.any()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"doc_id": ["a", "a"]}, "'a' stands in p and again in p"),
        ({"doc_id": ["a", None]}, "passage None .* has no doc_id or text"),
        ({"text": [None, "y"]}, "passage 'b' .* has no doc_id or text"),
    ],
)
def test_a_corpus_that_cannot_be_embedded_is_refused(tmp_path, changes, named):
    pq.write_table(pa.table({"doc_id": ["b", "a"], "title": ["", ""], "text": ["x", "y"]} | changes), tmp_path / "p")
    with pytest.raises(CorpusError, match=named):
        scan_passages(Location(str(tmp_path)), [("p", 2)])
