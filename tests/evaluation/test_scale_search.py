"""Which pairs are tried, which is chosen, and what is said of it."""

import html.parser
import re

import numpy as np
import pytest
from scipy import stats

from readapt_ray.evaluation import plots, scale_report
from readapt_ray.evaluation.scale_search import RETRIEVER, best_pair, coarse_pairs, describe_search, finer_pairs, halves


def _values(gains, num_queries=40, noise=0.02):
    rng = np.random.default_rng(1)
    base = rng.random(num_queries) / 2
    return {
        pair: {f"q{number}": float(base[number] + gain + noise * rng.normal()) for number in range(num_queries)}
        for pair, gain in gains.items()
    }


GAINS = {RETRIEVER: 0.0, (1.0, 0.5): 0.2, (1.0, 1.0): 0.1, (0.5, 0.5): -0.1}


def test_the_coarse_grid_always_has_the_retriever_as_it_is():
    assert coarse_pairs([1.0], [0.5, 0.0]) == [(1.0, 0.5), (1.0, 0.0)]
    assert coarse_pairs([0.5], [0.5, 0.5]) == [(1.0, 0.0), (0.5, 0.5)]


def test_finer_pairs_lie_half_way_to_the_neighbours():
    line = [(1.0, scale) for scale in (0.0, 0.5, 1.0)]
    assert finer_pairs(line, (1.0, 0.5)) == [(1.0, 0.25), (1.0, 0.75)]
    assert finer_pairs(line, (1.0, 1.0)) == [(1.0, 0.75)]
    again = [*line, (1.0, 0.25), (1.0, 0.75)]
    assert finer_pairs(again, (1.0, 0.75)) == [(1.0, 0.625), (1.0, 0.875)]
    plane = coarse_pairs([0.5, 1.0], [0.0, 1.0])
    assert set(finer_pairs(plane, (1.0, 1.0))) == {(0.75, 1.0), (0.75, 0.5), (1.0, 0.5)}
    assert finer_pairs([(1.0, 0.0)], (1.0, 0.0)) == []


def test_the_half_that_reports_has_no_say():
    values = _values(GAINS)
    query_ids = sorted(values[RETRIEVER])
    tuning, reporting = halves(query_ids, 3)
    assert sorted([*tuning, *reporting]) == list(range(40))
    assert not set(tuning) & set(reporting)
    assert best_pair(values, 3) == (1.0, 0.5)
    for place in reporting:
        values[(0.5, 0.5)][query_ids[place]] += 100
    assert best_pair(values, 3) == (1.0, 0.5)
    for place in tuning:
        values[(0.5, 0.5)][query_ids[place]] += 100
    assert best_pair(values, 3) == (0.5, 0.5)


def test_of_equal_pairs_the_nearest_to_the_retriever_wins():
    assert best_pair(_values({(1.0, 1.0): 0.0, (1.0, 0.5): 0.0, RETRIEVER: -0.1}, noise=0), 0) == (1.0, 0.5)


def test_what_is_said_is_what_a_paired_computation_gives():
    values = _values(GAINS)
    result = describe_search(values, measure="nDCG@10", seed=5, queries="judged queries")
    query_ids = sorted(values[RETRIEVER])
    tuning, reporting = halves(query_ids, 5)
    cells = {(cell["readapter_scale"], cell["knowledge_scale"]): cell for cell in result["grid"]}
    assert cells.keys() == GAINS.keys()
    table = {pair: np.array([each[query_id] for query_id in query_ids]) for pair, each in values.items()}
    for pair, cell in cells.items():
        difference = table[pair][tuning] - table[RETRIEVER][tuning]
        assert cell["difference"] == pytest.approx(difference.mean())
        assert cell["tuning"] == pytest.approx(table[pair][tuning].mean())
        assert cell["reporting"] == pytest.approx(table[pair][reporting].mean())
        if pair != RETRIEVER:
            spread = stats.sem(difference)
            assert np.diff(cell["interval"])[0] == pytest.approx(2 * 1.96 * spread, rel=0.15)
    assert cells[RETRIEVER]["interval"] == [0, 0]
    gain = (table[(1.0, 0.5)] - table[RETRIEVER])[reporting]
    assert result["reported"]["difference"] == pytest.approx(gain.mean())
    assert result["reported"]["num_queries"] == result["num_reporting"] == 20
    by_layer = "Knowledge scales are multiplied by a factor in the layers 0-11=0.8, 12-23=0.2."
    assert by_layer not in scale_report.to_markdown(result)
    assert by_layer in scale_report.to_markdown(result | {"layer_scales": ["0-11=0.8", "12-23=0.2"]})
    said = scale_report.verdict(result)
    assert said.startswith(
        "Best is readapter_scale 1, knowledge_scale 0.5. On the 20 queries that did not choose it: this pair is"
    )


def test_no_pair_is_better_is_said_as_that():
    result = describe_search(
        _values({RETRIEVER: 0.0, (1.0, 1.0): -0.2}), measure="AP", seed=0, queries="judged queries"
    )
    assert scale_report.verdict(result).startswith("No pair of scales is better than the retriever as it is")


class _Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.open = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        assert not {name for name, _ in attrs} & {"src", "href"}
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("queries", ["judged queries", "pseudo-queries made from the corpus"])
@pytest.mark.parametrize("num_queries", [2, 40])
def test_the_page_is_whole_marks_the_best_and_names_pseudo_queries(queries, num_queries):
    result = describe_search(_values(GAINS, num_queries), measure="nDCG@10", seed=0, queries=queries)
    text, markdown = scale_report.to_html(result), scale_report.to_markdown(result)
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert "script" not in page.tags
    assert not re.search(r"url\(|@import|https?://", text)
    assert page.tags.count("circle") == len(GAINS)
    assert text.count("✓ best") == 1
    for each in (text, markdown):
        assert queries in each
        assert ("say nothing of how good" in each) == queries.startswith("pseudo")
    assert markdown.count("\n| ") == len(GAINS) + 2


def test_the_curve_stays_inside_its_frame():
    for points in (
        [plots.Point(0.0, 0.0, 0.0, 0.0)],
        [plots.Point(0.0, 0.0, 0.0, 0.0), plots.Point(1.0, -0.3, -0.5, -0.1)],
        [plots.Point(-1.0, 2e-5, 1e-5, 3e-5), plots.Point(4.0, 8e-5, 1e-5, 9e-5)],
    ):
        drawing = str(plots.scale_plot({"a <b>": points, "other": points}, axis="scale", description="x"))
        assert "<b>" not in drawing
        for value in re.findall(r'\b(?:cy|y1|y2)="([-\d.]+)"', drawing):
            assert 0 < float(value) < 240
        for value in re.findall(r'\b(?:cx|x1|x2)="([-\d.]+)"', drawing):
            assert 0 < float(value) < 760
