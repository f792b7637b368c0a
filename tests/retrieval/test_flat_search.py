"""Several queries at once among flat vectors: what FAISS finds, whichever block a vector is in."""

import faiss
import numpy as np
import pytest

from readapt_ray.retrieval import index_shard
from readapt_ray.retrieval.faiss_build import flat_vectors
from readapt_ray.retrieval.index_shard import _LEAST_TOGETHER, DELETED, IndexShard, new_index


def made(factory: str, num_vectors: int = 1000, dimension: int = 16):
    random = np.random.default_rng(0)
    vectors = random.standard_normal((num_vectors, dimension)).astype(np.float32)
    index = new_index(factory, dimension)
    index.train(vectors)
    index.add(vectors)
    return index, random.standard_normal((40, dimension)).astype(np.float32)


def named(index) -> IndexShard:
    return IndexShard(index, np.array([f"d{row:04}" for row in range(index.ntotal)], object))


@pytest.mark.parametrize("factory", ["Flat", "SQfp16"])
@pytest.mark.parametrize("top_k", [1, 10, 300, 1000])
@pytest.mark.parametrize("block_rows", [4096, 100, 64])
def test_what_is_found_is_what_faiss_finds(monkeypatch, factory, top_k, block_rows):
    monkeypatch.setattr(index_shard, "_BLOCK_ROWS", block_rows)
    index, queries = made(factory)
    scores, rows = index.search(queries, top_k)
    monkeypatch.setattr(IndexShard, "_best", None)

    hits = named(index).search(queries, top_k)

    np.testing.assert_allclose(hits.scores, scores, atol=2e-5)
    found = np.vectorize(lambda doc_id: int(doc_id[1:]))(hits.doc_ids)
    assert np.mean(found == rows) > 0.999  # two scores may differ by less than their rounding


@pytest.mark.parametrize("factory", ["Flat", "SQfp16"])
def test_deleted_vectors_are_not_found(monkeypatch, factory):
    monkeypatch.setattr(index_shard, "_BLOCK_ROWS", 100)
    index, queries = made(factory)
    doc_ids = named(index).doc_ids
    wanted = IndexShard(index, doc_ids).search(queries, 1000)
    deleted = set(doc_ids[np.arange(1000) % 3 == 0])
    hits = IndexShard(index, np.where(np.arange(1000) % 3 == 0, DELETED, doc_ids)).search(queries, 1000)
    for found, all_of_them in zip(hits.doc_ids.tolist(), wanted.doc_ids.tolist(), strict=True):
        assert found == [each for each in all_of_them if each not in deleted]


def test_vectors_are_not_copied():
    index, _ = made("Flat")
    vectors = flat_vectors(index)
    index.add(np.ones((1, 16), np.float32))
    assert flat_vectors(index).shape == (1001, 16)
    assert vectors.shape == (1000, 16)
    np.testing.assert_array_equal(flat_vectors(index)[7], index.reconstruct(7))
    assert not flat_vectors(index).flags.owndata


@pytest.mark.parametrize("factory", ["IVF4,Flat", "HNSW8", "SQ8", "PQ4x4", "IVF4,SQfp16"])
def test_other_kinds_are_left_to_faiss(factory):
    index, _ = made(factory)
    assert flat_vectors(index) is None


def test_an_index_without_vectors_or_for_distances_is_left_to_faiss():
    assert flat_vectors(new_index("Flat", 8)) is None
    distances = faiss.IndexFlatL2(2)
    distances.add(np.ones((3, 2), np.float32))
    assert flat_vectors(distances) is None


def test_an_index_in_a_file_is_searched_there(tmp_path):
    index, queries = made("Flat")
    faiss.write_index(index, str(tmp_path / "index"))
    mapped = faiss.read_index(str(tmp_path / "index"), faiss.IO_FLAG_MMAP_IFC)
    found, wanted = (named(each).search(queries, 5) for each in (mapped, index))
    assert found.doc_ids.tolist() == wanted.doc_ids.tolist()


@pytest.mark.parametrize("num_queries", [_LEAST_TOGETHER - 1, _LEAST_TOGETHER, 100])
@pytest.mark.parametrize("factory", ["Flat", "SQfp16"])
def test_ties_go_by_doc_id_for_few_and_many_queries(factory, num_queries):
    random = np.random.default_rng(1)
    vectors = random.integers(-1, 2, (300, 4)).astype(np.float32)
    doc_ids = np.array([f"d{number:03}" for number in random.permutation(300)], object)
    index = new_index(factory, 4)
    index.train(vectors)
    index.add(vectors)
    queries = random.integers(-2, 3, (num_queries, 4)).astype(np.float32)

    hits = IndexShard(index, doc_ids).search(queries, 20)

    for query, found in zip(queries, hits.doc_ids.tolist(), strict=True):
        scores = vectors @ query
        order = sorted(range(300), key=lambda row: (-scores[row], doc_ids[row]))
        assert found == [doc_ids[row] for row in order[:20]]
