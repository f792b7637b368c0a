"""Write the results of an experiment: a table of variants and corpora, beside the published numbers.

In: the runs of a reproduction. Out: `EXPERIMENT.json` and `EXPERIMENT.md` under its root. The value of a query is its mean
over the seeds. Tests are paired over queries, with Holm's correction over all comparisons of the table.
"""

import datetime
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from readapt_ray.evaluation.measures import group_judgements, measure_run, parse_measures
from readapt_ray.evaluation.runs import load_run
from readapt_ray.evaluation.significance import Comparison, combine, compare, holm, paired
from readapt_ray.evaluation.tables import markdown_table, p_value
from readapt_ray.recipes.paper import published
from readapt_ray.recipes.paper.options import Collection
from readapt_ray.recipes.paper.reproduction import Reproduction
from readapt_ray.recipes.paper.variants import BASE, EXPERIMENTS, READAPTED, Variant
from readapt_ray.sources.judgements import read_qrels
from readapt_ray.storage import Location


@dataclass(frozen=True)
class _Outcome:
    """The measured values of one corpus, by variant: float64 [number of seeds, number of queries]."""

    collection: Collection
    values: dict[str, NDArray[np.float64]]


def write_outcome(reproduction: Reproduction, experiment: str, seeds: Sequence[int]) -> str:
    """Write the results of an experiment over these seeds as JSON and Markdown, and return the Markdown.

    The runs must exist already. Earlier results of the experiment under the root are replaced.
    """
    measure = reproduction.config.measure
    found = [_values(reproduction, experiment, each, seeds) for each in reproduction.collections.values()]
    comparisons = [_compared(each, measure) for each in found]
    rows = [
        row
        for outcome, tested in zip(found, _corrected(comparisons), strict=True)
        for row in _rows(reproduction, outcome, tested)
    ]
    result = {
        "experiment": experiment,
        "what": EXPERIMENTS[experiment],
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "retriever": reproduction.config.retriever,
        "pretrained": reproduction.pretrained,
        "measure": measure,
        "seeds": list(seeds),
        "settings": reproduction.config.model_dump(mode="json", exclude={"root", "corpora", "data"}),
        "rows": rows,
        "averages": _averages(reproduction, rows),
        "combined": _combined(found),
    }
    root = Location(reproduction.config.root.rstrip("/"))
    text = to_markdown(result)
    (root / f"{experiment}.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    (root / f"{experiment}.md").write_text(text)
    return text


def _values(reproduction: Reproduction, experiment: str, own: Collection, seeds: Sequence[int]) -> _Outcome:
    qrels = reproduction.corpus(own).location / f"qrels/{own.split}.parquet"
    judgements = group_judgements(read_qrels(qrels.uri))
    measures = parse_measures(reproduction.config.measure)

    def measured(variant: Variant, seed: int) -> NDArray[np.float64]:
        file = reproduction.run_file(own, variant, seed)
        return measure_run(load_run(file), judgements, measures, name=file).values[reproduction.config.measure]

    variants = {
        variant.name: variant for seed in seeds for each, variant in reproduction.steps(experiment, seed) if each == own
    }
    return _Outcome(
        own,
        {
            name: np.stack([measured(variant, seed) for seed in (seeds if variant.has_seed else seeds[:1])])
            for name, variant in variants.items()
        },
    )


def _compared(outcome: _Outcome, measure: str) -> list[Comparison]:
    """Compare every variant of a corpus with the unchanged retriever. Values are averaged over seeds first."""
    return compare({name: {measure: values.mean(axis=0)} for name, values in outcome.values.items()})


def _corrected(comparisons: Sequence[Sequence[Comparison]]) -> list[dict[str, Comparison]]:
    """Add p-values with Holm's correction over the whole table. Returns, per corpus, the comparisons by variant."""
    p_values = [each.p_value for group in comparisons for each in group if each.p_value is not None]
    adjusted = iter(holm(p_values))
    return [
        {each.run: each if each.p_value is None else replace(each, p_holm=next(adjusted)) for each in group}
        for group in comparisons
    ]


def _rows(reproduction: Reproduction, outcome: _Outcome, tested: dict[str, Comparison]) -> list[dict[str, Any]]:
    own, retriever = outcome.collection, reproduction.known_as or ""
    scores = published.paper_scores(retriever, own.name)
    paper = {BASE: scores.base, READAPTED: scores.readapted} if scores is not None else {}
    rows = []
    for name, values in outcome.values.items():
        by_seed = values.mean(axis=1)
        comparison = tested.get(name)
        rows.append(
            {
                "corpus": own.name,
                "arm": name,
                "num_passages": reproduction.corpus(own).manifest.counts["num_passages"],
                "num_queries": values.shape[1],
                "mean": float(by_seed.mean()),
                "by_seed": by_seed.tolist(),
                "seed_deviation": float(by_seed.std(ddof=1)) if len(by_seed) > 1 else None,
                "difference": comparison and comparison.difference,
                "interval": comparison and comparison.interval,
                "p": comparison and comparison.p_value,
                "p_holm": comparison and comparison.p_holm,
                "public_score": published.public_score(retriever, own.name) if name == BASE else None,
                "paper_score": paper.get(name),
                "paper_gain": published.paper_gain(retriever, own.name, name),
            }
        )
    return rows


def _averages(reproduction: Reproduction, rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return each variant's mean over all corpora, and over the retriever's zero-shot corpora.

    Only corpora that have every variant count.
    """
    names = list(dict.fromkeys(row["arm"] for row in rows))
    means = {(row["corpus"], row["arm"]): row["mean"] for row in rows}
    whole = [each for each in reproduction.collections if all((each, variant) in means for variant in names)]
    seen = published.TRAINED_ON.get(reproduction.known_as or "", frozenset())
    groups = {"all": whole, "zero-shot": [each for each in whole if each not in seen] if seen & set(whole) else []}
    return {
        f"{label} ({len(group)} corpora)": {
            variant: float(np.mean([means[corpus, variant] for corpus in group])) for variant in names
        }
        for label, group in groups.items()
        if len(group) > 1
    }


def _combined(found: Sequence[_Outcome]) -> dict[str, dict[str, Any]]:
    """Test each variant over all corpora together. Empty if there is only one corpus."""
    names = [name for name in found[0].values if name != BASE and all(name in each.values for each in found)]
    if len(found) < 2 or any(each.values[BASE].shape[1] < 2 for each in found):
        return {}
    return {
        name: asdict(
            combine([paired(each.values[name].mean(axis=0), each.values[BASE].mean(axis=0)) for each in found])
        )
        for name in names
    }


def to_markdown(result: dict[str, Any]) -> str:
    """Return the results (the content of the JSON file) as Markdown. Scores are times 100, as in the paper."""
    seeds = result["seeds"]
    lines = [
        f"# {result['experiment']}: {result['what']}",
        "",
        f"{result['measure']} times 100 of {result['retriever']} (pretrained: {result['pretrained']}), "
        f"mean of {len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'}; differences are from the retriever as it is, "
        "with 95% bootstrap intervals over queries; p of the paired randomisation test, with Holm's correction over this table.",
        "",
    ]
    header = [
        "corpus",
        "passages",
        "queries",
        "arm",
        "score",
        "sd over seeds",
        "difference",
        "95% interval",
        "p",
        "p (Holm)",
    ]
    has_published = any(row["paper_score"] or row["paper_gain"] or row["public_score"] for row in result["rows"])
    header += ["paper", "paper's gain", "public score"] if has_published else []
    cells = [_cells(row, has_published=has_published) for row in result["rows"]]
    lines += markdown_table(header, cells)
    for label, means in result["averages"].items():
        lines += [
            "",
            f"Average over {label}: " + ", ".join(f"{variant} {100 * mean:.1f}" for variant, mean in means.items()),
        ]
    lines += [
        f"\n{name} over all corpora at once: {_points(each['difference'], signed=True)} "
        f"({_points(each['interval'][0], signed=True)} to {_points(each['interval'][1], signed=True)}), "
        f"p {p_value(each['p_value'])}; a difference of {_points(each['detectable'])} would be found in 80% of such studies"
        for name, each in result["combined"].items()
    ]
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, Any], *, has_published: bool) -> list[str]:
    interval = row["interval"]
    cells = [
        row["corpus"],
        f"{row['num_passages']:,}",
        f"{row['num_queries']:,}",
        row["arm"],
        f"{100 * row['mean']:.2f}",
        _points(row["seed_deviation"]),
        _points(row["difference"], signed=True),
        f"{_points(interval[0], signed=True)} to {_points(interval[1], signed=True)}" if interval else "",
        *("" if row[name] is None else p_value(row[name]) for name in ("p", "p_holm")),
    ]
    if has_published:
        gain, score, public = row["paper_gain"], row["paper_score"], row["public_score"]
        cells += [
            "" if score is None else f"{score:.1f}",
            "" if gain is None else f"{gain:+.1f}",
            "" if public is None else f"{public:.2f}",
        ]
    return cells


def _points(value: float | None, *, signed: bool = False) -> str:
    return "" if value is None else f"{100 * value:{'+' if signed else ''}.2f}"
