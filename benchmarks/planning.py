"""How well `readapt plan` predicts: a quarter of a corpus is run, the whole is planned from its rates, then run.

    python benchmarks/planning.py --passages 6000 --work DIR

The corpus is that of the quickstart, and so are models and options. Writes JSON to --output: for each stage the seconds
planned before anything was measured, planned from the quarter, and taken.
"""

import argparse
import datetime
import json
import os
import platform
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from readapt_ray import artifacts, planner
from readapt_ray.recipes import chain, quickstart, running
from readapt_ray.recipes.chain import RunConfig


def main() -> None:
    """Run the quarter and the whole, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=6000, help="passages of the whole")
    parser.add_argument("--work", type=Path, required=True, help="new folder for both roots")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/planning.json"))
    options = parser.parse_args()
    os.environ.setdefault("READAPT_NUM_CPUS", "2")
    whole, quarter = (cut_corpus(options.work, count) for count in (options.passages, options.passages // 4))
    unmeasured = planned(whole, ())
    running.run(quarter)
    measured = planned(whole, (quarter.root,))
    running.run(whole)
    taken = {name: seconds(f"{whole.root}/{name}") for name in unmeasured}
    result = {
        "command": f"python benchmarks/planning.py --passages {options.passages}",
        "date": datetime.date.today().isoformat(),
        "hardware": f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[1]:.1f}",
        "stages": {
            name: {"unmeasured_s": unmeasured[name], "from_a_quarter_s": measured[name], "taken_s": taken[name]}
            for name in taken
        },
        "in all": {
            "unmeasured": sum(unmeasured.values()) / sum(taken.values()),
            "from a quarter": sum(measured.values()) / sum(taken.values()),
        },
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def cut_corpus(work: Path, count: int) -> RunConfig:
    """The quickstart's run on so many of its passages, taken evenly, with all their queries."""
    full = work / "full"
    if not (full / "passages").exists():
        config = chain.stage_parts("ingest")[0].parse({"source": quickstart.TARGET, "output": str(full)})
        chain.stage_parts("ingest")[1](config)
    folder = work / f"source-{count}"
    (folder / "passages").mkdir(parents=True)
    table = pq.read_table(full / "passages")
    kept = table.take(list(range(0, table.num_rows, max(1, table.num_rows // count)))[:count])
    pq.write_table(kept, folder / "passages" / "part-00000.parquet")
    ids = set(kept["doc_id"].to_pylist())
    qrels = pq.read_table(full / "qrels" / "test.parquet")
    judged = qrels.filter([each in ids for each in qrels["doc_id"].to_pylist()])
    named = set(judged["query_id"].to_pylist())
    queries = pq.read_table(full / "queries")
    (folder / "queries").mkdir()
    (folder / "qrels").mkdir()
    pq.write_table(
        queries.filter([each in named for each in queries["query_id"].to_pylist()]),
        folder / "queries/part-00000.parquet",
    )
    pq.write_table(judged, folder / "qrels" / "test.parquet")
    return quickstart.recipe(str(work / f"root-{count}")).model_copy(update={"source": str(folder)})


def planned(run: RunConfig, measured: tuple[str, ...]) -> dict[str, float]:
    """Seconds of each stage that the plan expects."""
    found = planner.plan(run, planner.PlanConfig(cluster="local", measured=measured))
    return {each.name: round(each.seconds, 1) for each in found.stages}


def seconds(folder: str) -> float:
    """What a stage took."""
    manifest: Any = artifacts.read_manifest(folder)
    return float(manifest.seconds)


if __name__ == "__main__":
    main()
