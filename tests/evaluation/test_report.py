import html.parser
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from readapt_ray.evaluation import plots, scale_report
from readapt_ray.evaluation.measures import measure_run, parse_measures
from readapt_ray.evaluation.report import build_report, to_html, to_json, to_markdown
from readapt_ray.evaluation.runs import Run
from readapt_ray.evaluation.scale_search import describe_search
from readapt_ray.evaluation.significance import compare
from readapt_ray.evaluation.tables import named
from readapt_ray.records import Passage, ScoredDoc
from tests.serving.browser import chromium

NASTY = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def _report(num_queries=40, *, runs=("base", "adapted"), text=NASTY, depth=12, worse=False):
    judgements = {f"q{number}": {f"d{number}": 1, "d999": 0} for number in range(num_queries)}
    made = {}
    for place, name in enumerate(runs):
        docs = {}
        for number in range(num_queries):
            others = [f"d{1000 + number * 20 + rank}" for rank in range(depth - 1)]
            lift = (place if not worse else len(runs) - 1 - place) * 6
            docs[f"q{number}"] = [
                *others[: max(0, int(np.random.default_rng([number, place]).integers(0, depth)) - lift)],
                f"d{number}",
                *others,
            ][:depth]
        made[name] = Run.of(
            {
                query_id: [ScoredDoc(query_id, doc_id, -rank) for rank, doc_id in enumerate(dict.fromkeys(ids))]
                for query_id, ids in docs.items()
            }
        )
    measures = parse_measures("RR@10,R@5")
    measured = {name: measure_run(run, judgements, measures) for name, run in made.items()}
    asked = []

    def find_passages(doc_ids):
        asked.append(doc_ids)
        return {
            doc_id: Passage(doc_id, f"title {text}", f"text of {doc_id} {text} | " * 50)
            for doc_id in doc_ids
            if doc_id != "d3"
        }

    report = build_report(
        made,
        measured,
        compare({name: each.values for name, each in measured.items()}, num_permutations=1000),
        judgements,
        query_texts={f"q{number}": f"query {number} {text}" for number in range(0, num_queries, 2)},
        find_passages=find_passages,
        provenance={name: {"file": f"{name}.trec", "note": text} for name in runs},
        num_permutations=1000,
        seed=0,
    )
    return report, asked


def test_the_verdict_follows_the_corrected_p_value():
    better, _ = _report()
    [verdict] = better["verdicts"]
    assert verdict["kind"] == "better"
    assert verdict["sentence"].startswith("adapted is better than base: RR@10 ")
    assert "40 queries" in verdict["sentence"]
    worse, _ = _report(worse=True)
    assert worse["verdicts"][0]["kind"] == "worse"
    unclear, _ = _report(num_queries=3)
    assert unclear["verdicts"][0]["sentence"].startswith(
        "The difference between adapted and base is not statistically significant"
    )
    alone, _ = _report(num_queries=1)
    assert "one judged query only: no test is possible" in alone["verdicts"][0]["sentence"]
    assert _report(runs=("base",))[0]["verdicts"] == []


def test_queries_without_judgements_are_counted_where_the_query_file_has_them():
    report, _ = _report(num_queries=3)
    assert report["num_unjudged"] == 0
    said = "3 of the 7 queries are judged in these qrels; only these count."
    for page in (to_markdown, to_html):
        assert "are judged in these qrels" not in page(report)
        assert said in page({**report, "num_unjudged": 4})


def test_the_changed_queries_stand_with_both_lists():
    report, asked = _report()
    [change] = report["changes"]
    assert 0 < len(change["gained"]) <= 5
    gains = [each["difference"] for each in change["gained"]]
    assert gains == sorted(gains, reverse=True)
    assert gains[0] == max(difference for _, difference in change["differences"])
    assert all(each["difference"] < 0 for each in change["lost"])
    first = change["gained"][0]
    assert first["difference"] == pytest.approx(first["value"] - first["baseline_value"])
    for side in ("baseline", "run"):
        assert [doc["rank"] for doc in first["results"][side]] == [1, 2, 3, 4, 5]
    relevant = [doc for doc in first["results"]["run"] if doc["relevance"] == 1]
    assert [doc["doc_id"] for doc in relevant] == [first["query_id"].replace("q", "d")]
    assert len(asked) == 1
    assert len(first["results"]["run"][0]["text"]) <= 280


def test_ties_and_queries_without_a_relevant_document_are_shown_as_they_were_measured():
    judgements = {"tied": {"d19": 1}, "none": {"d19": 0, "d18": -1}}
    made = {
        name: Run.of({query_id: [ScoredDoc(query_id, f"d{number:02d}", score * number) for number in range(20)]})
        for name, query_id, score in (("base", "none", 1), ("adapted", "tied", 0))
    }
    measured = {name: measure_run(run, judgements, parse_measures("RR@1,R@1")) for name, run in made.items()}
    report = build_report(
        made,
        measured,
        compare({name: each.values for name, each in measured.items()}, num_permutations=100),
        judgements,
        query_texts={},
        find_passages=lambda doc_ids: {},
        provenance={name: {} for name in made},
        num_permutations=100,
        seed=0,
    )
    assert report["num_without_relevant"] == 1
    assert [run["means"]["R@1"]["mean"] for run in report["runs"]] == [0, 0.5]
    assert {name: curve[0] for name, curve in report["recall"]["runs"].items()} == {"base": 0, "adapted": 0.5}
    [gained] = report["changes"][0]["gained"]
    shown = [(doc["doc_id"], doc["relevance"]) for doc in gained["results"]["run"][:2]]
    assert (gained["query_id"], gained["value"], shown) == ("tied", 1, [("d19", 1), ("d18", None)])


