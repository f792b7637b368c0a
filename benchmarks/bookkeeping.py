"""Measure the memory of driver and head that grows with the corpus: every stage over generated passages.

    python benchmarks/bookkeeping.py --work DIR --sizes 100000,1000000,10000000

The forward pass is a stub: an encoder of one layer, 16 wide, with a vocabulary of 384. Passages are in Parquet files;
each has eight words and a number. Each stage is a process of its own that starts Ray, as a job does. Reported are the peak
memory of the driver, of Ray's head (GCS and raylet) and of Ray's largest worker; the seconds of the stage without Ray's
start; and the seconds of the same command when there is nothing left to do. "worse than linear" is the time per passage
divided by that of the size before. A killed benchmark resumes: what is measured is not measured again. 10,000,000 passages
need 40 GB under DIR and an hour on two cores.
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
_NUM_QUERIES = 1000
_HEAD = ("gcs_server", "raylet")
_SAMPLE_S = 0.5


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
        ["array", "shape", "thread", "lock", "file", "write", "read", "index", "number", "string", "value", "list"]
    )
    random = np.random.default_rng(first)
    numbers = pa.array(range(first, first + number)).cast(pa.string())
    columns = [words.take(pa.array(random.integers(0, len(words), number))) for _ in range(8)]
    return {
        "_id": numbers,
        "title": pa.array([""] * number),
        "text": pc.binary_join_element_wise(*columns, numbers, " "),
    }


def by_driver(stage: str, work: Path, size: int) -> dict[str, Any]:
    """A stage in a process of its own, and the same again when it is done."""
    shutil.rmtree(work / str(size) / stage, ignore_errors=True)
    command = [sys.executable, __file__, "--work", str(work), "--sizes", str(size), "--stage", stage]
    first, again = (json.loads(subprocess.check_output(command).splitlines()[-1]) for _ in range(2))
    return first | {"again_s": again["seconds"]}


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
        "embed": lambda: ra.embed(ra.EmbedConfig(retriever=model, corpus=output["ingest"], output=output["embed"])),
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
    with ray_memory() as (head, workers):
        before_s = time.perf_counter()
        work[stage]()
        seconds = time.perf_counter() - before_s
    driver_bytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds": round(seconds, 1),
        "driver_GB": _gb(driver_bytes),
        "head_GB": _gb(max(head, default=0)),
        "largest_worker_GB": _gb(max(workers, default=0)),
    }


@contextlib.contextmanager
def ray_memory() -> Iterator[tuple[list[int], list[int]]]:
    """Bytes of Ray's GCS and raylet together, and of its largest worker without shared memory, sampled."""
    head_bytes: list[int] = []
    worker_bytes: list[int] = []
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(_SAMPLE_S):
            head, workers = 0, [0]
            for each in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    name, memory = each.name(), each.memory_info()
                    head += memory.rss if name in _HEAD else 0
                    workers.append(memory.rss - memory.shared if name.startswith("ray::") else 0)
            head_bytes.append(head)
            worker_bytes.append(max(workers))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield head_bytes, worker_bytes
    finally:
        ended.set()
        thread.join()


def _gb(num_bytes: int) -> float:
    return round(num_bytes / 1e9, 2)


def write(output: Path, known: dict[str, Any]) -> None:
    """All that is known so far."""
    sizes = sorted(known, key=int)
    worse = {
        f"{small} to {large}": {
            stage: round(known[large][stage]["seconds"] / int(large) / (known[small][stage]["seconds"] / int(small)), 2)
            for stage in STAGES
            if stage in known[small] and stage in known[large]
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
