import numpy as np
import pytest
from scipy.linalg import orthogonal_procrustes

from readapt_ray.retrieval import query_maps
from readapt_ray.retrieval.query_maps import QueryMap, fit_maps, lower_ranks, orthogonal, ridge_regression


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def texts(number, dimension, seed=0):
    """Vectors of unequal variance per direction, as those of models are."""
    random = np.random.default_rng(seed)
    return unit(random.normal(size=(number, dimension)) * np.linspace(2, 0.2, dimension))


def fitted(new, old):
    return {each.name.split(" ")[0]: each for each in reversed(list(fit_maps(new, old, seed=0, recall=lambda _: 0.0)))}


def overlap(scores, others):
    """The mean share of the ten best that two matrices of scores have in common."""
    found, truth = (np.argsort(-each, axis=1)[:, :10].tolist() for each in (scores, others))
    return float(np.mean([len({*a} & {*b}) / 10 for a, b in zip(found, truth, strict=True)]))


def test_a_rotated_model_is_rotated_back():
    new = texts(400, 24)
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(24, 24)))[0].astype(np.float32)
    maps, queries = fitted(new, new @ rotation), texts(20, 24, seed=5)
    np.testing.assert_allclose(maps["orthogonal"](queries), queries @ rotation, atol=1e-5)
    np.testing.assert_allclose(maps["affine"](queries), queries @ rotation, atol=5e-3)  # its ridge shrinks a little


def test_the_orthogonal_map_is_scipys():
    new, old = texts(300, 16), texts(300, 16, seed=1)
    expected, _ = orthogonal_procrustes(old - old.mean(0), new - new.mean(0))
    found = fitted(new, old)["orthogonal"].matrix.T
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(("smaller", "larger"), [((300, 12), (300, 20))])
def test_unlike_dimensions_give_orthonormal_rows_or_columns(smaller, larger):
    one, other = texts(*smaller), texts(*larger, seed=1)
    found = orthogonal(one.T @ other)
    np.testing.assert_allclose(found @ found.T, np.eye(12), atol=1e-5)
    assert fitted(one, other)["orthogonal"].matrix.shape == (12, 20)
    assert fitted(other, one)["residual"].matrix.shape == (20, 12)


def test_regressions_are_those_of_least_squares_drawn_to_a_map_and_their_best_low_rank():
    old, new = texts(200, 12), texts(200, 18, seed=1)
    old, new = (each.astype(np.float64) - each.mean(0) for each in (old, new))
    across, within = old.T @ new, old.T @ old
    start = orthogonal(across)
    strength = np.sqrt(0.1 * np.trace(within) / 12)
    rows, targets = np.vstack([old, strength * np.eye(12)]), np.vstack([new, strength * start])
    whole = ridge_regression(across, within, start, 0.1)
    np.testing.assert_allclose(whole, np.linalg.lstsq(rows, targets, rcond=None)[0], atol=1e-10)
    left, sizes, right = np.linalg.svd(rows @ whole, full_matrices=False)
    found = dict(lower_ranks(within, whole, 0.1))
    assert list(found) == [6, 3]
    for rank, matrix in found.items():
        best = (left[:, :rank] * sizes[:rank]) @ right[:rank]
        np.testing.assert_allclose(rows @ matrix, best, atol=1e-8)


def test_few_passages_take_a_stronger_ridge():
    """As many passages as dimensions, and a new model that is the old one rotated, with noise."""
    random = np.random.default_rng(4)
    old = texts(1000, 48)
    rotation = np.linalg.qr(random.normal(size=(48, 48)))[0].astype(np.float32)
    new = unit(old @ rotation + 0.05 * random.normal(size=(1000, 48)).astype(np.float32))

    def recall(rows):
        return lambda query_map: overlap(query_map(new[rows]) @ old[rows].T, new[rows] @ new[rows].T)

    choice, last = slice(48, 300), slice(300, 1000)
    maps = {each.name: each for each in fit_maps(new[:48], old[:48], seed=0, recall=recall(choice))}
    names = [f"affine with ridge {ridge:g}" for ridge in query_maps._RIDGES]
    weakest, strongest = (recall(last)(maps[name]) for name in (names[0], names[-1]))
    assert strongest > weakest + 0.02
    best = max((maps[name] for name in names), key=recall(choice))
    lower = dict(
        lower_ranks(
            *_of_ridge(new[:48], old[:48], float(best.name.split(" ")[-1])),
        )
    )
    np.testing.assert_allclose(maps["affine of rank 24"].matrix, lower[24].T, atol=1e-4)


def _of_ridge(new, old, ridge):
    """What `lower_ranks` takes."""
    new, old = (each.astype(np.float64) - each.mean(0) for each in (new, old))
    across, within = old.T @ new, old.T @ old
    return within, ridge_regression(across, within, orthogonal(across), ridge), ridge


def test_the_map_ranks_old_passages_as_the_new_model_ranks_new_ones():
    old = texts(500, 16)
    new = old @ np.random.default_rng(3).normal(size=(16, 24)).astype(np.float32)
    query_map = fitted(new[100:], old[100:])["affine"]
    truth = new[:20] @ new.T
    assert overlap(query_map(new[:20]) @ old.T, truth) > 0.98
    nearer = np.linalg.lstsq(new[100:], old[100:], rcond=None)[0]  # to the query as the old model would have encoded it
    assert overlap(new[:20] @ nearer @ old.T, truth) < 0.8


def test_the_residual_map_learns_what_no_matrix_can():
    old = texts(1500, 8)
    mixed = old @ np.random.default_rng(3).normal(size=(8, 16)).astype(np.float32)
    new = unit(np.maximum(mixed, 0.1 * mixed))
    held = slice(0, 100)

    def recall(query_map):
        return overlap(query_map(new[held]) @ old.T, new[held] @ new.T)

    maps = list(fit_maps(new[100:], old[100:], seed=0, recall=recall))
    recalls = {each.name: recall(each) for each in maps}
    assert recalls.pop("residual") > max(recalls.values()) + 0.02
    again = list(fit_maps(new[100:], old[100:], seed=0, recall=recall))
    np.testing.assert_allclose(again[-1].outward, maps[-1].outward, atol=1e-5)


def test_a_map_comes_back_from_its_bytes():
    maps, queries = fitted(texts(100, 8), texts(100, 6, seed=1)), texts(5, 8, seed=2)
    for name, each in maps.items():
        back = QueryMap.from_bytes(name, each.to_bytes())
        np.testing.assert_array_equal(back(queries), each(queries))
        np.testing.assert_allclose(np.linalg.norm(back(queries), axis=1), 1, atol=1e-6)
