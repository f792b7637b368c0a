"""Measure refreshes of a corpus on an object store: what requests, bytes and CPU seconds follow the change.

    python benchmarks/refreshing.py --work DIR --sizes 20000,100000
    python benchmarks/refreshing.py --work DIR --sizes 20000 --counts-only

The forward pass is a stub, as in `bookkeeping.py`, so the figures cover everything else: reading, comparing, copying and
writing. A real model adds the time of encoding `num_encoded` passages. Source and root are on an S3 server on loopback
(moto's), which counts requests and the bytes of bodies; copies that the server makes itself are counted as requests only.
The corpus is a hundred Parquet files. Measured are the first run; one after 1% of the passages changed, all in one file
("one file"); one after 1% changed, spread over all files ("spread"); and one after nothing did. One in three of the
passages concerned is changed, one is followed by a new one, one is deleted. Each refresh runs in a new process that starts
Ray; its CPU seconds are those of all its children.
"""

import argparse
import contextlib
import datetime
import io
import json
import logging
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.bookkeeping import made_texts, make_model
from readapt_ray import artifacts, hardware
from readapt_ray.generations import STAGE_OF, Generation, read
from readapt_ray.recipes.refreshing.options import RefreshConfig
from readapt_ray.recipes.refreshing.refresh import refresh
from readapt_ray.storage import Location
from tests import object_store
from tests.recipes.refreshing.in_process import without_ray

_NUM_FILES = 100
_EVERY = 100
_SAMPLE_S = 0.25
COSTS = ("requests", "bytes_written", "bytes_read", "cpu_s", "seconds")


def main() -> None:
    """Measure each size, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the model")
    parser.add_argument("--sizes", default="20000,100000")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/refreshing.json"))
    parser.add_argument("--counts-only", action="store_true", help="run without Ray, in this process")
    options = parser.parse_args()
    make_model(options.work / "model")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it tells of each request
    results = {}
    for size in options.sizes.split(","):
        with object_store.running() as store:
            results[size] = measured(store, options.work / "model", int(size), counts_only=options.counts_only)
    values = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": hardware.machine_info(),
        "versions": {name: version(name) for name in ("ray", "pyarrow", "faiss-cpu", "moto")},
        "sizes": results,
    }
    options.output.write_text(json.dumps(values, indent=1, default=str) + "\n")


def measured(store: object_store.Store, model: Path, size: int, *, counts_only: bool) -> dict[str, Any]:
    """The first refresh, and those after each change."""
    source, root = (Location(f"s3://{object_store.BUCKET}/{size}/{name}") for name in ("source", "root"))
    in_one_file = size // _NUM_FILES
    states: dict[str, Callable[[int], bool]] = {
        "first": lambda _: False,
        "one file": lambda row: row < in_one_file,
        "spread": lambda row: row < in_one_file or row % _EVERY == _EVERY - 1,
        "unchanged": lambda row: row < in_one_file or row % _EVERY == _EVERY - 1,
    }
    found: dict[str, Any] = {}
    for name, changes in states.items():
        write_source(source, size, changes)
        run = counted_here if counts_only else watched
        with counted(store) as cost:
            cost.update(run(root.uri, source.uri, str(model)))
        found[name] = cost if name == "unchanged" else cost | of_generation(root, read(root)[-1])
        if name != "first":
            ratios = {each: round(cost[each] / found["first"][each], 3) for each in COSTS if each in cost}
            found[name]["of_first_run"] = ratios
        print(size, name, json.dumps(found[name]), flush=True)
    return found


@contextlib.contextmanager
def counted(store: object_store.Store) -> Iterator[dict[str, Any]]:
    """Count what the store is asked in the meantime."""
    store.requests.clear()
    written, sent = store.bytes_written, store.bytes_read
    cost: dict[str, Any] = {}
    yield cost
    kinds = Counter(kind.split()[0] for kind in store.requests)
    cost |= {
        "requests": kinds.total(),
        "by_method": dict(kinds),
        "bytes_written": store.bytes_written - written,
        "bytes_read": store.bytes_read - sent,
    }


def counted_here(root: str, source: str, model: str) -> dict[str, float]:
    """Refresh in this process, without Ray; return its CPU seconds, those of the server included."""
    began_s = time.process_time()
    with pytest.MonkeyPatch.context() as patched:
        without_ray(patched)
        refresh(RefreshConfig(root=root, source=source, retriever=model))
    return {"cpu_s": round(time.process_time() - began_s, 1)}


def watched(root: str, source: str, model: str) -> dict[str, float]:
    """Refresh in a new process; return its seconds, and the CPU seconds of all that it starts, sampled."""
    command = ["-m", "readapt_ray.cli", "refresh", "--root", root, "--source", source, "--retriever", model]
    began_s = time.perf_counter()
    cpu_s: dict[tuple[int, float], float] = {}
    with subprocess.Popen([sys.executable, *command]) as process:
        while process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                parent = psutil.Process(process.pid)
                for each in [parent, *parent.children(recursive=True)]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        times = each.cpu_times()
                        cpu_s[each.pid, each.create_time()] = times.user + times.system
            time.sleep(_SAMPLE_S)
    if process.returncode:
        raise SystemExit(f"the refresh ended with {process.returncode}")
    return {"seconds": round(time.perf_counter() - began_s, 1), "cpu_s": round(sum(cpu_s.values()), 1)}


def of_generation(root: Location, generation: Generation) -> dict[str, Any]:
    """Counts and encoded passages of one generation."""
    made = {name: artifacts.open_artifact(generation.folder(root, name), STAGE_OF[name])
            for name in ("corpus", "vectors", "index")}  # fmt: skip
    work = made["vectors"].manifest.details["work"]
    return {
        "counts": generation.counts,
        "stages_s": {name: round(each.manifest.seconds, 1) for name, each in made.items()},
        "num_encoded": work["num_encoded"],
    }


def write_source(folder: Location, size: int, changes: Callable[[int], bool]) -> None:
    """Write the passages; a file that stays as it is is not written again."""
    num_rows = -(-size // _NUM_FILES)
    for first in range(0, size, num_rows):
        made = pa.table(made_texts(first, min(num_rows, size - first))).to_pylist()
        stream = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(after_changes(made, changes)), stream)
        file = folder / f"{first:010d}.parquet"
        if not file.is_file() or file.read_bytes() != stream.getvalue():
            file.write_bytes(stream.getvalue())


def after_changes(rows: list[dict[str, Any]], changes: Callable[[int], bool]) -> list[dict[str, Any]]:
    """Change, follow by a new one, or delete the rows that are to change, in turn."""
    found = []
    for row in rows:
        kind = -1
        if changes(int(row["_id"])):
            kind = int(row["_id"]) // (_EVERY if int(row["_id"]) % _EVERY == _EVERY - 1 else 1) % 3
        if kind == 2:
            continue
        found.append({**row, "text": f"{row['text']} changed"} if kind == 0 else row)
        if kind == 1:
            found.append({**row, "_id": f"{row['_id']}-new", "text": f"{row['text']} new"})
    return found


if __name__ == "__main__":
    main()
