import numpy as np
import pytest

from readapt_ray.evaluation.bridge_recall import BridgeQueries, measure_bridge, nearest, objection
from readapt_ray.retrieval.neighbours import overlaps
from readapt_ray.retrieval.query_maps import QueryMap


def test_the_nearest_are_numpys_but_for_the_query_itself():
    vectors = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    own = np.arange(40, 60)
    scores = vectors[own] @ vectors.T
    scores[np.arange(20), own] = -np.inf
    expected = np.argsort(-scores, axis=1)[:, :10]
    assert [set(row) for row in nearest(vectors[own], vectors, own).tolist()] == [set(row) for row in expected.tolist()]


def test_recall_is_the_share_of_the_true_ten():
    truth = np.arange(10)[None].repeat(2, axis=0)
    assert overlaps(np.array([np.arange(5, 15), np.arange(10)]), truth).tolist() == [0.5, 1.0]


def test_a_bridge_that_is_the_identity_finds_all_and_beats_old_queries_that_are_noise():
    random = np.random.default_rng(0)
    passages, queries = random.normal(size=(2, 200, 8)).astype(np.float32)
    noise = random.normal(size=(200, 8)).astype(np.float32)
    found = measure_bridge(
        QueryMap("orthogonal", np.eye(8, dtype=np.float32)), BridgeQueries(queries, noise), passages, passages
    )
    assert (found["num_queries"], found["bridged"]) == (200, {"mean": 1.0, "interval": [1.0, 1.0]})
    low, high = found["difference"]["interval"]
    assert found["difference"]["mean"] == pytest.approx(1 - found["old_queries"]["mean"], abs=1e-4)
    assert low < found["difference"]["mean"] < high
    assert objection(found) == ""


@pytest.mark.parametrize(
    ("bridged", "difference", "expected"),
    [
        (0.24, [0.1, 0.2], "finds 24% of the new model's 10 best, and a bridge that finds under 25%"),
        (0.8, [-0.01, 0.1], "finds 80.0% of the new model's 10 best, and the old model's own queries find 70.0%"),
        (0.8, [0.05, 0.15], None),
        (0.8, None, None),
    ],
)
def test_what_speaks_against_a_bridge(bridged, difference, expected):
    measured = {"bridged": {"mean": bridged}}
    if difference:
        measured |= {"old_queries": {"mean": 0.7}, "difference": {"interval": difference}}
    assert expected in objection(measured) if expected else objection(measured) == ""
