"""Report the step metrics of a run: terminal, JSONL, Ray's metrics, and optional trackers.

Before each checkpoint, worker 0 writes the metrics of all steps since the last one to a file
(`metrics/step-FIRST-LAST.jsonl`). So every step that a checkpoint covers has its metrics, even after a crash. The end
of the run joins the files into `metrics.jsonl`, each step once. What worker 0 posts to the monitor in between is only
displayed.
"""

import contextlib
import dataclasses
import importlib
import json
import logging
import re
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from readapt_ray import artifact_files
from readapt_ray.artifacts import Workspace
from readapt_ray.cluster.run_monitor import MEASURED
from readapt_ray.errors import InputError
from readapt_ray.progress import amount, duration
from readapt_ray.storage import Location

if TYPE_CHECKING:
    from readapt_ray.training.steps import PartReport, StepReport

logger = logging.getLogger("readapt_ray")

METRICS_NAME = "metrics.jsonl"
_PARTS_NAME = "metrics"
_PART = re.compile(r"step-\d{9,}-\d{9,}\.jsonl")
_POLL_S = 1.0
_AVERAGED_STEPS = 50
_LONG_STEP_S = 10.0
"""Show progress inside a step if the step takes longer than this."""
_PROJECT = "readapt_ray"
_Log = Callable[[int, dict[str, float]], None]
"""Function of a tracker: takes a step and its values by name."""


class StepPoster:
    """Reports the steps of worker 0: to the monitor once per second, and to files at each checkpoint."""

    def __init__(self, monitor: Any, output: Location) -> None:
        self._monitor = monitor
        self._folder = output / _PARTS_NAME
        self._unposted: list[dict[str, Any]] = []
        self._unwritten: list[dict[str, Any]] = []
        self._last_s = 0.0
        self._last_part_s = 0.0

    def __call__(self, report: "StepReport") -> None:
        """Take the report of a finished step."""
        row = dataclasses.asdict(report)
        self._unposted.append(row)
        self._unwritten.append(row)
        if time.monotonic() - self._last_s > _POLL_S or report.step == report.num_steps:
            self._last_s = time.monotonic()
            self._monitor.post.remote(self._unposted)
            self._unposted = []

    def part(self, report: "PartReport") -> None:
        """Post the progress inside a step (micro-batches done so far) to the monitor.

        A report less than one second after the last posted one is dropped. Nothing is written to files.
        """
        if time.monotonic() - self._last_part_s > _POLL_S:
            self._last_part_s = time.monotonic()
            self._monitor.post_part.remote(dataclasses.asdict(report))

    def flush(self, step: int) -> None:
        """Write the metrics of all steps since the last call to a file; call it before the checkpoint of `step`.

        Without new steps, no file is written.
        """
        if self._unwritten:
            first = self._unwritten[0]["step"]
            (self._folder / f"step-{first:09d}-{step:09d}.jsonl").write_text(_lines(self._unwritten))
            self._unwritten = []
        self._monitor.keep.remote(step)


@contextlib.contextmanager
def showing_metrics(monitor: Any, workspace: Workspace, trackers: Sequence[str]) -> Iterator[None]:
    """Show the monitor's metrics once per second while the block runs, on the terminal and in trackers.

    Warnings of the workers are logged. Rows are taken from the monitor, so only one block can show them.

    Args:
        monitor: the `RunMonitor` actor.
        workspace: receives the progress.
        trackers: names among tensorboard, wandb and mlflow.

    Raises:
        InputError: a tracker's package is not installed.
    """
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(_TRACKERS[name](workspace)) for name in trackers]
        latest: deque[dict[str, Any]] = deque(maxlen=_AVERAGED_STEPS)
        inside = _InsideSteps(workspace)
        stop = threading.Event()

        def follow() -> None:
            while not stop.wait(_POLL_S):
                _show(monitor, workspace, logs, latest, inside)

        thread = threading.Thread(target=follow, daemon=True)
        logger.info("%s: waiting for the workers to start", workspace.reporter.label)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            _show(monitor, workspace, logs, latest, inside)


