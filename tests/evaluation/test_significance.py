import numpy as np
import pytest
import scipy.stats

from readapt_ray.errors import InputError
from readapt_ray.evaluation.significance import (
    ONE_QUERY,
    bootstrap_interval,
    combine,
    compare,
    detectable_difference,
    holm,
    paired,
    randomisation_test,
)


def _differences(num_queries, seed=0, shift=0.1):
    return np.round(np.random.default_rng(seed).normal(shift, 0.3, num_queries), 2)


def _scipy_p(differences, num_resamples):
    return scipy.stats.permutation_test(
        (differences,),
        lambda values, axis: values.mean(axis=axis),
        permutation_type="samples",
        n_resamples=num_resamples,
        vectorized=True,
        rng=0,
    ).pvalue


@pytest.mark.parametrize("num_queries", [2, 3, 5, 9, 13])
def test_few_queries_give_scipys_exact_p_value(num_queries):
    differences = _differences(num_queries, seed=num_queries)
    p_value = randomisation_test(differences[:, None], num_permutations=10_000)[0]
    assert p_value == pytest.approx(_scipy_p(differences, 10_000), abs=1e-12)


def test_many_queries_agree_with_scipy_and_with_the_t_test():
    differences = _differences(400, shift=0.025)
    p_value = randomisation_test(differences[:, None], num_permutations=20_000)[0]
    assert p_value == pytest.approx(_scipy_p(differences, 20_000), abs=0.02)
    assert p_value == pytest.approx(scipy.stats.ttest_1samp(differences, 0).pvalue, abs=0.02)
    assert 0.01 < p_value < 0.9


def test_the_drawn_p_value_has_the_plus_one_and_is_never_zero():
    assert randomisation_test(np.ones((40, 1)), num_permutations=999)[0] == 1 / 1000
    assert randomisation_test(np.zeros((40, 1)), num_permutations=999)[0] == 1.0


def test_p_values_are_uniform_where_there_is_no_difference():
    columns = np.random.default_rng(5).normal(size=(30, 2000))
    p_values = randomisation_test(columns, num_permutations=2000)
    assert (p_values <= 0.05).mean() == pytest.approx(0.05, abs=0.02)
    assert p_values.mean() == pytest.approx(0.5, abs=0.03)


def test_columns_are_tested_as_if_alone_and_the_seed_decides():
    columns = np.stack([_differences(50, seed=seed, shift=0.03) for seed in range(3)], axis=1)
    together = randomisation_test(columns, num_permutations=5000, seed=7)
    alone = [randomisation_test(columns[:, [index]], num_permutations=5000, seed=7)[0] for index in range(3)]
    np.testing.assert_array_equal(together, alone)
    assert not np.array_equal(together, randomisation_test(columns, num_permutations=5000, seed=8))


def test_the_bootstrap_interval_agrees_with_scipy():
    differences = _differences(80)
    expected = scipy.stats.bootstrap(
        (differences,), np.mean, method="percentile", n_resamples=20_000, rng=0
    ).confidence_interval
    found = bootstrap_interval(differences[:, None], num_resamples=20_000, seed=1)[:, 0]
    np.testing.assert_allclose(found, expected, atol=0.004)
    narrow = bootstrap_interval(differences[:, None], num_resamples=20_000, confidence=0.5, seed=1)[:, 0]
    assert found[0] < narrow[0] < differences.mean() < narrow[1] < found[1]


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


def _values(*runs, measure="AP"):
    return {f"run{number}": {measure: np.array(values)} for number, values in enumerate(runs)}


def test_a_comparison_says_means_and_wins():
    [found] = compare(_values([0.1, 0.5, 0.3, 0.0], [0.2, 0.5 + 1e-12, 0.1, 0.0]))
    assert (found.run, found.baseline, found.measure, found.num_queries) == ("run1", "run0", "AP", 4)
    assert (found.wins, found.ties, found.losses) == (1, 2, 1)
    assert found.difference == pytest.approx(-0.025)
    assert found.mean - found.baseline_mean == pytest.approx(found.difference)
    assert found.interval[0] <= found.difference <= found.interval[1]
    assert found.p_value == found.p_holm == 1.0


def test_what_rounding_alone_tells_apart_is_the_same():
    values = np.linspace(0.1, 0.9, 20)
    [found] = compare(_values(values, values + 1e-12))
    assert (found.ties, found.difference, found.interval, found.p_value) == (20, 0.0, (0.0, 0.0), 1.0)


def test_several_runs_are_corrected_per_measure():
    rng = np.random.default_rng(1)
    base = rng.random(60)
    values = _values(base, base + rng.normal(0.03, 0.1, 60), base + rng.normal(0.04, 0.1, 60))
    for name in values:
        values[name]["RR"] = values[name]["AP"] ** 2
    found = compare(values, num_permutations=5000)
    assert [(each.measure, each.run) for each in found] == [
        ("AP", "run1"),
        ("AP", "run2"),
        ("RR", "run1"),
        ("RR", "run2"),
    ]
    for measure in ("AP", "RR"):
        group = [each for each in found if each.measure == measure]
        assert [each.p_holm for each in group] == holm([each.p_value for each in group])


def test_one_query_admits_no_test():
    [found] = compare(_values([0.1], [0.9]))
    assert found.note == ONE_QUERY
    assert found.p_value is found.p_holm is found.interval is None
    assert (found.wins, found.num_queries) == (1, 1)


def test_one_run_has_nothing_to_be_compared_with():
    assert compare(_values([0.1, 0.2])) == []


def test_what_cannot_be_paired_is_refused():
    with pytest.raises(InputError, match="2 and 3 values cannot be paired"):
        paired(np.zeros(2), np.zeros(3))
    with pytest.raises(InputError, match="one or more"):
        paired(np.zeros(0), np.zeros(0))


def test_one_set_of_queries_combined_is_the_plain_test():
    differences = _differences(40)
    combined = combine([differences])
    plain = compare({"base": {"m": np.zeros(40)}, "run": {"m": differences}})[0]
    assert combined.difference == pytest.approx(plain.difference)
    assert combined.interval == pytest.approx(plain.interval)
    assert combined.p_value == pytest.approx(plain.p_value)


def test_each_set_of_queries_has_the_same_weight():
    assert combine([np.full(300, 0.1), np.full(10, 0.3)]).difference == pytest.approx(0.2)


def test_a_small_difference_in_every_set_is_found_by_all_together():
    sets = [_differences(150, seed=seed, shift=0.03) for seed in (11, 12, 14, 16)]
    assert min(randomisation_test(each[:, None])[0] for each in sets) > 0.05
    assert combine(sets).p_value < 0.01


def test_a_detectable_difference_is_found_in_four_of_five_studies():
    sizes = (40, 80)
    detectable = detectable_difference([np.tile([0.3, -0.3], size // 2) for size in sizes])
    rng = np.random.default_rng(0)
    studies = [[rng.normal(detectable, 0.3, size) for size in sizes] for _ in range(300)]
    weighted = [np.concatenate([each / len(each) for each in study])[:, None] for study in studies]
    found = np.mean([randomisation_test(each, num_permutations=500)[0] < 0.05 for each in weighted])
    assert 0.7 < found < 0.9
