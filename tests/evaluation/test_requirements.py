"""Ship or not: what a requirement says, and when it holds."""

import numpy as np
import pytest

from readapt_ray.errors import InputError
from readapt_ray.evaluation.measures import parse_measures
from readapt_ray.evaluation.requirements import check_requirements, parse_requirement
from readapt_ray.evaluation.significance import compare

MEASURES = ("nDCG@10", "R@100", "nDCG(gains={0:0,1:1})@10")


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("nDCG@10 >= base - 0.005", ("nDCG@10", -0.005, True)),
        ("nDCG@10>=base-.005", ("nDCG@10", -0.005, True)),
        ("R@100 >= base + 0.01", ("R@100", 0.01, True)),
        ("R@100 >= base", ("R@100", 0.0, True)),
        (" R@100 >= 0.3 ", ("R@100", 0.3, False)),
        ("R@100 >= base - 1e-3", ("R@100", -0.001, True)),
        ("R@100 >= 5E-05", ("R@100", 0.00005, False)),
        ("nDCG(gains={0:0,1:1})@10 >= base", ("nDCG(gains={0:0,1:1})@10", 0.0, True)),
    ],
)
def test_a_requirement_is_read(text, parsed):
    found = parse_requirement(text, MEASURES)
    assert found[1:] == (*parsed, False)
    assert found.text == text.strip()
    general = parse_requirement(f"general {text.strip()}", ("other",), MEASURES)
    assert general[1:] == (*parsed, True)


@pytest.mark.parametrize("asked", ["MRR@10", "RR@10", "nDCG(gains={0:0,1:1})@10", "NDCG(gains={})@10"])
def test_a_measure_is_known_by_each_of_its_names(asked):
    for spelled in (
        ["MRR@10", "nDCG(gains={0:0,1:1})@10"],
        list(parse_measures(["MRR@10", "nDCG(gains={0:0,1:1})@10"])),
    ):
        found = parse_requirement(f"{asked} >= base", spelled)
        assert found.measure in spelled, "as it is measured: evaluate knows canonical names, a run what the user wrote"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nDCG@10 > base", "must be MEASURE >= base - MARGIN"),
        ("nDCG@10 >= best", "must be MEASURE >= base - MARGIN"),
        (">= base", "must be MEASURE >= base - MARGIN"),
        ("nDGC@10 >= base", "'nDGC@10' is not measured; did you mean 'nDCG@10'"),
        ("RR@7 >= base", "'RR@7' is not measured; measured are nDCG@10, R@100"),
        ("general nDCG@10 >= base", "no general collection is measured; give its report with --general"),
    ],
)
def test_what_is_no_requirement_is_refused(text, said):
    with pytest.raises(InputError, match=said):
        parse_requirement(text, MEASURES)


def checked(text, differences):
    """Whether a requirement holds for a run that differs from the baseline by this much, query by query."""
    base = np.full(len(differences), 0.5)
    values = {"base": {"nDCG@10": base}, "new": {"nDCG@10": base + differences}}
    means = {name: {"nDCG@10": float(each["nDCG@10"].mean())} for name, each in values.items()}
    (found,) = check_requirements([parse_requirement(text, MEASURES)], means, compare(values))
    return found


def test_non_inferiority_needs_the_whole_interval_above_the_margin():
    noise = np.random.default_rng(0).normal(0.0, 0.1, 400)
    noise -= noise.mean()
    half = 1.96 * noise.std() / np.sqrt(400)
    assert checked("nDCG@10 >= base - 0.02", noise)["holds"]
    assert 0.005 < half < 0.02
    wide = checked("nDCG@10 >= base - 0.005", noise)
    assert not wide["holds"], "the mean is the same, but a loss of 0.005 is not excluded"
    assert "nDCG@10 >= base - 0.005 does not hold (difference" in wide["sentence"]
    assert checked("nDCG@10 >= base + 0.01", noise + 0.03)["holds"]
    assert not checked("nDCG@10 >= base", noise - 0.03)["holds"]
    assert checked("nDCG@10 >= base", np.zeros(5))["holds"]
    assert not checked("nDCG@10 >= base", np.zeros(1))["holds"], "one query tests nothing"


def test_a_number_is_compared_with_the_mean_also_of_one_run():
    assert checked("nDCG@10 >= 0.5", np.zeros(3))["holds"]
    assert not checked("nDCG@10 >= 0.51", np.zeros(3))["holds"]
    (alone,) = check_requirements([parse_requirement("R@100 >= 0.4", MEASURES)], {"only": {"R@100": 0.4}}, [])
    assert (alone["run"], alone["holds"]) == ("only", True)
    with pytest.raises(InputError, match="compares with the first run, and there is no other"):
        check_requirements([parse_requirement("R@100 >= base", MEASURES)], {"only": {"R@100": 0.4}}, [])
