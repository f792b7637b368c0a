"""Build the report of an evaluation, and write it as JSON, as Markdown and as one HTML page.

In: runs, their measurements and comparisons. Out: a JSON value with all that the page shows. The page is
self-contained: it has no script, loads nothing, and has a light and a dark mode.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jinja2
import numpy as np

from readapt_ray.evaluation import plots
from readapt_ray.evaluation.general_report import GeneralReport, general_markdown, side_by_side
from readapt_ray.evaluation.measures import Judgements, Measurement, describe_measures, recall_curve
from readapt_ray.evaluation.runs import Run
from readapt_ray.evaluation.significance import Comparison, bootstrap_interval
from readapt_ray.evaluation.tables import (
    MAX_NAMED,
    difference_cells,
    markdown,
    markdown_table,
    named,
    p_value,
    signed,
    value,
)
from readapt_ray.progress import amount
from readapt_ray.records import Passage
from readapt_ray.retrieval.truncation import sentence

ALPHA = 0.05
"""A corrected p-value below this counts as a significant difference."""
_CUTOFFS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
_NUM_CHANGED = 5
_NUM_RESULTS = 5
_MAX_TEXT_CHARS = 280

FindPassages = Callable[[set[str]], Mapping[str, Passage]]
"""A function that returns the passages with these doc_ids, by doc_id, without those that the corpus lacks."""


def build_report(
    runs: Mapping[str, Run],
    measurements: Mapping[str, Measurement],
    comparisons: Sequence[Comparison],
    judgements: Judgements,
    *,
    query_texts: Mapping[str, str],
    find_passages: FindPassages,
    provenance: Mapping[str, Any],
    num_permutations: int,
    seed: int,
    requirements: Sequence[Mapping[str, Any]] = (),
    general: GeneralReport | None = None,
    num_unknown: int = 0,
) -> dict[str, Any]:
    """Build the content of the report as JSON values.

    The first measure decides the verdicts, and which queries are shown as having gained or lost most.

    Args:
        runs: by name; the first is the baseline.
        measurements: measurement of each run, by name.
        comparisons: comparisons of the other runs with the baseline, by every measure.
        judgements: relevance by query_id and doc_id.
        query_texts: texts by query_id of all queries, judged or not; any may be missing. Unjudged ones are counted.
        find_passages: called at most once, with the doc_ids of the passages whose title and text are shown.
        provenance: what is known about the origin of each run, by name.
        num_permutations: permutations of the tests; only reported.
        seed: seed of the tests (only reported) and of the intervals of the means.
        requirements: the result of `check_requirements`.
        general: results of the same retrievers on a general collection; None without one.
        num_unknown: number of judgements of passages that the corpus does not have.
    """
    names = list(runs)
    query_ids = measurements[names[0]].query_ids
    measures = list(measurements[names[0]].values)
    changes = [
        _changes(
            name,
            names[0],
            measures[0],
            runs=runs,
            measurements=measurements,
            judgements=judgements,
            query_texts=query_texts,
        )
        for name in names[1:]
    ]
    _add_passages(changes, find_passages)
    means = _means(measurements, seed)
    return {
        "baseline": names[0],
        "measures": measures,
        "descriptions": describe_measures(measures),
        "num_queries": len(query_ids),
        "num_unjudged": len(query_texts.keys() - set(query_ids)),
        "unknown": _unknown(num_unknown, sum(map(len, judgements.values()))),
        "num_without_relevant": sum(max(judged.values(), default=0) <= 0 for judged in judgements.values()),
        "requirements": [dict(each) for each in requirements],
        "verdicts": [verdict(each) for each in comparisons if each.measure == measures[0]],
        "runs": [
            {"name": name, "means": means[name], **_contents(runs[name], measurements[name], provenance[name])}
            for name in names
        ],
        "comparisons": [dataclasses.asdict(each) for each in comparisons],
        "general": general and _general(comparisons, general, measures[0]),
        "recall": _recall(runs, judgements),
        "changes": changes,
        "settings": {"num_permutations": num_permutations, "seed": seed, "confidence": 0.95, "alpha": ALPHA},
    }


def _general(comparisons: Sequence[Comparison], general: GeneralReport, measure: str) -> dict[str, Any]:
    """Return the differences on the user's queries and on general ones, side by side."""
    return {
        "report": general.uri,
        "num_queries": general.num_queries,
        "verdicts": [verdict(each) for each in general.comparisons if each.measure == measure],
        "rows": side_by_side(comparisons, general),
    }


