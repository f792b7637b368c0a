"""Measure a refresh of a corpus of which 1% changed against the first run, and one of an unchanged corpus.

    python benchmarks/refreshing.py --work DIR --sizes 100000,1000000

The forward pass is a stub, as in `bookkeeping.py`, so the figures cover everything else: reading, comparing, copying and
writing. A real model adds the time of encoding `num_encoded` passages. One passage in a hundred is changed, added or deleted.
Each refresh runs in a new process that starts Ray. Bytes are counted over the files of the new generation.
"""

import argparse
import datetime
import json
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.bookkeeping import made_texts, make_model
from readapt_ray import artifacts, hardware
from readapt_ray.generations import Generation, read
from readapt_ray.storage import Location

_ROWS_PER_FILE = 50_000
_EVERY = 100


def main() -> None:
    """Measure each size, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for passages, model and artifacts")
    parser.add_argument("--sizes", default="100000,1000000")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/refreshing.json"))
    options = parser.parse_args()
    make_model(options.work / "model")
    results = {size: measured(options.work, int(size)) for size in options.sizes.split(",")}
    values = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": hardware.machine_info(),
        "versions": {name: version(name) for name in ("ray", "pyarrow", "faiss-cpu")},
        "sizes": results,
    }
    options.output.write_text(json.dumps(values, indent=1, default=str) + "\n")


def measured(work: Path, size: int) -> dict[str, Any]:
    """The first refresh, one after 1% changed, and one after nothing did."""
    folder = work / str(size)
    shutil.rmtree(folder, ignore_errors=True)
    found = {}
    for name, is_changed in (("first", False), ("changed", True), ("unchanged", True)):
        write_source(folder / "source", size, is_changed=is_changed)
        began = time.perf_counter()
        given = ["--source", str(folder / "source"), "--retriever", str(work / "model")]
        command = [sys.executable, "-m", "readapt_ray.cli", "refresh", "--root", str(folder / "root"), *given]
        subprocess.run(command, check=True, capture_output=True)
        root = Location(str(folder / "root"))
        present = read(root)[-1]
        found[name] = {"seconds": round(time.perf_counter() - began, 1)}
        if name != "unchanged":
            found[name] |= of_generation(root, present)
        print(size, name, found[name], flush=True)
    first, changed = found["first"], found["changed"]
    ratios = {f"{name}_ratio": round(changed[name] / first[name], 3) for name in ("seconds", "bytes", "num_encoded")}
    return found | ratios


def of_generation(root: Location, generation: Generation) -> dict[str, Any]:
    """Counts, seconds per stage, bytes and encoded passages of one generation."""
    made = {name: artifacts.open_artifact(generation.folder(root, name), stage) for name, stage in
            (("corpus", "ingest"), ("vectors", "embed"), ("index", "index"))}  # fmt: skip
    sizes = (info.size for each in made.values() for _, info in each.location.listing(recursive=True))
    return {
        "counts": generation.counts,
        "stages_s": {name: round(each.manifest.seconds, 1) for name, each in made.items()},
        "bytes": sum(sizes),
        "num_encoded": made["vectors"].manifest.details["work"]["num_encoded"],
    }


def write_source(folder: Path, size: int, *, is_changed: bool) -> None:
    """Write the passages; a file that stays as it is is not written again."""
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, size, _ROWS_PER_FILE):
        rows = pa.table(made_texts(first, min(_ROWS_PER_FILE, size - first))).to_pylist()
        path = folder / f"{first:010d}.parquet"
        pq.write_table(pa.Table.from_pylist(after_changes(rows) if is_changed else rows), path)


def after_changes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Change, follow by a new one, or delete each hundredth row, in turn."""
    found = []
    for number, row in enumerate(rows):
        kind = number // _EVERY % 3 if number % _EVERY == 0 else -1
        if kind == 2:
            continue
        found.append({**row, "text": f"{row['text']} changed"} if kind == 0 else row)
        if kind == 1:
            found.append({**row, "_id": f"{row['_id']}-new", "text": f"{row['text']} new"})
    return found


if __name__ == "__main__":
    main()
