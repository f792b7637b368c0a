"""Gather what WORK holds in benchmarks/results/smollm.json; what another WORK gave and this one has not stays there.

Each figure has its command, seed, machine and state. What is not measured is not in it.
"""

import argparse
import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from readapt_ray import artifacts
from readapt_ray.evaluation.significance import combine

RUN = "bash benchmarks/smollm/run.sh DATA WORK"
OUTPUT = Path(__file__).parents[1] / "results" / "smollm.json"
CUTS = "passages cut to 128 tokens, queries to 32"


def main() -> None:
    """Update the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    found = json.loads(options.output.read_text()) if options.output.is_file() else {}
    if retriever := of_retriever(options.work / "made"):
        found["retriever"] = retriever
    for report in sorted(options.work.glob("*/report-*")):
        if measured := of_report(report):
            found.setdefault("domains", {}).setdefault(report.parent.name, {})[report.name] = measured
    if combined := over_all(options.work):
        found["all domains and seeds"] = combined
    for folder in sorted(options.work.glob("*/continuing")):
        if measured := of_continuing(folder):
            found.setdefault("continuing", {})[folder.parent.name] = measured
    text = json.dumps(found, indent=2).replace(str(options.work), "WORK")
    options.output.write_text(text + "\n")


def of_retriever(made: Path) -> dict[str, Any] | None:
    """Return how the retriever was trained, as far as it is, and its quality on the dev split after each checkpoint."""
    steps = read_steps(made / "lora")
    if not steps:
        return None
    lora, curve = artifacts.read_manifest(str(made / "lora")), artifacts.read_manifest(str(made / "curve"))
    begun = artifacts.read_lease(str(made / "lora")) or {}
    last = steps[-1]
    found = {
        "command": f"NUM_PAIRS={sum(1 for _ in (made / 'pairs.jsonl').open())} {RUN} retriever curve",
        "state": "complete" if lora else f"stopped after step {last['step']} of {last['num_steps']}",
        "options": lora.config if lora else begun.get("config"),
        "hardware": lora.hardware if lora else begun.get("hardware"),
        "seconds_per_step": round(statistics.median(step["seconds"] for step in steps), 1),
        "tokens_per_s": round(statistics.median(step["tokens_per_s"] for step in steps), 1),
        "peak_memory_bytes": max(step["peak_memory_bytes"] for step in steps),
        "loss": {str(step["step"]): round(step["loss"], 4) for step in steps},
    }
    if curve:
        found["dev"] = {
            "what": f"questions on passages of SQuAD's dev split, {CUTS}",
            "corpus": (artifacts.read_manifest(str(made / "corpus")) or curve).counts,
            "means": curve.details["means"],
            "comparisons": curve.details["comparisons"],
            "created": curve.created,
        }
    return found


def of_report(report: Path) -> dict[str, Any] | None:
    """Return one comparison on a domain, once it is complete."""
    manifest = artifacts.read_manifest(str(report))
    if manifest is None:
        return None
    domain = report.parent
    seed = report.name.removeprefix("report-seed") if report.name.startswith("report-seed") else None
    stages = [f"vectors/{name}" for name in manifest.details["means"]]
    stages += [] if seed is None else [f"adapter-seed{seed}", f"adapted-seed{seed}"]
    made = {name: artifacts.read_manifest(str(domain / name)) for name in stages}
    return {
        "command": f"{RUN} domain:{domain.name}" + ("" if seed is None else f":{seed}"),
        "what": CUTS,
        "state": "complete",
        "seed": None if seed is None else int(seed),
        "created": manifest.created,
        "hardware": manifest.hardware,
        "seconds": {name: each.seconds for name, each in made.items() if each},
        "num_queries": manifest.details["num_queries"],
        "means": manifest.details["means"],
        "comparisons": manifest.details["comparisons"],
    }


def over_all(work: Path) -> dict[str, Any]:
    """Test RE-adapted against the retriever over all domains and seeds: the mean over a domain's seeds for each query, and
    domains with equal weight. Also of each domain; `detectable` is the gain that the test finds with 80% power.
    """
    found: dict[str, Any] = {}
    pairs = {"dense": ("adapted-seed{}", "retriever"), "fused with BM25": ("adapted-seed{}-bm25", "retriever-bm25")}
    for label, (adapted, baseline) in pairs.items():
        by_domain: dict[str, list[NDArray[np.float64]]] = {}
        for report in sorted(work.glob("*/report-seed*")):
            if (report / "per_query.parquet").is_file():
                run = adapted.format(report.name.removeprefix("report-seed"))
                by_domain.setdefault(report.parent.name, []).append(
                    of_queries(report, run) - of_queries(report, baseline)
                )
        means = {domain: np.mean(seeds, axis=0) for domain, seeds in by_domain.items()}
        sets = {domain: [each] for domain, each in means.items()} | {"all": list(means.values())}
        found[label] = {
            name: {"seeds": len(by_domain.get(name, ())) or None, **asdict(combine(each))}
            for name, each in sets.items()
            if each
        }
    return found


def of_queries(report: Path, run: str) -> NDArray[np.float64]:
    """Return nDCG@10 of each query in a run of a report, in the order of the queries' ids."""
    table = pq.read_table(report / "per_query.parquet")
    rows = table.filter((pc.field("run") == run) & (pc.field("measure") == "nDCG@10")).sort_by("query_id")
    values: NDArray[np.float64] = rows["value"].to_numpy()
    return values


def of_continuing(folder: Path) -> dict[str, Any] | None:
    """Return the losses and the search of an adapter that was continued against one that was trained anew."""
    report = artifacts.read_manifest(str(folder / "report"))
    if report is None:
        return None
    return {
        "command": f"{RUN} continuing:{folder.parent.name}",
        "what": CUTS,
        "created": report.created,
        "hardware": report.hardware,
        **json.loads((folder / "losses.json").read_text()),
        "means": report.details["means"],
        "comparisons": report.details["comparisons"],
    }


def read_steps(lora: Path) -> list[dict[str, Any]]:
    """Return the metrics of the steps that are kept, in order."""
    files = [lora / "metrics.jsonl"] if (lora / "metrics.jsonl").is_file() else lora.glob("metrics/step-*.jsonl")
    rows = {row["step"]: row for file in files for row in map(json.loads, file.read_text().splitlines())}
    return [rows[step] for step in sorted(rows)]


if __name__ == "__main__":
    main()