def _contents(run: Run, measurement: Measurement, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return the size of a run, the queries it lacks, and its provenance."""
    truncated = provenance.get("details", {}).get("truncation")
    return {
        "num_results": len(run),
        "depth": run.depth,
        "without_results": list(measurement.without_results),
        "without_judgements": list(measurement.without_judgements),
        "truncation": sentence(truncated) if truncated else "",
        "provenance": provenance,
    }


def to_json(report: Mapping[str, Any]) -> str:
    """Return the report as JSON, without the differences per query: `per_query.parquet` has their values."""
    changes = [{name: value for name, value in each.items() if name != "differences"} for each in report["changes"]]
    return json.dumps({**report, "changes": changes}, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def page_template(name: str) -> jinja2.Template:
    """Load an HTML template of this package, such as `report.html`, with the filters that templates use.

    Rendering escapes values, and fails if a variable of the template is missing.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        value=value, signed=signed, p=p_value, pretty=_pretty, unjudged=_unjudged, unknown=_unknown
    )
    return environment.get_template(name)


def to_html(report: Mapping[str, Any]) -> str:
    """Return the report (from `build_report`) as one self-contained HTML page."""
    template = page_template("report.html")
    drawings = {
        each["run"]: plots.difference_plot(
            each["differences"],
            description=f"{each['measure']} of {each['run']} minus {report['baseline']}, a bar for each query",
        )
        for each in report["changes"]
    }
    recall = report["recall"]
    recall_drawing = recall and plots.line_plot(
        recall["runs"], recall["cutoffs"], description="Recall at k of each run, over k"
    )
    return template.render(
        report=report, drawings=drawings, recall_drawing=recall_drawing, max_named=MAX_NAMED, alpha=ALPHA
    )


def to_markdown(report: Mapping[str, Any]) -> str:
    """Return the report (from `build_report`) as Markdown."""
    measures = report["measures"]
    lines = ["# Evaluation", ""]
    lines += [f"{markdown(each['sentence'])}\n" for each in report["verdicts"]]
    lines += [f"{markdown(each['run'])}: `{each['text']}` {each['outcome']}\n" for each in report["requirements"]]
    lines += [f"## Means over {amount(report['num_queries'], 'judged queries')}", ""]
    lines += markdown_table(
        ["run", *measures],
        [[run["name"], *(_with_interval(run["means"][measure]) for measure in measures)] for run in report["runs"]],
    )
    if report["num_unjudged"]:
        lines += ["", _unjudged(report)]
    if report["unknown"]:
        lines += ["", report["unknown"]]
    lines += ["", *(f"- {name}: {markdown(meaning)}" for name, meaning in report["descriptions"].items())]
    lines += [line for run in report["runs"] for note in _notes(run) for line in ("", markdown(note))]
    if report["comparisons"]:
        lines += ["", f"## Against {markdown(report['baseline'])}", ""]
        header = ["run", "measure", "difference", "95% interval", "p", "p (Holm)", "wins", "ties", "losses"]
        lines += markdown_table(header, [_comparison_row(each) for each in report["comparisons"]])
        lines += ["", _method(report["settings"])]
    if report["general"]:
        lines += general_markdown(report["general"])
    for change in report["changes"]:
        for key in ("gained", "lost"):
            lines += ["", f"## Queries that {key} most: {markdown(change['run'])}, {change['measure']}", ""]
            rows = [
                [each["query_id"], each["text"], value(each["baseline_value"]), value(each["value"])]
                + [", ".join(doc["doc_id"] for doc in each["results"][side]) for side in ("baseline", "run")]
                for each in change[key]
            ]
            header = ["query", "text", report["baseline"], change["run"], "top before", "top after"]
            lines += markdown_table(header, rows) if rows else ["none"]
    lines += ["", "## Where the runs are from", ""]
    for run in report["runs"]:
        known = _pretty(run["provenance"]).replace("```", "'''")
        lines += [f"### {markdown(run['name'])}", "", "```json", known, "```", ""]
    return "\n".join(lines) + "\n"


