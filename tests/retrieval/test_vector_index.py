import dataclasses
import itertools

import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest

from readapt_ray.errors import ArtifactMissingError, CorruptFileError, InputError
from readapt_ray.retrieval.index_files import carry_over, find_shards, read_ids, read_shard, write_shard
from readapt_ray.retrieval.index_shard import DELETED, IndexShard, build_shard, search_shards
from readapt_ray.retrieval.vector_index import VectorIndex
from readapt_ray.storage import Location
from tests.retrieval.test_exact import by_hand

FLAT = "Flat"


def _made(num_docs=300, dimension=16):
    rng = np.random.default_rng(0)
    doc_ids = [f"d{number:04d}" for number in rng.permutation(num_docs)]
    vectors = (rng.integers(-999, 1000, size=(num_docs, dimension)) / 64).astype(np.float32)
    return (rng.integers(-999, 1000, size=(40, dimension)) / 64).astype(np.float32), doc_ids, vectors


def _shards(doc_ids, vectors, size):
    for first in range(0, len(doc_ids), size):
        last = first + size
        halves = [
            (doc_ids[first:last][:7], vectors[first:last][:7]),
            (doc_ids[first:last][7:], vectors[first:last][7:]),
        ]
        yield build_shard(FLAT, vectors.shape[1], halves)


@pytest.mark.parametrize("size", [30, 100, 300])
@pytest.mark.parametrize("top_k", [1, 10, 299, 300, 1000])
def test_shards_are_searched_as_one_index(size, top_k):
    queries, doc_ids, vectors = _made()
    hits = search_shards(_shards(doc_ids, vectors, size), queries, top_k)
    plain = faiss.IndexFlatIP(vectors.shape[1])
    plain.add(vectors)
    scores, rows = plain.search(queries, min(top_k, 300))
    assert hits.doc_ids.tolist() == [[doc_ids[row] for row in each] for each in rows]
    np.testing.assert_allclose(hits.scores, scores, rtol=1e-5, atol=1e-5)
    expected = by_hand(queries, doc_ids, vectors, top_k)
    assert hits.doc_ids.tolist() == [[doc_id for doc_id, _ in row] for row in expected]


@pytest.mark.parametrize("size", [20, 200])
@pytest.mark.parametrize("top_k", [1, 5, 60, 199])
def test_ties_go_by_doc_id(size, top_k):
    rng = np.random.default_rng(1)
    doc_ids = [f"d{number:04d}" for number in rng.permutation(200)]
    vectors = rng.integers(-1, 2, size=(200, 4)).astype(np.float32)
    queries = rng.integers(-2, 3, size=(25, 4)).astype(np.float32)
    hits = search_shards(_shards(doc_ids, vectors, size), queries, top_k)
    for index, expected in enumerate(by_hand(queries, doc_ids, vectors, top_k)):
        assert [(doc.doc_id, doc.score) for doc in hits.of_query(index, "q")] == expected


def test_a_shard_on_disk_opens_in_plain_faiss_and_pyarrow(tmp_path):
    queries, doc_ids, vectors = _made()
    (shard,) = _shards(doc_ids, vectors, 300)
    folder = Location(str(tmp_path)) / "shards"
    record = write_shard(folder, "00000", shard, encoder="f")
    assert (record.num_vectors, record.num_bytes) == (
        300,
        sum(each.size_bytes() for each in (*folder.files(".faiss"), *folder.files(".parquet"))),
    )
    assert find_shards(folder, ["00000"], encoder="f") == {"00000": record}
    assert find_shards(folder, ["00000"], encoder="other") == {}
    assert find_shards(folder, ["00001"], encoder="f") == {}
    plain = faiss.read_index(str(tmp_path / "shards/00000.faiss"))
    np.testing.assert_array_equal(plain.reconstruct_n(0, 300), vectors)
    assert pq.read_table(tmp_path / "shards/00000.ids.parquet")["doc_id"].to_pylist() == doc_ids
    again = read_shard(folder, record).search(queries, 10)
    assert again.doc_ids.tolist() == shard.search(queries, 10).doc_ids.tolist()


