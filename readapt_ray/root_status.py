"""Show the state of every artifact under a root (done, stale, running, ...), with progress, throughput and cost."""

import datetime
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from readapt_ray import artifacts, leases
from readapt_ray.artifact_files import MANIFEST_NAME, record_of
from readapt_ray.errors import InputError, ReadaptError, first_line
from readapt_ray.evaluation.tables import aligned_table
from readapt_ray.progress import amount, duration, figure
from readapt_ray.recipes import staleness, unlabelled
from readapt_ray.recipes.chain import RunConfig, plan_run
from readapt_ray.recipes.running import LOG_NAME, read_record
from readapt_ray.storage import Location


def rows(root: Location, usd_per_hour: Callable[[str], float] | None = None) -> list[dict[str, Any]]:
    """Return one row per artifact, with keys `artifact` (folder), `stage`, `state`, `seconds` and `what` (a summary).

    The states are done, stale (the run has other options or inputs now), running, stopped, failed, unreadable, missing.

    Args:
        root: the folder of a run, or any folder of artifacts.
        usd_per_hour: returns the cluster's price for a stage, by its name. Then each row also has `usd`. None means no
            costs.

    Raises:
        InputError: the folder does not exist.
    """
    if not root.is_folder():
        raise InputError(f"no folder {root.uri!r}; give the root of a run, or a folder of artifacts")
    record = read_record(root)
    planned = {step["output"]: step["stage"] for step in record.get("steps", [])}
    names = {*artifacts.names_under(root), *planned}
    found = {
        name: {"artifact": name, **_row(root if name == "." else root / name, planned.get(name, ""))} for name in names
    }
    _note_stale(found, record)
    _note_failure(found, root, record.get("failed") or {})
    if usd_per_hour is not None:
        for row in found.values():
            row["usd"] = row["seconds"] / 3600 * usd_per_hour(row["stage"])
    order = list(planned)
    return sorted(
        found.values(),
        key=lambda row: (order.index(row["artifact"]) if row["artifact"] in order else len(order), row["artifact"]),
    )


def _row(location: Location, stage: str) -> dict[str, Any]:
    """Return the row of one artifact. If it cannot be read, its state is "unreadable", and other rows are not affected."""
    try:
        row = _done(location) or _unfinished(location, stage)
    except (ReadaptError, ValueError, TypeError, AttributeError, KeyError) as error:
        return {"stage": stage, "state": "unreadable", "seconds": 0.0, "what": first_line(error)}
    manifest = record_of(location, MANIFEST_NAME)
    if row["state"] == "missing" and manifest.is_file():
        return {**row, "state": "unreadable", "what": f"{manifest} is not a manifest"}
    return row


def _note_stale(found: dict[str, dict[str, Any]], record: Mapping[str, Any]) -> None:
    """Set the state of artifacts to "stale" if the run of `run.json` would make them again."""
    if any(row["state"] == "unreadable" for row in found.values()):
        return
    try:
        config = RunConfig.parse(record["config"])
        steps = unlabelled.steps_for_corpus(config, plan_run(config))
        step_states = staleness.step_states(steps, record["steps"], reads_models=False)
    except (ReadaptError, KeyError):
        return  # another release wrote run.json
    for each in step_states:
        row = found.get(each.step.name)
        if row is not None and each.is_stale and row["state"] == "done":
            reasons = [*each.changes, *(f"made from {name}, which is stale" for name in each.stale_inputs)]
            row.update(state="stale", what="; ".join(reasons))


def _note_failure(found: dict[str, dict[str, Any]], root: Location, failed: Mapping[str, Any]) -> None:
    """Add to the row of the step that failed last: its error, the time, the host, and where the log is."""
    row = found.get(str(failed.get("output")))
    if row is None or row["state"] not in ("missing", "stopped", "failed"):
        return
    when = datetime.datetime.fromtimestamp(float(failed["time"])).astimezone().strftime("%Y-%m-%d %H:%M")
    log = f"; log: {root / LOG_NAME}" if (root / LOG_NAME).is_file() else ""
    row.update(state="failed", what=f"{failed['error']} ({when} on {failed['host']}{log})")


def status_table(root: Location, usd_per_hour: Callable[[str], float] | None = None) -> str:
    """Return the state of all artifacts under a root as an aligned text table, as `readapt status` prints it.

    Args:
        root: the folder of a run, or any folder of artifacts.
        usd_per_hour: returns the cluster's price for a stage, by its name. Then the table has a column of costs.

    Raises:
        InputError: the folder does not exist.
    """
    return as_table(rows(root, usd_per_hour), root.uri)


def as_table(found: Sequence[dict[str, Any]], root: str) -> str:
    """Return rows (of `rows`) as an aligned text table, with their total in the last line.

    If there are no rows, a sentence with the name `root` is returned.
    """
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
    if not isinstance(manifest.stage, str) or not isinstance(manifest.seconds, int | float):
        raise ValueError(f"its stage is {manifest.stage!r} and its seconds are {manifest.seconds!r}")
    return {"stage": manifest.stage, "state": "done", "seconds": manifest.seconds, "what": what}


def _unfinished(location: Location, stage: str) -> dict[str, Any]:
    lease: dict[str, Any] | None = artifacts.read_lease(location)
    if lease is None:
        return {"stage": stage, "state": "missing", "seconds": 0.0, "what": ""}
    alive = leases.is_alive(lease)
    progress = lease["progress"]
    done, total, rate = progress["done"], progress["total"], progress["rate"]
    parts = [
        f"{done:,}"
        + (f" of {amount(total, progress['unit'])} ({100 * done / total:.0f}%)" if total else f" {progress['unit']}")
    ]
    if alive and rate > 0:
        parts.append(f"{figure(rate)} {progress['unit']}/s")
        if total:
            parts.append(f"ETA {duration((total - done) / rate)}")
    if not alive:
        parts.append(f"last heartbeat {duration(time.time() - lease['heartbeat'])} ago on {lease['host']}")
        if error := lease.get("error"):
            parts.insert(0, error)
    state = "running" if alive else "failed" if lease.get("error") else "stopped"
    return {"stage": lease["stage"], "state": state, "seconds": lease["seconds"], "what": ", ".join(parts)}