class _InsideSteps:
    """Shows progress inside long steps, and once, after a first micro-batch, an estimate for the whole run."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._has_estimated = False
        self._last: dict[str, Any] | None = None
        self._began_s = 0.0

    def show(self, part: dict[str, Any] | None) -> None:
        """Show a report from inside a long step; without a new report (None), show that the step is still at work."""
        if part is not None:
            if self._last is None or part["step"] != self._last["step"]:
                self._began_s = time.monotonic()
            self._last = part
        if self._last is None:
            return
        last, at_work_s = self._last, time.monotonic() - self._began_s
        if max(at_work_s, last["part_s"] * last["num_parts"]) < _LONG_STEP_S:
            return
        if last["part_s"] and not self._has_estimated:
            self._has_estimated = True
            logger.info("%s: %s", self._workspace.reporter.label, estimate(last))
        where = f"in step {last['step'] + 1:,}: {last['done']:,} of {amount(last['num_parts'], 'micro-batches')}"
        at_work = f", at work for {duration(at_work_s)}" if at_work_s >= 1 else ""
        self._workspace.progress(last["step"], last["num_steps"], unit="steps", note=where + at_work)

    def end(self) -> None:
        """Forget the reports of a step that ended."""
        self._last = None


def estimate(part: dict[str, Any]) -> str:
    """Format an estimate of the run's remaining time, from the first micro-batches of a step.

    Args:
        part: a `PartReport` as a dict.
    """
    step_s = part["part_s"] * part["num_parts"]
    left = part["num_steps"] - part["step"]
    late = (
        f"; checkpoints come between steps, so an interruption loses up to {duration(step_s)}: a smaller batch_size loses less"
        if step_s > part["checkpoint_every_s"] > 0
        else ""
    )
    return (
        f"a step takes about {duration(step_s)} ({amount(part['num_parts'], 'micro-batches')}, {part['num_tokens'] / step_s:,.0f} "
        f"tokens/s), and the {amount(left, 'steps')} about {duration(left * step_s)}; {part['peak_memory_bytes'] / 1e9:.1f} GB of "
        f"memory in worker 0 so far{late}"
    )


def _show(
    monitor: Any, workspace: Workspace, logs: list[_Log], latest: deque[dict[str, Any]], inside: _InsideSteps
) -> None:
    import ray

    try:
        asked = (monitor.take, monitor.take_part, monitor.take_warnings)
        rows, part, warnings = ray.get([each.remote() for each in asked], timeout=10)
    except ray.exceptions.RayError as error:
        logger.debug("no metrics: %s", error)
        return
    for text in warnings:
        logger.warning("%s: %s", workspace.reporter.label, text)
    for row in rows:
        for log in logs:
            log(row["step"], {name: row[name] for name in MEASURED if row[name] is not None})
    if rows:
        inside.end()
        latest.extend(rows)
        last = rows[-1]
        workspace.progress(last["step"], last["num_steps"], unit="steps", note=note(latest))
    else:
        inside.show(part)


def note(rows: Sequence[dict[str, Any]]) -> str:
    """Format the latest steps as one line for the terminal.

    Loss, learning rate, gradient norm, padding and peak memory are of the last step. Tokens per second, MFU and the
    share of time spent waiting for data are means over all these steps.

    Args:
        rows: `StepReport`s as dicts, in order; at least one.
    """
    last = rows[-1]
    seconds = max(sum(row["seconds"] for row in rows), 1e-9)

    def mean(name: str) -> float:
        return float(sum(row[name] * row["seconds"] for row in rows) / seconds)

    mfu = "" if last["mfu"] is None else f", MFU {mean('mfu'):.0%}"
    waited = sum(row["data_wait_s"] for row in rows) / seconds
    return (
        f"loss {last['loss']:.3f}, lr {last['learning_rate']:.1e}, gradient {last['gradient_norm']:.2g}, "
        f"{mean('tokens_per_s'):,.0f} tokens/s{mfu}, padding {last['padding_share']:.0%}, waited {waited:.0%}, "
        f"{last['peak_memory_bytes'] / 1e9:.1f} GB"
    )


def join(location: Location) -> list[dict[str, Any]]:
    """Join the files that worker 0 wrote into `metrics.jsonl`, and delete them; return all rows, each step once.

    Rows that are already in `metrics.jsonl` stay, unless a file has the same step again. Without any row nothing is
    written and the result is empty.

    Args:
        location: folder of the artifact.
    """
    rows = {row["step"]: row for row in read_metrics(location)}
    parts = _parts(location)
    for file in parts:
        rows |= {row["step"]: row for row in map(json.loads, file.read_text().splitlines())}
    ordered = [rows[step] for step in sorted(rows)]
    if ordered:
        (location / METRICS_NAME).write_text(_lines(ordered))
    artifact_files.clear(location, [f"{_PARTS_NAME}/{file.name}" for file in parts])
    return ordered


def last_written_step(location: Location) -> int:
    """Return the last step in the files of metrics that worker 0 has written; 0 for none.

    Only the names of the files are read. After `join`, which deletes these files, the result is 0.

    Args:
        location: folder of the artifact.
    """
    files = _parts(location)
    return int(files[-1].name.removesuffix(".jsonl").rsplit("-", 1)[-1]) if files else 0


def written_peak_bytes(location: Location, *, after_step: int) -> int:
    """Return the peak memory in bytes in the latest file of metrics of worker 0; 0 for none, and after `join`.

    Args:
        location: folder of the artifact.
        after_step: steps up to this one are ignored.
    """
    files = _parts(location)
    rows = [json.loads(line) for file in files[-1:] for line in file.read_text().splitlines()]
    return max((int(row["peak_memory_bytes"]) for row in rows if row["step"] > after_step), default=0)


def read_metrics(location: Location) -> list[dict[str, Any]]:
    """Return the step metrics of a finished run from its `metrics.jsonl`, in order; empty if there is no such file."""
    file = location / METRICS_NAME
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def _parts(location: Location) -> list[Location]:
    """Return the files of metrics that worker 0 wrote, in order; ignore other files in their folder."""
    folder = location / _PARTS_NAME
    return [folder / name for name, _ in folder.listing(".jsonl") if _PART.fullmatch(name)]


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@contextlib.contextmanager
def _tensorboard(workspace: Workspace) -> Iterator[_Log]:
    """Write TensorBoard event files to `tensorboard/` in the artifact."""
    target = workspace.location / "tensorboard"
    with tempfile.TemporaryDirectory() as temporary:
        folder = target.local_path if target.is_local else Path(temporary)
        writer = _installed(_PACKAGES["tensorboard"]).SummaryWriter(str(folder))

        def log(step: int, values: dict[str, float]) -> None:
            for name, value in values.items():
                writer.add_scalar(f"train/{name}", value, step)

        try:
            yield log
        finally:
            writer.close()
            for path in () if target.is_local else folder.iterdir():
                (target / path.name).write_bytes(path.read_bytes())


@contextlib.contextmanager
def _wandb(workspace: Workspace) -> Iterator[_Log]:
    """Write a run to Weights & Biases, configured by that client's environment variables."""
    name, run_id = workspace.location.name, workspace.fingerprint
    run = _installed(_PACKAGES["wandb"]).init(project=_PROJECT, name=name, id=run_id, resume="allow")
    try:
        yield lambda step, values: run.log(values, step=step)
    finally:
        run.finish()


@contextlib.contextmanager
def _mlflow(workspace: Workspace) -> Iterator[_Log]:
    """Write a run to the MLflow server at MLFLOW_TRACKING_URI."""
    mlflow = _installed(_PACKAGES["mlflow"])
    mlflow.set_experiment(_PROJECT)
    with mlflow.start_run(run_name=workspace.location.name):
        yield lambda step, values: mlflow.log_metrics(values, step=step)


_TRACKERS: dict[str, Callable[[Workspace], contextlib.AbstractContextManager[_Log]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
}
_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}


def check_trackers(trackers: Sequence[str]) -> None:
    """Check that the packages of these trackers (tensorboard, wandb, mlflow) are installed, by importing them.

    Raises:
        InputError: a package is not installed.
    """
    for name in trackers:
        _installed(_PACKAGES[name])


def _installed(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise InputError(f"trackers names {package!r}, which is not installed; pip install {package}") from error
