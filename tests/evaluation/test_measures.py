import math
import time

import numpy as np
import pytest
import pytrec_eval

import readapt_ray
from readapt_ray.cluster.scale_scoring import Sample, measure_sample
from readapt_ray.errors import InputError
from readapt_ray.evaluation.measure_options import depth_of
from readapt_ray.evaluation.measures import (
    describe_measures,
    group_judgements,
    known_measures,
    measure_run,
    parse_measures,
    recall_curve,
)
from readapt_ray.evaluation.runs import Run, load_run
from readapt_ray.records import Passage, Qrel, Query, ScoredDoc


def _run(**results):
    return Run.of(
        {
            query_id: [ScoredDoc(query_id, doc_id, -rank) for rank, doc_id in enumerate(docs)]
            for query_id, docs in results.items()
        }
    )


JUDGEMENTS = group_judgements(
    [Qrel("q1", "a", 2), Qrel("q1", "b", 1), Qrel("q1", "x", 0), Qrel("q2", "c", 1), Qrel("q3", "d", 1)]
)


def test_values_equal_a_hand_count():
    measured = measure_run(
        _run(q1=["x", "b", "a"], q2=["c"]), JUDGEMENTS, parse_measures("nDCG@10,R@2,RR@10,AP,Success@1,P@2")
    )
    assert measured.query_ids == ("q1", "q2", "q3")
    gain = 1 / math.log2(3) + 2 / math.log2(4)
    ideal = 2 / math.log2(2) + 1 / math.log2(3)
    expected = {
        "nDCG@10": [gain / ideal, 1, 0],
        "R@2": [0.5, 1, 0],
        "RR@10": [0.5, 1, 0],
        "AP": [(1 / 2 + 2 / 3) / 2, 1, 0],
        "Success@1": [0, 1, 0],
        "P@2": [0.5, 0.5, 0],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(measured.values[name], values, rtol=1e-12)
        assert measured.means[name] == pytest.approx(sum(values) / 3)


def test_one_call_measures_a_run_as_pytrec_eval_does(tmp_path):
    random = np.random.default_rng(3)
    qrels = {f"q{q}": {f"d{d}": int(random.integers(3)) for d in random.permutation(60)[:20]} for q in range(5)}
    run = {f"q{q}": {f"d{d}": float(random.integers(8)) for d in random.permutation(60)[:30]} for q in range(4)}
    (tmp_path / "run.trec").write_text(
        "".join(f"{q} Q0 {d} 0 {score} t\n" for q, scores in run.items() for d, score in scores.items())
    )
    (tmp_path / "qrels.tsv").write_text("".join(f"{q}\t{d}\t{r}\n" for q, j in qrels.items() for d, r in j.items()))
    expected = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recall.20"}).evaluate(run)
    from_values = readapt_ray.measure(run, qrels, "nDCG@10,R@20")
    from_files = readapt_ray.measure(str(tmp_path / "run.trec"), str(tmp_path / "qrels.tsv"), ["ndcg@10", "R@20"])
    for found in (from_values, from_files):
        assert found.query_ids == ("q0", "q1", "q2", "q3", "q4")
        for name, key in (("nDCG@10", "ndcg_cut_10"), ("R@20", "recall_20")):
            values = [expected[f"q{q}"][key] for q in range(4)] + [0.0]
            np.testing.assert_allclose(found.values[name], values, rtol=1e-12)
            assert found.means[name] == pytest.approx(sum(values) / 5)


def test_one_call_refuses_what_cannot_be_measured():
    with pytest.raises(InputError, match="unknown measure 'nDGC@10'"):
        readapt_ray.measure({"q": {"d": 1.0}}, {"q": {"d": 1}}, "nDGC@10")
    with pytest.raises(InputError, match="none of its 1 queries"):
        readapt_ray.measure({"q": {"d": 1.0}}, {"p": {"d": 1}}, "R@1")
    with pytest.raises(InputError, match="judgements are empty"):
        readapt_ray.measure({"q": {"d": 1.0}}, {}, "R@1")
    with pytest.raises(InputError, match="is nan, not a finite number"):
        readapt_ray.measure({"q": {"d": math.nan}}, {"q": {"d": 1}}, "R@1")


def test_every_measure_is_described_in_a_sentence():
    names = ["nDCG@10", "MRR@10", "IPrec@0.5", "SetAP"]
    described = describe_measures(names)
    assert list(described) == ["nDCG@10", "RR@10", "IPrec@0.5", "SetAP"]
    assert described["RR@10"] == "The reciprocal of the rank of the first relevant document."
    assert all(each[0].isupper() and each.endswith(".") for each in described.values())


def test_queries_without_results_count_as_zero_and_those_without_judgements_do_not_count():
    measured = measure_run(_run(q1=["a", "b"], extra=["a"]), JUDGEMENTS, parse_measures("R@10"))
    assert measured.without_results == ("q2", "q3")
    assert measured.without_judgements == ("extra",)
    assert measured.means["R@10"] == pytest.approx(1 / 3)


def test_a_query_judged_only_irrelevant_counts_as_zero():
    measured = measure_run(_run(q=["a"], p=["a"]), {"q": {"a": 0}, "p": {"a": 1}}, parse_measures("nDCG@10,RR@10,AP"))
    assert measured.means == {"nDCG@10": 0.5, "RR@10": 0.5, "AP": 0.5}


def test_names_in_many_spellings():
    assert list(parse_measures("MRR@10, nDCG@10,P(rel=2)@5 ,AP")) == ["RR@10", "nDCG@10", "P(rel=2)@5", "AP"]
    assert list(parse_measures(["nDCG@10,AP", "R@5"])) == ["nDCG@10", "AP", "R@5"]


@pytest.mark.parametrize("name", ["foo", "nDGC@10", "alpha_nDCG@10", "NumRel", "__import__('os').system('x')@3"])
def test_an_unknown_measure_lists_what_is_known(name):
    with pytest.raises(InputError, match="unknown measure") as raised:
        parse_measures(name)
    assert all(family in str(raised.value) for family in ("nDCG", "AP", "Success", *known_measures()))


@pytest.mark.parametrize("name", ["nDCG@0", "nDCG@-3", "nDCG@ten", "nDCG@1.5", "R", "nDCG(foo=1)@3", "P@"])
def test_a_cutoff_that_makes_no_sense_is_refused(name):
    with pytest.raises(InputError, match=r"cannot be computed.*whole number from 1 on"):
        parse_measures(name)


def test_case_does_not_matter_and_none_is_refused():
    assert list(parse_measures("ndcg@10, ap,rR@5")) == ["nDCG@10", "AP", "RR@5"]
    with pytest.raises(InputError, match="no measure given"):
        parse_measures(" ,")


def test_every_known_measure_is_computed():
    run = _run(q1=["x", "b", "a"], q2=["c"])
    for family in known_measures():
        name = (
            f"{family}@{0.5 if family == 'IPrec' else 10}"
            if family in {"R", "P", "Success", "Judged", "IPrec"}
            else family
        )
        values = measure_run(run, JUDGEMENTS, parse_measures(name)).values
        assert np.isfinite(next(iter(values.values()))).all(), family


def test_no_query_in_common_is_refused_with_examples_of_both():
    with pytest.raises(
        InputError, match=r"base\.trec: none of its 1 queries \('z9'\) is among the 3 judged ones \('q1', 'q2', 'q3'\)"
    ):
        measure_run(_run(z9=["a"]), JUDGEMENTS, parse_measures("AP"), name="base.trec")
    with pytest.raises(InputError, match="none of its 0 queries"):
        measure_run(Run.of({}), JUDGEMENTS, parse_measures("AP"))


def test_judgements_that_contradict_or_are_none_are_refused():
    with pytest.raises(InputError, match="relevance 1 and 2"):
        group_judgements([Qrel("q", "d", 1), Qrel("q", "d", 2)])
    with pytest.raises(InputError, match="empty"):
        group_judgements([])


def _random_case(seed=0, num_queries=30, depth=60, scores="distinct"):
    """Judgements from -1 to 2; scores that are distinct, tied, or distinct and tied where trec_eval compares them."""
    rng = np.random.default_rng(seed)
    results, judgements = {}, {}
    for number in range(num_queries):
        docs = rng.permutation(200)[:depth]
        drawn = rng.normal(size=depth) if scores == "distinct" else 1.0 + rng.integers(0, 8, depth)
        drawn = drawn + 1e-10 * rng.random(depth) if scores == "tied in float32" else drawn
        query_id = f"q{number}"
        results[query_id] = [
            ScoredDoc(query_id, f"d{doc}", float(score)) for doc, score in zip(docs, drawn, strict=True)
        ]
        judgements[query_id] = {f"d{doc}": int(rng.integers(-1, 3)) for doc in rng.permutation(200)[:40]}
    return Run.of(results), judgements


def _by_trec_eval(run, judgements, names):
    """What pytrec_eval gives for each judged query of the run, by its own names."""
    nested = {
        query_id: {doc.doc_id: doc.score for doc in run.top(index)} for index, query_id in enumerate(run.query_ids)
    }
    return pytrec_eval.RelevanceEvaluator(judgements, names).evaluate(nested)


@pytest.mark.parametrize("scores", ["distinct", "tied", "tied in float32"])
def test_every_value_is_trec_evals_and_looking_only_at_the_top_changes_nothing(scores):
    run, judgements = _random_case(scores=scores)
    same = {"nDCG@3": "ndcg_cut_3", "R@5": "recall_5", "P@5": "P_5", "Success@2": "success_2", "AP@7": "map_cut_7"}
    same |= {"nDCG": "ndcg", "AP": "map", "RR": "recip_rank"}
    expected = _by_trec_eval(
        run, judgements, {"ndcg_cut.3", "recall.5", "P.5", "success.2", "map_cut.7", "ndcg", "map"}
    )
    first_hits = _by_trec_eval(run, judgements, {"recip_rank"})
    values = measure_run(run, judgements, parse_measures([*same, "RR@4"])).values
    for place, query_id in enumerate(judgements):
        theirs = expected[query_id] | first_hits[query_id]
        for ours, name in same.items():
            assert values[ours][place] == pytest.approx(theirs[name], rel=1e-12), (query_id, ours)
        assert values["RR@4"][place] == pytest.approx(theirs["recip_rank"] if theirs["recip_rank"] >= 1 / 4 else 0)


@pytest.mark.parametrize("found", ["d00", "d19"])
def test_all_measures_and_the_curve_break_a_tie_alike(found):
    """trec_eval puts the last doc_id first: of 20 documents of one score, d19 comes first and d00 last."""
    run = Run.of({"q": [ScoredDoc("q", f"d{number:02d}", 1.0) for number in range(20)]})
    judgements = {"q": {found: 1}}
    values = measure_run(run, judgements, parse_measures("R@5,nDCG@5,RR@5,AP@5,Success@5,Judged@5,RR")).values
    first = found == "d19"
    expected = {"R@5": first, "nDCG@5": first, "RR@5": first, "AP@5": first, "Success@5": first, "Judged@5": first / 5}
    assert {name: value[0] for name, value in values.items()} == expected | {"RR": 1 if first else 1 / 20}
    assert recall_curve(run, judgements, [1, 5, 20]) == [first, first, 1]


def test_the_recall_curve_equals_recall_at_each_cutoff():
    run, judgements = _random_case(seed=3)
    judgements |= {"without results": {"d1": 1}, "without either": {"d1": 0}, run.query_ids[1]: {"d1": 0, "d2": -1}}
    judgements[run.query_ids[0]] |= {"nowhere in the run": 1}
    cutoffs = [1, 2, 5, 10, 60, 100]
    means = measure_run(run, judgements, parse_measures([f"R@{cutoff}" for cutoff in cutoffs])).means
    np.testing.assert_allclose(recall_curve(run, judgements, cutoffs), list(means.values()), rtol=1e-12)
    assert recall_curve(run, {"nobody": {"d1": 1}}, cutoffs) == [0.0] * len(cutoffs)


@pytest.mark.slow
def test_ten_million_results_take_less_than_twenty_seconds(tmp_path):
    rng = np.random.default_rng(0)
    lines = [f" {rank} {1 - rank / 2000} t\n" for rank in range(1, 1001)]
    with (tmp_path / "big.trec").open("w") as file:
        for query in range(10_000):
            start = int(rng.integers(0, 1_000_000))
            file.write("".join(f"q{query} Q0 doc{start + rank * 7}{lines[rank]}" for rank in range(1000)))
    judgements = {f"q{query}": {f"doc{number}": 1 for number in range(20)} for query in range(10_000)}
    started_s = time.process_time()  # of all threads together, so that other work on the machine does not count
    measured = measure_run(load_run(str(tmp_path / "big.trec")), judgements, parse_measures("nDCG@10,R@100,RR@10"))
    assert time.process_time() - started_s < 20
    assert len(measured.query_ids) == 10_000


def test_runs_are_as_deep_as_their_measures_and_1000_deep_for_one_that_looks_at_all_results():
    found = {name: depth_of(name) for name in ("nDCG@10", "R@100", "R@200,RR@10", "AP", "nDCG@10,RR", "Rprec,R@2000")}
    assert found == {
        "nDCG@10": 100,
        "R@100": 100,
        "R@200,RR@10": 200,
        "AP": 1000,
        "nDCG@10,RR": 1000,
        "Rprec,R@2000": 2000,
    }


def test_a_sample_is_measured_by_all_of_its_passages_where_the_measure_looks_at_all():
    passages = [Passage(f"d{place:03d}", "", "text") for place in range(300)]
    sample = Sample(passages, [Query("q", "text")], {"q": {"d000": 1, "d149": 1}})
    scores = np.linspace(1, 0, 300)[None]
    assert measure_sample(sample, scores, "AP").means["AP"] == pytest.approx((1 / 1 + 2 / 150) / 2)
