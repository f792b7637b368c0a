"""Several queries at once among flat vectors: what FAISS finds, whichever block a vector is in."""

import faiss
import numpy as np
import pytest

from readapt_ray.retrieval import flat_search
from readapt_ray.retrieval.flat_search import LEAST_QUERIES, flat_vectors, search_flat
from readapt_ray.retrieval.index_shard import IndexShard, new_index


def made(factory: str, num_vectors: int = 1000, dimension: int = 16):
    random = np.random.default_rng(0)
    vectors = random.standard_normal((num_vectors, dimension)).astype(np.float32)
    index = new_index(factory, dimension)
    index.train(vectors)
    index.add(vectors)
    return index, random.standard_normal((40, dimension)).astype(np.float32)


@pytest.mark.parametrize("factory", ["Flat", "SQfp16"])
@pytest.mark.parametrize("top_k", [1, 10, 300, 1000])
@pytest.mark.parametrize(("block_rows", "block_queries"), [(4096, 1024), (100, 7), (64, 40)])
def test_scores_and_rows_are_those_of_faiss(monkeypatch, factory, top_k, block_rows, block_queries):
    monkeypatch.setattr(flat_search, "_BLOCK_ROWS", block_rows)
    monkeypatch.setattr(flat_search, "_BLOCK_QUERIES", block_queries)
    index, queries = made(factory)
    wanted_scores, wanted_rows = index.search(queries, top_k)

    scores, rows = search_flat(flat_vectors(index), queries, top_k)

    assert scores.dtype == np.float32 and rows.dtype == np.int64
    np.testing.assert_allclose(scores, wanted_scores, atol=2e-5)
    assert (scores[:, 1:] <= scores[:, :-1]).all()
    assert np.mean(rows == wanted_rows) > 0.999  # two scores may differ by less than their rounding


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
    np.testing.assert_array_equal(search_flat(flat_vectors(mapped), queries, 5)[1], index.search(queries, 5)[1])


@pytest.mark.parametrize("num_queries", [LEAST_QUERIES - 1, LEAST_QUERIES, 100])
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
