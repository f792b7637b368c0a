"""What is done, running, stopped and missing under a root."""

import json
import time
from typing import Any

from readapt_ray import artifacts, leases
from readapt_ray.errors import InputError
from readapt_ray.progress import duration
from readapt_ray.recipes import RUN_NAME
from readapt_ray.storage import Location


def rows(root: Location) -> list[dict[str, str]]:
    """One row an artifact: its folder, stage, state (done, running, stopped, missing) and what it says.

    Raises:
        InputError: there is no such folder.
    """
    if not root.is_folder():
        raise InputError(f"no folder {root.uri!r}; give the root of a run, or a folder of artifacts")
    found: dict[str, dict[str, str]] = {}
    for relative, _ in root.listing(".json", recursive=True):
        for name, describe in ((artifacts.MANIFEST_NAME, _done), (artifacts.BUILDING_NAME, _unfinished)):
            if relative == name or relative.endswith((f"/{name}", f".{name}")):
                folder = relative[: -len(name)].rstrip("/.") or "."
                found[folder] = {"artifact": folder, **describe(root if folder == "." else root / folder)}
    plan = root / RUN_NAME
    planned = json.loads(plan.read_text())["steps"] if plan.is_file() else []
    order = [step["output"] for step in planned]
    for step in planned:
        missing = {"artifact": step["output"], "stage": step["stage"], "state": "missing", "what": ""}
        found.setdefault(step["output"], missing)
    return sorted(
        found.values(),
        key=lambda row: (order.index(row["artifact"]) if row["artifact"] in order else len(order), row["artifact"]),
    )


def table(root: Location) -> str:
    """The rows as aligned text."""
    lines = [("artifact", "stage", "state", "")] + [
        (r["artifact"], r["stage"], r["state"], r["what"]) for r in rows(root)
    ]
    if len(lines) == 1:
        return f"no artifact under {root.uri}"
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[3]]).rstrip()
        for line in lines
    )


def _done(location: Location) -> dict[str, str]:
    manifest = artifacts.read_manifest(location)
    if manifest is None:
        return {"stage": "", "state": "missing", "what": ""}
    counts = ", ".join(
        f"{value:,} {name.removeprefix('num_').replace('_', ' ')}" for name, value in manifest.counts.items()
    )
    return {"stage": manifest.stage, "state": "done", "what": f"{duration(manifest.seconds)}, {counts}".rstrip(", ")}


def _unfinished(location: Location) -> dict[str, str]:
    building: dict[str, Any] | None = artifacts.read_building(location)
    if building is None:
        return {"stage": "", "state": "missing", "what": ""}
    alive = leases.is_alive(building)
    progress = building["progress"]
    what = (
        f"{progress['done']:,}" + (f" of {progress['total']:,}" if progress["total"] else "") + f" {progress['unit']}"
    )
    if alive and progress["total"] and progress["rate"] > 0:
        what += f", ETA {duration((progress['total'] - progress['done']) / progress['rate'])}"
    if not alive:
        what += f", last sign {duration(time.time() - building['heartbeat'])} ago"
    return {"stage": building["stage"], "state": "running" if alive else "stopped", "what": what}