def test_json_holds_the_figures():
    report, _ = _report()
    values = json.loads(to_json(report))
    assert values["runs"][1]["name"] == "adapted"
    cell = values["runs"][1]["means"]["RR@10"]
    assert cell["low"] < cell["mean"] < cell["high"]
    assert values["comparisons"][0]["p_value"] == report["comparisons"][0]["p_value"]
    assert values["recall"]["cutoffs"] == [1, 2, 5, 10]
    assert "differences" not in values["changes"][0]


class _Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.open, self.links = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in {"src", "href", "data", "action"}]
        if tag not in {"meta", "link", "img", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)


@pytest.mark.parametrize("runs", [("base",), ("base", "adapted"), (f"base {NASTY}", f"other {NASTY}", "third")])
@pytest.mark.parametrize("num_queries", [1, 40, 900])
def test_the_page_is_whole_and_fetches_nothing(runs, num_queries):
    report, _ = _report(num_queries, runs=runs)
    text = to_html(report)
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert page.links == []
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not re.search(r"url\(|@import|https?://", text)
    assert page.tags.count("svg") == len(runs)
    assert len(text) < 400_000


def test_markdown_shows_text_as_it_is():
    report, _ = _report(runs=("a|b", "c*d"))
    text = to_markdown(report)
    outside_code = re.sub(r"```.*?```", "", text, flags=re.S)
    assert "<script" not in outside_code
    assert r"a\|b" in outside_code
    rows = [line for line in outside_code.splitlines() if line.startswith("|")]
    for row in rows:
        assert len(re.findall(r"(?<!\\)\|", row)) in {4, 7, 10}
    assert "No difference" in text or "is better" in text


def test_long_lists_of_ids_are_cut():
    assert named(["a", "b"]) == "a, b"
    assert named([str(number) for number in range(25)]).endswith("18, 19 and 5 more")


def test_plots_stay_inside_their_frame():
    few = [("label <b>", 0.5), ("same", 0.0), ("lost", -0.25)]
    many = [(str(number), 1 - number / 2500) for number in range(5000)]
    for bars in (few, many, [], [("one", 0.0)], [("a", 1e-9), ("b", -1e-9)]):
        drawing = str(plots.difference_plot(bars, description="x"))
        assert "<b>" not in drawing
        assert drawing.count("<rect") <= 400
        for value in re.findall(r'\b[xy]="([-\d.]+)"', drawing):
            assert 0 <= float(value) <= 760
    assert "3 better" in str(plots.difference_plot([("a", 1.0)] * 3, description="x"))
    lines = {f"run {number}": [0.5, 0.5] for number in range(8)} | {"none": [0.0, 0.0]}
    drawing = str(plots.line_plot(lines, [1, 1000], description="x"))
    heights = [float(value) for value in re.findall(r'y="([\d.]+)" style', drawing)]
    assert len(set(heights)) == 9
    assert all(0 < height < 240 for height in heights)


def test_a_nice_ceiling():
    assert [plots.nice_ceiling(value) for value in (1.0, 0.3, 0.011, 7, 0.8)] == pytest.approx([1.0, 0.4, 0.02, 8, 0.8])


@pytest.mark.parametrize("kind", ["report", "tune"])
def test_at_every_width_the_page_fits_and_plots_can_be_read(tmp_path, kind):
    if kind == "report":
        text = to_html(
            _report(text="a_name.without_any_space_that_goes_on_and_on_and_on", runs=("base", "one", "two"))[0]
        )
    else:
        values = {
            (readapter, knowledge): {f"q{number}": (number % 7 + knowledge) / 10 for number in range(40)}
            for readapter in (0.75, 1.0, 1.25)
            for knowledge in (0.0, 0.5, 1.0)
        }
        text = scale_report.to_html(describe_search(values, measure="nDCG@10", seed=0, queries="judged queries"))
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    with chromium(tmp_path / "profile") as page:
        page.call("Page.navigate", url=(tmp_path / "page.html").as_uri())
        page.wait_for("document.readyState === 'complete'")
        for width in (360, 1400):
            page.call(
                "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500
            )
            assert page.value("document.documentElement.scrollWidth") <= width
            letters = page.value(
                "[...document.querySelectorAll('svg text')].map(e => e.getBoundingClientRect().height)"
            )
            assert min(letters) > 9, "of a plot shrunk to the width of a telephone one reads nothing"
            assert page.value(
                "[...document.querySelectorAll('.figures')].every(e => e.getBoundingClientRect().height < 30)"
            ), "figures stay on one line"
        assert [url for url in page.requested if not url.startswith("file:")] == []
        assert page.complaints == []


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_shows_the_page_and_runs_nothing(tmp_path):
    report, _ = _report(runs=(f"base {NASTY}", "adapted"))
    (tmp_path / "report.html").write_text(to_html(report), encoding="utf-8")
    shown = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{tmp_path / 'report.html'}"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    ).stdout
    title = re.search(r"<title>(.*?)</title>", shown, re.S)[1]
    assert title.startswith("Evaluation: base")
    assert shown.count("<svg") == 2
    assert "<img" not in shown
