import faiss
import numpy as np
import pytest

from readapt_ray.errors import InputError
from readapt_ray.retrieval.index_kinds import IndexOptions, IndexSpec, index_spec
from readapt_ray.retrieval.index_recall import calibrate
from readapt_ray.retrieval.index_shard import build_shard


def _vectors(num_vectors=2000, dimension=24, spread=0.7):
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(60, dimension))
    vectors = centres[rng.integers(0, 60, num_vectors)] + spread * rng.normal(size=(num_vectors, dimension))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def _made(options, vectors):
    made = index_spec(options, len(vectors), vectors.shape[1])
    doc_ids = [str(row) for row in range(len(vectors))]
    return made, build_shard(made.factory, vectors.shape[1], [(doc_ids, vectors)]).index


def _recall_by_hand(index, vectors, rank):
    """Over all vectors, each without itself: the share of its true neighbours that is found."""
    scores = vectors @ vectors.T
    np.fill_diagonal(scores, -np.inf)
    _, found = index.search(vectors, rank + 1)
    shares = []
    for row, each in enumerate(found):
        others = [other for other in each if other not in (row, -1)][:rank]
        shares.append(len(set(others) & set(np.argsort(-scores[row])[:rank])) / rank)
    return np.mean(shares)


@pytest.mark.parametrize("kind", ["ivf-flat", "hnsw", "ivf-pq", "rabitq"])
def test_the_least_depth_that_reaches_the_recall(kind):
    vectors = _vectors()
    options = IndexOptions(kind=kind, min_recall=0.9)
    made, index = _made(options, vectors)
    measured = calibrate(index, vectors, made, options)
    assert 0.9 <= measured.recall_at_10 <= 1 and 0.9 <= measured.recall_at_100 <= 1 and measured.query_ms > 0
    assert measured.recall_at_10 == pytest.approx(_recall_by_hand(index, vectors, 10), abs=0.05)
    assert measured.recall_at_100 == pytest.approx(_recall_by_hand(index, vectors, 100), abs=0.05)
    again = faiss.deserialize_index(faiss.serialize_index(index))
    np.testing.assert_array_equal(again.search(vectors[:50], 10)[1], index.search(vectors[:50], 10)[1])
    if measured.depth > {"nprobe": 1, "efSearch": 16}[made.depth_parameter]:
        faiss.ParameterSpace().set_index_parameter(index, made.depth_parameter, measured.depth // 2)
        assert min(_recall_by_hand(index, vectors, rank) for rank in (10, 100)) < 0.93


def test_lists_that_hold_the_10_best_but_not_the_100_best_are_too_few():
    vectors = _vectors(spread=0.1)
    options = IndexOptions(kind="ivf-flat", min_recall=0.95)
    made, index = _made(options, vectors)
    measured = calibrate(index, vectors, made, options)
    assert measured.recall_at_10 >= 0.95 and measured.recall_at_100 >= 0.95
    index.nprobe = measured.depth // 2
    assert _recall_by_hand(index, vectors, 10) >= 0.95 > _recall_by_hand(index, vectors, 100)


def test_flat_in_float32_has_recall_one():
    vectors = _vectors(500)
    options = IndexOptions(kind="flat", min_recall=1.0)
    made, index = _made(options, vectors)
    measured = calibrate(index, vectors, made, options)
    assert (measured.recall_at_10, measured.recall_at_100, measured.depth) == (1.0, 1.0, None)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (IndexOptions(kind="ivf-flat", depth=1, min_recall=0.99), r"raise --depth \(nprobe, 1 now\)"),
        (
            IndexOptions(kind="ivf-pq", refine=False, code_bytes=2, min_recall=0.9),
            "raise --code-bytes, or give --refine",
        ),
        (IndexOptions(kind="rabitq", refine=False, min_recall=0.9), "give --refine, or lower --min-recall"),
        (IndexOptions(kind="flat", storage="int8", min_recall=1.0), "give --storage float16"),
    ],
)
def test_what_finds_too_little_is_refused_and_says_what_to_raise(options, named):
    vectors = _vectors()
    made, index = _made(options, vectors)
    with pytest.raises(InputError, match=f"finds 0.* of the 10 best and 0.* of the 100 best, .* of both; {named}"):
        calibrate(index, vectors, made, options)


def test_few_vectors():
    vectors = _vectors(3)
    exact = IndexSpec(factory="Flat", depth_parameter=None, is_exact=True)
    index = build_shard(exact.factory, 24, [(["a", "b", "c"], vectors)]).index
    assert calibrate(index, vectors, exact, IndexOptions()).recall_at_10 == 1.0
