"""Measure the memory of driver and head that grows with the corpus: every stage over generated passages.

    python benchmarks/bookkeeping.py --work DIR --sizes 100000,1000000,10000000

The forward pass is a stub: an encoder of one layer, 16 wide, with a vocabulary of 384. Passages are in Parquet files;
each has four words and a number. Each stage is a process of its own that starts Ray, as a job does. The result has the
peak memory of the driver, of Ray's head (GCS and raylet) and of Ray's largest worker; the seconds of the stage without
Ray's start; the CPU seconds of the driver and of all Ray processes, which other work on the machine hardly changes; and
the seconds of the same command when there is nothing left to do. "worse than linear" is the CPU time per passage
divided by the CPU time per passage of the size before. A killed benchmark resumes: finished stages are not measured
again, and an interrupted stage resumes as the product does; its seconds are the sum of its attempts.
"""

import argparse
import contextlib
import datetime
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from readapt_ray import hardware

sys.path.insert(0, str(Path(__file__).parent.parent))

STAGES = ("ingest", "pack", "embed", "index", "search")
_ROWS_PER_FILE = 500_000
_NUM_QUERIES = 200
_BATCH_TOKENS = 32768
_HEAD = ("gcs_server", "raylet")
_SAMPLE_S = 0.5
_SAVE_S = 10.0


def main() -> None:
    """Measure what is not measured yet, or, told a stage, that one in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for passages, model and artifacts")
    parser.add_argument("--sizes", default="100000,1000000,10000000")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/bookkeeping.json"))
    parser.add_argument("--stages", default=",".join(STAGES), help="stages to measure, in this order")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = [int(size) for size in options.sizes.split(",")]
    if options.stage:
        print(json.dumps(measured(options.stage, options.work / str(sizes[0]))))
        return
    make_model(options.work / "model")
    known: dict[str, Any] = json.loads(options.output.read_text())["sizes"] if options.output.is_file() else {}
    for size in sizes:
        make_inputs(options.work / str(size), size)
        found = known.setdefault(str(size), {})
        for stage in options.stages.split(","):
            if stage not in found:
                found[stage] = by_driver(stage, options.work, size)
                print(size, stage, found[stage], flush=True)
                write(options.output, known)


def make_model(folder: Path) -> None:
    """The stub."""
    from tests import factories

    if not (folder / "readapt.json").is_file():
        factories.tiny_encoder(folder, hidden_size=16, num_layers=1, headless=True)
        factories.write_contract(folder, pooling="cls", add_bos=False, add_eos=False, passage_template="{title} {text}")


def make_inputs(folder: Path, size: int) -> None:
    """Passages and queries."""
    source = folder / "source"
    for first in range(0, size, _ROWS_PER_FILE):
        path = source / f"{first:010d}.parquet"
        if not path.is_file():
            source.mkdir(parents=True, exist_ok=True)
            made = made_texts(first, min(_ROWS_PER_FILE, size - first))
            pq.write_table(pa.table(made), path.with_suffix(".part"))
            path.with_suffix(".part").rename(path)
    queries = [{"_id": f"q{number}", "text": f"array shape number {number}"} for number in range(_NUM_QUERIES)]
    (folder / "queries.jsonl").write_text("".join(json.dumps(query) + "\n" for query in queries))


def made_texts(first: int, number: int) -> dict[str, Any]:
    """Ids and distinct texts."""
    words = pa.array(
        ["array", "shape", "thread", "lock", "file", "write", "read", "index", "number", "queue", "path", "node"]
    )
    random = np.random.default_rng(first)
    numbers = pa.array(range(first, first + number)).cast(pa.string())
    columns = [words.take(pa.array(random.integers(0, len(words), number))) for _ in range(4)]
    return {
        "_id": numbers,
        "title": pa.array([""] * number),
        "text": pc.binary_join_element_wise(*columns, numbers, " "),
    }


def by_driver(stage: str, work: Path, size: int) -> dict[str, Any]:
    """Run a stage in a new process and measure it, then measure the same command again, which has nothing left to do."""
    folder = work / str(size)
    if not _attempt_path(folder, stage).is_file():
        shutil.rmtree(folder / stage, ignore_errors=True)
    command = [sys.executable, __file__, "--work", str(work), "--sizes", str(size), "--stage", stage]
    first, again = (json.loads(subprocess.check_output(command).splitlines()[-1]) for _ in range(2))
    _attempt_path(folder, stage).unlink()
    return first | {"again_s": round(again["seconds"] - first["seconds"], 1)}


def _attempt_path(folder: Path, stage: str) -> Path:
    return folder / f"{stage}.attempts.json"


def measured(stage: str, folder: Path) -> dict[str, Any]:
    """Seconds, and peak bytes of driver, head and the largest worker."""
    import readapt_ray as ra
    from readapt_ray.cluster import connection

    model, output = str(folder.parent / "model"), {stage: str(folder / stage) for stage in STAGES}
    work = {
        "ingest": lambda: ra.ingest(
            ra.IngestConfig(source=str(folder / "source"), deduplicate="exact", output=output["ingest"])
        ),
        "pack": lambda: ra.pack(
            ra.PackConfig(
                pretrained=model, corpus=output["ingest"], mode="packed", block_tokens=256, output=output["pack"]
            )
        ),
        "embed": lambda: ra.embed(
            ra.EmbedConfig(retriever=model, corpus=output["ingest"], batch_tokens=_BATCH_TOKENS, output=output["embed"])
        ),
        "index": lambda: ra.index(ra.IndexConfig(vectors=output["embed"], output=output["index"])),
        "search": lambda: ra.search(
            ra.SearchConfig(
                retriever=model,
                index=output["index"],
                queries=str(folder / "queries.jsonl"),
                output=f"{output['search']}/run.trec",
            )
        ),
    }
    os.environ.setdefault("READAPT_NUM_CPUS", str(hardware.num_cores()))
    connection.connect()
    with watched(_attempt_path(folder, stage)) as usage:
        work[stage]()
    return usage.result()


class Usage:
    """Time and memory that a stage has used so far, including its attempts that were killed.

    Args:
        path: a file that keeps it from one attempt to the next.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._before: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}
        self._start_s = self._saved_s = time.perf_counter()
        self._head_bytes = self._worker_bytes = 0
        self._cpu_s: dict[tuple[int, float], float] = {}
        self._cpu_s_at_start: dict[tuple[int, float], float] = {}
        self.sample()
        self._cpu_s_at_start = dict(self._cpu_s)

    def sample(self) -> None:
        """Read memory and CPU time of this process and of Ray's."""
        head = 0
        for each in (psutil.Process(), *psutil.Process().children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                name, memory, cpu = each.name(), each.memory_info(), each.cpu_times()
                self._cpu_s[each.pid, each.create_time()] = cpu.user + cpu.system
                head += memory.rss if name in _HEAD else 0
                if name.startswith("ray::"):
                    self._worker_bytes = max(self._worker_bytes, memory.rss - memory.shared)
        self._head_bytes = max(self._head_bytes, head)
        if time.perf_counter() - self._saved_s > _SAVE_S:
            self.save()

    def save(self) -> None:
        """Write what has been used to the file of attempts."""
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(self.result()))
        part.rename(self._path)
        self._saved_s = time.perf_counter()

    def result(self) -> dict[str, float]:
        """Return seconds, CPU seconds and peak gigabytes of driver, head and the largest worker, without shared memory."""
        before, driver_bytes = self._before, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        cpu_s = sum(self._cpu_s.values()) - sum(self._cpu_s_at_start.values())
        peaks = {
            "driver_GB": driver_bytes,
            "head_GB": self._head_bytes,
            "largest_worker_GB": self._worker_bytes,
        }
        return {
            "seconds": round(before.get("seconds", 0) + time.perf_counter() - self._start_s, 1),
            "cpu_seconds": round(before.get("cpu_seconds", 0) + cpu_s, 1),
            **{name: max(before.get(name, 0), round(peak / 1e9, 2)) for name, peak in peaks.items()},
            "attempts": int(before.get("attempts", 0)) + 1,
        }