def _notes(run: Mapping[str, Any]) -> Iterator[str]:
    """Yield notes on a run: queries it lacks, and how much of its passages was truncated."""
    for key, meaning in (
        ("without_results", "judged, without results"),
        ("without_judgements", "without judgements in these qrels, left out"),
    ):
        if run[key]:
            yield f"{run['name']}: {len(run[key]):,} {meaning}: {named(run[key])}"
    if run["truncation"]:
        yield f"{run['name']}: {run['truncation']}"


def _unjudged(report: Mapping[str, Any]) -> str:
    total = report["num_queries"] + report["num_unjudged"]
    return f"{report['num_queries']:,} of the {total:,} queries are judged in these qrels; only these count."


def _unknown(count: int, total: int) -> str:
    counts = f"{count:,} of {amount(total, 'judgements')}"
    return f"{counts} are of passages that the corpus does not have: no run can find them." if count else ""


def _means(measurements: Mapping[str, Measurement], seed: int) -> dict[str, dict[str, dict[str, float | None]]]:
    """Return mean and interval by run and measure; all are resampled together."""
    cells = [(name, measure, values) for name, each in measurements.items() for measure, values in each.values.items()]
    columns = np.stack([values for _, _, values in cells], axis=1)
    lows, highs = bootstrap_interval(columns, seed=seed).tolist() if len(columns) > 1 else [[None] * len(cells)] * 2
    found: dict[str, dict[str, dict[str, float | None]]] = {name: {} for name in measurements}
    for (name, measure, values), low, high in zip(cells, lows, highs, strict=True):
        found[name][measure] = {"mean": float(values.mean()), "low": low, "high": high}
    return found


def verdict(comparison: Comparison) -> dict[str, str]:
    """Return whether a run is better or worse than the baseline, with a sentence that says so.

    Returns:
        `run`, `sentence` and `kind`: better or worse if the p-value after Holm's correction is under 0.05, unclear if
        it is not, untested if no test is possible.
    """
    figures = (
        f"{comparison.measure} {value(comparison.mean)} against {value(comparison.baseline_mean)}, "
        f"{signed(comparison.difference)}"
    )
    run, baseline = comparison.run, comparison.baseline
    if comparison.p_holm is None or comparison.interval is None:
        return {"run": run, "kind": "untested", "sentence": f"{run} and {baseline}: {figures}; {comparison.note}."}
    low, high = comparison.interval
    p = p_value(comparison.p_holm)
    relation = p if p.startswith("<") else f"= {p}"
    corrected = " after Holm's correction" if comparison.p_holm != comparison.p_value else ""
    figures += (
        f" (95% interval {signed(low)} to {signed(high)}, p {relation}{corrected}, {comparison.num_queries:,} queries)."
    )
    if comparison.p_holm >= ALPHA:
        return {
            "run": run,
            "kind": "unclear",
            "sentence": f"The difference between {run} and {baseline} is not statistically significant: {figures}",
        }
    kind = "better" if comparison.difference > 0 else "worse"
    return {"run": run, "kind": kind, "sentence": f"{run} is {kind} than {baseline}: {figures}"}


