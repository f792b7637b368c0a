import numpy as np
import pytest

from readapt_ray.retrieval import neighbours


@pytest.fixture
def pair():
    random = np.random.default_rng(0)
    before = random.normal(size=(700, 16)).astype(np.float32)
    return before, (before + 0.2 * random.normal(size=before.shape)).astype(np.float32)


def test_cosines_are_those_of_each_pair(pair):
    before, after = pair
    by_hand = [one @ other / np.sqrt((one @ one) * (other @ other)) for one, other in zip(*pair, strict=True)]
    np.testing.assert_allclose(neighbours.cosines(before, after), by_hand, rtol=1e-5)


def test_shares_are_those_of_two_whole_sorts_and_a_vector_is_no_neighbour_of_itself(pair):
    def best(vectors):
        scores = vectors @ vectors.T
        return [[int(each) for each in np.argsort(-row) if each != place][:10] for place, row in enumerate(scores)]

    due = [len({*one} & {*other}) / 10 for one, other in zip(best(pair[0]), best(pair[1]), strict=True)]
    found = neighbours.shares_kept(*pair)
    np.testing.assert_allclose(found, due)
    assert 0.3 < found.mean() < 1
    assert neighbours.shares_kept(pair[0], 2 * pair[0]).min() == 1


def test_eleven_vectors_have_all_others_as_neighbours_though_they_point_away():
    vectors = np.eye(11, dtype=np.float32) - 1 / 11
    assert [sorted(row) for row in neighbours.nearest(vectors).tolist()] == [
        [other for other in range(11) if other != each] for each in range(11)
    ]