@contextlib.contextmanager
def watched(path: Path) -> Iterator[Usage]:
    """Sample what this process and Ray's use, and keep the result in a file as it grows."""
    usage, ended = Usage(path), threading.Event()

    def watch() -> None:
        while not ended.wait(_SAMPLE_S):
            usage.sample()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield usage
    finally:
        ended.set()
        thread.join()
    usage.sample()
    usage.save()


def _per_passage(known: dict[str, Any], size: str, stage: str) -> float:
    return known[size][stage]["cpu_seconds"] / int(size)


def write(output: Path, known: dict[str, Any]) -> None:
    """All that is known so far."""
    sizes = sorted(known, key=int)
    worse = {
        f"{small} to {large}": {
            stage: round(_per_passage(known, large, stage) / _per_passage(known, small, stage), 2)
            for stage in STAGES
            if "cpu_seconds" in known[small].get(stage, {}) and "cpu_seconds" in known[large].get(stage, {})
        }
        for small, large in itertools.pairwise(sizes)
    }
    result = {
        "command": "python benchmarks/bookkeeping.py --work DIR",
        "date": datetime.date.today().isoformat(),
        "hardware": hardware.machine_info()["driver"],
        "versions": {name: version(name) for name in ("ray", "pyarrow", "torch", "faiss-cpu")},
        "forward pass": "a stub: one layer, 16 wide",
        "sizes": {size: known[size] for size in sizes},
        "worse than linear (above 1)": worse,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