@pytest.mark.parametrize("name", ["00000.faiss", "00000.ids.parquet"])
@pytest.mark.parametrize("damage", ["altered", "cut", "gone"])
def test_damaged_shards_are_refused(tmp_path, name, damage):
    _, doc_ids, vectors = _made()
    (shard,) = _shards(doc_ids, vectors, 300)
    folder = Location(str(tmp_path))
    record = write_shard(folder, "00000", shard, encoder="f")
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "gone":
        (folder / name).delete()
    else:
        (folder / name).write_bytes(bytes(content) if damage == "altered" else bytes(content[:-20]))
    with pytest.raises(CorruptFileError, match=name):
        read_shard(folder, record)


def test_a_shard_whose_parts_do_not_belong_together_is_refused(tmp_path):
    _, doc_ids, vectors = _made()
    folder = Location(str(tmp_path))
    (shard,) = _shards(doc_ids, vectors, 300)
    record = write_shard(folder, "00000", shard, encoder="f")
    with pytest.raises(CorruptFileError, match="301 in the manifest"):
        read_shard(folder, dataclasses.replace(record, num_vectors=301))


def test_a_half_written_shard_is_not_found(tmp_path):
    _, doc_ids, vectors = _made()
    folder = Location(str(tmp_path))
    (shard,) = _shards(doc_ids, vectors, 300)
    write_shard(folder, "00000", shard, encoder="f")
    ids = (folder / "00000.ids.parquet").read_bytes()
    (folder / "00000.ids.parquet").delete()
    assert find_shards(folder, ["00000"], encoder="f") == {}
    (folder / "00000.ids.parquet").write_bytes(ids[:-9])
    assert find_shards(folder, ["00000"], encoder="f") == {}


@pytest.mark.parametrize("top_k", [1, 5, 40, 300])
def test_deleted_vectors_are_not_found_and_take_no_place(tmp_path, top_k):
    queries, doc_ids, vectors = _made()
    (shard,) = _shards(doc_ids, vectors, 300)
    folder, target = Location(str(tmp_path / "a")), Location(str(tmp_path / "b"))
    record = write_shard(folder, "00000", shard, encoder="f")
    kept = np.random.default_rng(1).random(300) < 0.4
    carried = carry_over(folder, record, kept, target, encoder="f")
    assert (carried.num_vectors, carried.num_deleted) == (300, int((~kept).sum()))
    assert (carried.index_sha256, carried.ids_sha256) == (record.index_sha256, record.ids_sha256)
    assert find_shards(target, ["00000"], encoder="f") == {"00000": carried}
    ids = read_ids(target, carried)[0].tolist()
    assert ids == [doc_id if keep else "" for doc_id, keep in zip(doc_ids, kept, strict=True)]
    hits = read_shard(target, carried).search(queries, top_k)
    left = [doc_id for doc_id, keep in zip(doc_ids, kept, strict=True) if keep]
    for index, expected in enumerate(by_hand(queries, left, vectors[kept], top_k)):
        assert [doc.doc_id for doc in hits.of_query(index, "q")] == [doc_id for doc_id, _ in expected]
    again = carry_over(target, carried, np.zeros(300, bool), Location(str(tmp_path / "c")), encoder="f")
    assert read_shard(Location(str(tmp_path / "c")), again).search(queries, 5).of_query(0, "q") == []


@pytest.mark.parametrize("name", ["00000.faiss", "00000.ids.parquet"])
@pytest.mark.parametrize("is_gone", [True, False])
def test_a_shard_with_a_damaged_file_is_not_carried_over(tmp_path, name, is_gone):
    _, doc_ids, vectors = _made()
    (shard,) = _shards(doc_ids, vectors, 300)
    folder = Location(str(tmp_path / "a"))
    record = write_shard(folder, "00000", shard, encoder="f")
    content = (folder / name).read_bytes()
    (folder / name).delete()
    if not is_gone:
        (folder / name).write_bytes(content[:-9])
    with pytest.raises(
        CorruptFileError, match=r"bytes, and .* in the manifest; run `readapt index` without --previous"
    ):
        carry_over(folder, record, np.ones(300, bool), Location(str(tmp_path / "b")), encoder="f")


