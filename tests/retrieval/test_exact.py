import numpy as np
import pytest

from readapt_ray.errors import InputError
from readapt_ray.records import ScoredDoc
from readapt_ray.retrieval.exact import TopK, search_exact


def by_hand(queries, doc_ids, vectors, top_k):
    """float64 brute force: falling score, ties by doc_id."""
    found = []
    for query in queries.astype(np.float64):
        scores = vectors.astype(np.float64) @ query
        order = sorted(range(len(doc_ids)), key=lambda row: (-scores[row], doc_ids[row]))[:top_k]
        found.append([(doc_ids[row], scores[row]) for row in order])
    return found


def _chunks(doc_ids, vectors, size):
    for first in range(0, len(doc_ids), size):
        yield doc_ids[first : first + size], vectors[first : first + size]


def _made(num_docs=500, num_queries=30, dimension=24, seed=0):
    """Numbers in eighths: float32 sums of their products are exact."""
    rng = np.random.default_rng(seed)
    doc_ids = [f"d{number:04d}" for number in rng.permutation(num_docs)]
    return (
        (rng.integers(-99, 100, size=(num_queries, dimension)) / 8).astype(np.float32),
        doc_ids,
        (rng.integers(-99, 100, size=(num_docs, dimension)) / 8).astype(np.float32),
    )


@pytest.mark.parametrize("size", [1, 7, 128, 10_000])
@pytest.mark.parametrize("top_k", [1, 10, 499, 500, 501])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_search_is_brute_force(size, top_k, device):
    queries, doc_ids, vectors = _made()
    hits = search_exact(queries, _chunks(doc_ids, vectors, size), top_k, device=device)
    for index, expected in enumerate(by_hand(queries, doc_ids, vectors, top_k)):
        assert [(doc.doc_id, doc.score) for doc in hits.of_query(index, "q")] == expected


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_vectors_in_float16_are_searched_as_the_numbers_that_they_are(device):
    queries, doc_ids, vectors = _made()
    halves = vectors.astype(np.float16)
    assert (halves == vectors).all()
    found = search_exact(queries / 3, _chunks(doc_ids, halves, 128), 10, device=device)
    expected = search_exact(queries / 3, _chunks(doc_ids, vectors, 128), 10, device=device)
    assert found.scores.dtype == np.float32
    if device == "cpu":
        assert found.doc_ids.tolist() == expected.doc_ids.tolist()
    np.testing.assert_allclose(found.scores, expected.scores, rtol=0 if device == "cpu" else 1e-6)


@pytest.mark.parametrize("size", [1, 5, 64, 200])
@pytest.mark.parametrize("top_k", [1, 3, 50, 150])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_ties_go_by_doc_id_whatever_the_chunks_and_their_order(size, top_k, device):
    rng = np.random.default_rng(1)
    doc_ids = [f"d{number:04d}" for number in rng.permutation(200)]
    # Whole numbers multiply exactly, so equal scores are equal bit for bit.
    vectors = rng.integers(-1, 2, size=(200, 4)).astype(np.float32)
    queries = np.concatenate([rng.integers(-2, 3, size=(20, 4)), np.zeros((1, 4))]).astype(np.float32)
    chunks = list(_chunks(doc_ids, vectors, size))
    forward = search_exact(queries, chunks, top_k, device=device)
    backward = search_exact(queries, reversed(chunks), top_k, device=device)
    for index, expected in enumerate(by_hand(queries, doc_ids, vectors, top_k)):
        assert [(doc.doc_id, doc.score) for doc in forward.of_query(index, "q")] == expected
        assert [(doc.doc_id, doc.score) for doc in backward.of_query(index, "q")] == expected


def test_many_queries_are_searched_in_blocks():
    queries, doc_ids, vectors = _made(num_docs=50, num_queries=2500, dimension=4)
    hits = search_exact(queries, _chunks(doc_ids, vectors, 20), 3)
    expected = by_hand(queries, doc_ids, vectors, 3)
    assert hits.doc_ids.tolist() == [[doc_id for doc_id, _ in row] for row in expected]


def test_a_merge_of_parts_is_the_whole():
    queries, doc_ids, vectors = _made()
    whole = search_exact(queries, [(doc_ids, vectors)], 20)
    best = TopK(len(queries), 20)
    for names, part in _chunks(doc_ids, vectors, 90):
        found = search_exact(queries, [(names, part)], 20)
        best.merge(found.scores, found.doc_ids)
    assert best.hits().doc_ids.tolist() == whole.doc_ids.tolist()


def test_places_without_a_document_are_left_out():
    best = TopK(1, 3)
    best.add(np.array([[1.0, -np.inf, -np.inf]], np.float32), np.array(["a", None, None], object))
    best.add(np.array([[-np.inf, -np.inf]], np.float32), np.array([[None, None]], object))
    assert best.hits().of_query(0, "q") == [ScoredDoc("q", "a", 1.0)]


def test_edges():
    queries, doc_ids, vectors = _made()
    assert search_exact(queries, [], 5).of_query(0, "q") == []
    assert search_exact(queries[:0], [(doc_ids, vectors)], 5).scores.shape[0] == 0
    with pytest.raises(InputError, match=r"top_k = 0.*at least 1"):
        search_exact(queries, [(doc_ids, vectors)], 0)
    with pytest.raises(InputError, match="vectors of 8 numbers"):
        search_exact(queries, [(doc_ids, vectors[:, :8])], 5)


def test_a_score_that_is_nan_is_refused_and_not_ranked():
    best = TopK(2, 2)
    scores = np.array([[0.1, 0.2, 0.3], [0.1, np.nan, 0.3]], np.float32)
    names = np.array(["a", "b", "c"], object)
    with pytest.raises(InputError, match="query 1 has the score NaN with 'b'"):
        best.add(scores, names)
    with pytest.raises(InputError, match="query 1 has the score NaN with 'b'"):
        best.merge(scores, np.tile(names, (2, 1)))
    best.add(np.array([[0.1, -np.inf], [np.inf, 0.2]], np.float32), names[:2])
    assert best.hits().doc_ids.tolist() == [["a", "b"], ["a", "b"]]
