"""What is done, running, stopped and missing under a root, how fast it goes, and what it cost."""

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

from readapt_ray import artifacts, leases
from readapt_ray.errors import InputError
from readapt_ray.evaluation.tables import aligned_table
from readapt_ray.progress import duration, figure
from readapt_ray.recipes.chain import RUN_NAME
from readapt_ray.storage import Location


def rows(root: Location, usd_per_hour: Callable[[str], float] | None = None) -> list[dict[str, Any]]:
    """One row an artifact: its folder, stage, state (done, running, stopped, missing), seconds and what it says.

    Args:
        usd_per_hour: of the cluster, by stage; then each row has `usd`, too.

    Raises:
        InputError: there is no such folder.
    """
    if not root.is_folder():
        raise InputError(f"no folder {root.uri!r}; give the root of a run, or a folder of artifacts")
    found: dict[str, dict[str, Any]] = {}
    for name in artifacts.names_under(root):
        location = root if name == "." else root / name
        found[name] = {"artifact": name, **(_done(location) or _unfinished(location))}
    planned = _planned(root / RUN_NAME)
    order = [step["output"] for step in planned]
    for step in planned:
        missing = {"artifact": step["output"], "stage": step["stage"], "state": "missing", "seconds": 0.0, "what": ""}
        found.setdefault(step["output"], missing)
    if usd_per_hour is not None:
        for row in found.values():
            row["usd"] = row["seconds"] / 3600 * usd_per_hour(row["stage"])
    return sorted(
        found.values(),
        key=lambda row: (order.index(row["artifact"]) if row["artifact"] in order else len(order), row["artifact"]),
    )


def _planned(file: Location) -> list[dict[str, str]]:
    """Return stage and output of each step of the run that wrote this file; none where another program wrote it."""
    try:
        values = json.loads(file.read_bytes()) if file.is_file() else {}
    except ValueError:
        return []
    steps = values.get("steps") if isinstance(values, dict) else None
    is_ours = isinstance(steps, list) and all(
        isinstance(each, dict) and {"stage", "output"} <= each.keys() for each in steps
    )
    return steps if isinstance(steps, list) and is_ours else []


def status_table(root: Location, usd_per_hour: Callable[[str], float] | None = None) -> str:
    """The rows as aligned text, and their sum."""
    return as_table(rows(root, usd_per_hour), root.uri)


def as_table(found: Sequence[dict[str, Any]], root: str) -> str:
    """Rows as aligned text, and their sum."""
    if not found:
        return f"no artifact under {root}"
    has_cost = "usd" in found[0]
    lines = [("artifact", "stage", "state", "time", "USD", "")]
    for row in found:
        cost = f"{row['usd']:,.2f}" if "usd" in row else ""
        spent = duration(row["seconds"]) if row["seconds"] else ""
        lines.append((row["artifact"], row["stage"], row["state"], spent, cost, row["what"]))
    seconds = sum(row["seconds"] for row in found)
    total = f"{sum(row['usd'] for row in found):,.2f}" if has_cost else ""
    num_done = sum(row["state"] == "done" for row in found)
    lines.append(("", "", f"{num_done} of {len(found)} done", duration(seconds), total, ""))
    return aligned_table(lines if has_cost else [(*line[:4], line[5]) for line in lines])


def _done(location: Location) -> dict[str, Any] | None:
    manifest = artifacts.read_manifest(location)
    if manifest is None:
        return None
    what = artifacts.counted(manifest.counts)
    return {"stage": manifest.stage, "state": "done", "seconds": manifest.seconds, "what": what}


def _unfinished(location: Location) -> dict[str, Any]:
    lease: dict[str, Any] | None = artifacts.read_lease(location)
    if lease is None:
        return {"stage": "", "state": "missing", "seconds": 0.0, "what": ""}
    alive = leases.is_alive(lease)
    progress = lease["progress"]
    done, total, rate = progress["done"], progress["total"], progress["rate"]
    parts = [
        f"{done:,}"
        + (f" of {total:,} {progress['unit']} ({100 * done / total:.0f}%)" if total else f" {progress['unit']}")
    ]
    if alive and rate > 0:
        parts.append(f"{figure(rate)} {progress['unit']}/s")
        if total:
            parts.append(f"ETA {duration((total - done) / rate)}")
    if not alive:
        parts.append(f"last sign {duration(time.time() - lease['heartbeat'])} ago on {lease['host']}")
    state = "running" if alive else "stopped"
    return {"stage": lease["stage"], "state": state, "seconds": lease["seconds"], "what": ", ".join(parts)}