def _clustered(num_docs=1000, dimension=16):
    """Vectors in tight groups of some 20, so that an inverted list or a part of a graph holds few."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(num_docs // 20, dimension))
    vectors = centres[rng.integers(0, len(centres), num_docs)] + 0.05 * rng.normal(size=(num_docs, dimension))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return [f"d{number:04d}" for number in range(num_docs)], vectors.astype(np.float32)


FACTORIES = (
    *("IVF25,Flat", "IVF25,SQ8", "IVF25,PQ4x4,Refine(Flat)", "IVF25,RaBitQ,RFlat", "PCA8,IVF25,SQfp16"),
    *("HNSW4,Flat", "HNSW4,SQ8"),
)


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize("share_kept", [1.0, 0.3])
def test_an_index_that_looks_at_little_finds_k_all_the_same(factory, share_kept):
    doc_ids, vectors = _clustered()
    built = build_shard(factory, vectors.shape[1], [(doc_ids, vectors)])
    kept = np.random.default_rng(1).random(len(doc_ids)) < share_kept
    shard = IndexShard(built.index, np.where(kept, built.doc_ids, DELETED))
    queries = vectors[:20]
    assert (shard.index.search(queries, 101)[1][:, -1] < 0).any()
    for top_k in (10, 100, len(doc_ids)):
        hits = shard.search(queries, top_k)
        for index in range(len(queries)):
            found = hits.of_query(index, "q")
            assert len({doc.doc_id for doc in found} - {DELETED}) == len(found) == min(top_k, kept.sum())
            assert all(before.score >= after.score for before, after in itertools.pairwise(found))


def test_what_a_query_finds_does_not_hang_on_the_queries_beside_it():
    doc_ids, vectors = _clustered()
    shard = build_shard("IVF25,Flat", vectors.shape[1], [(doc_ids, vectors)])
    together = shard.search(vectors[:20], 60)
    assert shard.index.nprobe == 1
    for index in range(20):
        alone = shard.search(vectors[index : index + 1], 60)
        assert alone.doc_ids[0].tolist() == together.doc_ids[index].tolist()


def test_all_lists_together_find_what_exact_search_finds():
    doc_ids, vectors = _clustered()
    shard = build_shard("IVF25,Flat", vectors.shape[1], [(doc_ids, vectors)])
    found = shard.search(vectors[:20], 1000)
    for index, expected in enumerate(by_hand(vectors[:20], doc_ids, vectors, 1000)):
        assert found.doc_ids[index].tolist() == [doc_id for doc_id, _ in expected]


def test_edges(tmp_path):
    queries, doc_ids, vectors = _made()
    (shard,) = _shards(doc_ids, vectors, 300)
    assert search_shards([], queries, 5).of_query(0, "q") == []
    assert shard.search(queries[:0], 5).scores.shape[0] == 0
    with pytest.raises(InputError, match="vectors of 16 numbers"):
        shard.search(queries[:, :8], 5)
    with pytest.raises(InputError, match="top_k = 0"):
        shard.search(queries, 0)
    with pytest.raises(ArtifactMissingError, match="does not exist"):
        VectorIndex.open(str(tmp_path / "absent"))


@pytest.mark.parametrize("factory", ["IVF5,PQ4x4", "IVF5,PQ4x4,Refine(SQ8)", "OPQ4,IVF5,PQ4x4"])
def test_codes_are_not_ordered_for_a_search_that_none_does(factory):
    """Polysemous training is most of the time of product quantization, and changes nothing that is found."""
    vectors = np.random.default_rng(0).normal(size=(400, 16)).astype(np.float32)
    plain = faiss.index_factory(16, factory, faiss.METRIC_INNER_PRODUCT)
    plain.train(vectors)
    plain.add(vectors)
    ours = build_shard(factory, 16, [([str(row) for row in range(400)], vectors)]).index
    assert not faiss.downcast_index(faiss.extract_index_ivf(ours)).do_polysemous_training
    np.testing.assert_array_equal(ours.search(vectors, 10)[1], plain.search(vectors, 10)[1])
