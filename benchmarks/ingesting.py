"""Ingest generated passages from one JSON Lines file, in one process and in Ray tasks.

    python benchmarks/ingesting.py --work DIR --size 1000000 [--deduplicate near]

A passage has 40 words; one in 50 repeats an earlier text, one in 500 an earlier id. Each of the two runs has its own process,
and its time includes Ray's start. Reported are seconds, CPU seconds of the process with its Ray, and the driver's peak
memory. 1,000,000 passages need 2 GB under DIR.
"""

import argparse
import datetime
import json
import random
import resource
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from readapt_ray import hardware
from readapt_ray.stages.ingest import IngestConfig, ingest

_WORDS = [
    "array",
    "shape",
    "axis",
    "dtype",
    "stride",
    "thread",
    "lock",
    "queue",
    "worker",
    "event",
    "file",
    "path",
    "folder",
    "stream",
    "graph",
    "node",
    "edge",
]
_NEVER = 1 << 60


def main() -> None:
    """Measure both ways, or only the one that `--way` names, in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the source and the artifacts")
    parser.add_argument("--size", type=int, default=1_000_000, help="number of passages")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/ingesting.json"))
    parser.add_argument("--deduplicate", choices=("exact", "near"), default="exact")
    parser.add_argument("--way", choices=("one_process", "tasks"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    source = options.work / f"{options.size}.jsonl"
    if options.way:
        print(json.dumps(measured(options.way, source, options.work / options.way, options.deduplicate)))
        return
    make_source(source, options.size)
    found = {way: by_itself(way, options) for way in ("one_process", "tasks")}
    print(found["one_process"] | {"manifest": None}, found["tasks"] | {"manifest": None}, flush=True)
    assert found["one_process"].pop("manifest") == found["tasks"].pop("manifest"), "the two ways differ"
    known: dict[str, Any] = json.loads(options.output.read_text()) if options.output.is_file() else {}
    known[f"{options.size}{' near' * (options.deduplicate == 'near')}"] = found | {
        "times_as_fast": round(found["one_process"]["seconds"] / found["tasks"]["seconds"], 2),
        "date": datetime.date.today().isoformat(),
        "hardware": hardware.machine_info()["driver"],
        "versions": {name: version(name) for name in ("ray", "pyarrow")},
    }
    print(json.dumps(known, indent=2))
    options.output.write_text(json.dumps(known, indent=2) + "\n")


def make_source(source: Path, size: int) -> None:
    """Write the passages, unless they are there."""
    if source.is_file():
        return
    source.parent.mkdir(parents=True, exist_ok=True)
    draw, text = random.Random(0), ""
    with source.with_suffix(".part").open("w") as file:
        for number in range(size):
            doc_id = number - 7 if number % 500 == 499 else number
            if number % 50 != 1:  # else that of the row before
                text = " ".join(draw.choices(_WORDS, k=40))
            file.write(json.dumps({"_id": f"d{doc_id}", "text": text}) + "\n")
    source.with_suffix(".part").rename(source)


def by_itself(way: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one way in a new process."""
    command = [sys.executable, __file__, "--work", str(options.work), "--size", str(options.size), "--way", way]
    command += ["--deduplicate", options.deduplicate]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(way: str, source: Path, output: Path, deduplicate: Any) -> dict[str, Any]:
    """Ingest in this process, or by tasks of a Ray that it starts."""
    stage = sys.modules["readapt_ray.stages.ingest"]
    for name in ("MIN_PARALLEL_BYTES", "MIN_NEAR_BYTES"):
        stage.__dict__[name] = _NEVER if way == "one_process" else 0
    shutil.rmtree(output, ignore_errors=True)
    started_s = time.monotonic()
    manifest = ingest(IngestConfig(source=str(source), output=str(output), deduplicate=deduplicate)).manifest
    seconds = time.monotonic() - started_s
    times = [each.cpu_times() for each in (psutil.Process(), *psutil.Process().children(recursive=True))]
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(sum(each.user + each.system for each in times), 1),
        "driver_peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "manifest": [manifest.counts, manifest.details],
    }


if __name__ == "__main__":
    main()