def _recall(runs: Mapping[str, Run], judgements: Judgements) -> dict[str, Any] | None:
    depth = max(run.depth for run in runs.values())
    cutoffs = [cutoff for cutoff in _CUTOFFS if cutoff <= depth]
    if len(cutoffs) < 2:
        return None
    return {"cutoffs": cutoffs, "runs": {name: recall_curve(run, judgements, cutoffs) for name, run in runs.items()}}


def _changes(
    name: str,
    baseline: str,
    measure: str,
    *,
    runs: Mapping[str, Run],
    measurements: Mapping[str, Measurement],
    judgements: Judgements,
    query_texts: Mapping[str, str],
) -> dict[str, Any]:
    """Return the queries that gained and lost most, with the results of both runs, and all differences."""
    query_ids = measurements[name].query_ids
    before, after = measurements[baseline].values[measure], measurements[name].values[measure]
    differences = np.where(abs(after - before) <= 1e-9, 0.0, after - before)
    order = np.argsort(-differences, kind="stable").tolist()
    places = {
        each: {query_id: index for index, query_id in enumerate(runs[each].query_ids)} for each in (baseline, name)
    }

    def change(index: int) -> dict[str, Any]:
        query_id = query_ids[index]
        return {
            "query_id": query_id,
            "text": query_texts.get(query_id, ""),
            "baseline_value": float(before[index]),
            "value": float(after[index]),
            "difference": float(differences[index]),
            "results": {
                side: _results(runs[each], places[each].get(query_id), judgements[query_id])
                for side, each in (("baseline", baseline), ("run", name))
            },
        }

    gained = [index for index in order[:_NUM_CHANGED] if differences[index] > 0]
    lost = [index for index in order[::-1][:_NUM_CHANGED] if differences[index] < 0]
    return {
        "run": name,
        "measure": measure,
        "gained": [change(index) for index in gained],
        "lost": [change(index) for index in lost],
        "differences": [
            (query_texts.get(query_ids[index]) or query_ids[index], float(differences[index])) for index in order
        ],
    }


def _results(run: Run, index: int | None, judged: Mapping[str, int]) -> list[dict[str, Any]]:
    docs = [] if index is None else run.top(index, _NUM_RESULTS)
    return [
        {
            "rank": rank,
            "doc_id": doc.doc_id,
            "score": doc.score,
            "relevance": judged.get(doc.doc_id),
            "title": "",
            "text": "",
        }
        for rank, doc in enumerate(docs, start=1)
    ]


def _add_passages(changes: Sequence[Mapping[str, Any]], find_passages: FindPassages) -> None:
    shown = [
        doc
        for change in changes
        for each in (*change["gained"], *change["lost"])
        for docs in each["results"].values()
        for doc in docs
    ]
    passages = find_passages({doc["doc_id"] for doc in shown}) if shown else {}
    for doc in shown:
        passage = passages.get(doc["doc_id"])
        if passage is not None:
            text = " ".join(passage.text.split())
            cut = text[: _MAX_TEXT_CHARS - 1].rstrip() + "…" if len(text) > _MAX_TEXT_CHARS else text
            doc["title"], doc["text"] = " ".join(passage.title.split()), cut


def _comparison_row(each: Mapping[str, Any]) -> list[str]:
    return [
        each["run"],
        each["measure"],
        *difference_cells(each),
        p_value(each["p_value"]),
        p_value(each["p_holm"]),
        *(f"{each[key]:,}" for key in ("wins", "ties", "losses")),
    ]


def _method(settings: Mapping[str, Any]) -> str:
    return (
        f"Paired randomisation test, two-sided, {settings['num_permutations']:,} sign flips, seed {settings['seed']}; Holm's "
        f"correction over the runs; percentile bootstrap over queries for the intervals."
    )


def _with_interval(cell: Mapping[str, float | None]) -> str:
    text = value(cell["mean"])
    return text if cell["low"] is None else f"{text} ({value(cell['low'])} to {value(cell['high'])})"


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)
