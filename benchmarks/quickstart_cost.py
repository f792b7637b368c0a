"""What the quickstart costs: wall time of the first and of a second run, and the peak memory of all its processes.

    python benchmarks/quickstart_cost.py --root /tmp/cost

Memory is the proportional set size (shared pages counted once) of the command and of everything that it
started, Ray's own processes among them, sampled twice a second. Writes JSON to --output.
"""

import argparse
import datetime
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from readapt_ray import hardware

_SAMPLE_S = 0.5


def main() -> None:
    """Run the quickstart twice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="new folder of the artifacts")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/quickstart_cost.json"))
    options = parser.parse_args()
    if Path(options.root).exists():
        parser.error(f"--root {options.root} exists; give a new folder")
    first, second = measured(options.root), measured(options.root)
    stages = {
        str(file.parent.relative_to(options.root)): json.loads(file.read_text())["seconds"]
        for file in sorted(Path(options.root).rglob("manifest.json"))
    }
    result = {
        "command": "python benchmarks/quickstart_cost.py",
        "date": datetime.date.today().isoformat(),
        "hardware": hardware.machine_info()["driver"],
        "first": first,
        "second": second,
        "seconds of the stages": stages,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def measured(root: str) -> dict[str, Any]:
    """Wall seconds and peak bytes of one quickstart."""
    started_s = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "readapt_ray.cli", "quickstart", "--root", root])
    seen: dict[int, psutil.Process] = {}
    peak = 0
    while process.poll() is None:
        for each in _family(process.pid):
            seen.setdefault(each.pid, each)
        peak = max(peak, sum(map(_bytes, seen.values())))
        time.sleep(_SAMPLE_S)
    if process.returncode:
        sys.exit(f"the quickstart failed with code {process.returncode}")
    return {"wall_s": round(time.monotonic() - started_s, 1), "peak_gb": round(peak / 1e9, 2)}


def _family(pid: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _bytes(process: psutil.Process) -> int:
    """Proportional set size; 0 for a process that has ended."""
    try:
        return int(process.memory_full_info().pss)
    except psutil.NoSuchProcess:
        return 0


if __name__ == "__main__":
    main()
