"""Report the step metrics of a run: terminal, JSONL, Ray's metrics, and optional trackers.

Worker 0 writes the lines of all steps up to a checkpoint before the checkpoint itself, a file each
(`metrics/step-N.jsonl`), so that whatever dies, every step that counts has its line, once; the end of the
run joins them into `metrics.jsonl`. What it posts to the monitor meanwhile is for the eye.
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
from readapt_ray.errors import InputError
from readapt_ray.progress import duration
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
"""From this length on the progress inside a step is shown."""
_PROJECT = "readapt_ray"
_Log = Callable[[int, dict[str, float]], None]
"""Takes a step and its values."""
MEASURED = (
    "loss",
    "learning_rate",
    "gradient_norm",
    "tokens_per_s",
    "mfu",
    "padding_share",
    "seconds",
    "data_wait_s",
    "peak_memory_bytes",
)
"""What Ray's metrics and the trackers get of a step."""


class RunMonitor:
    """An actor between the workers and the driver: step metrics, the error that ends a run, and what the workers hold.

    It also sets Ray's own metrics (`ray_readapt_train_loss` and the like for Prometheus).
    """

    def __init__(self, stage: str) -> None:
        from ray.util.metrics import Gauge

        self._rows: list[dict[str, Any]] = []
        self._part: dict[str, Any] | None = None
        self._error: Exception | None = None
        self._held: Any = None
        self._kept_step = 0
        self._gauges = {
            name: Gauge(f"readapt_{stage}_{name}", description=f"{name} of the last step of readapt {stage}")
            for name in ("step", *MEASURED)
        }

    def post(self, rows: list[dict[str, Any]]) -> None:
        """Add rows of worker 0."""
        self._rows.extend(rows)
        for name, gauge in self._gauges.items():
            if rows and rows[-1][name] is not None:
                gauge.set(float(rows[-1][name]))

    def take(self) -> list[dict[str, Any]]:
        """Return the rows since the last call."""
        rows, self._rows = self._rows, []
        return rows

    def post_part(self, part: dict[str, Any]) -> None:
        """Take how far worker 0 is inside a step."""
        self._part = part

    def take_part(self) -> dict[str, Any] | None:
        """Return how far worker 0 is inside a step; None if it said nothing since the last call."""
        part, self._part = self._part, None
        return part

    def fail(self, error: Exception) -> None:
        """Record an error that a restart would not cure; the first one counts."""
        self._error = self._error or error

    def error(self) -> Exception | None:
        """Return the error that ends the run."""
        return self._error

    def keep(self, step: int) -> None:
        """Note that a checkpoint of this step is being written."""
        self._kept_step = max(self._kept_step, step)

    def kept_step(self) -> int:
        """Return the step of the newest checkpoint of this run; 0 before the first."""
        return self._kept_step

    def hold(self, placement_group: Any) -> None:
        """Remember the placement group of the workers that start."""
        self._held = placement_group

    def held(self) -> Any:
        """Return the placement group of the last start; None before the first."""
        return self._held


class StepPoster:
    """Report steps as worker 0: to the monitor once per second, to files for good."""

    def __init__(self, monitor: Any, output: Location) -> None:
        self._monitor = monitor
        self._folder = output / _PARTS_NAME
        self._unposted: list[dict[str, Any]] = []
        self._unkept: list[dict[str, Any]] = []
        self._last_s = 0.0
        self._last_part_s = 0.0

    def __call__(self, report: "StepReport") -> None:
        """Take a report."""
        row = dataclasses.asdict(report)
        self._unposted.append(row)
        self._unkept.append(row)
        if time.monotonic() - self._last_s > _POLL_S or report.step == report.num_steps:
            self._last_s = time.monotonic()
            self._monitor.post.remote(self._unposted)
            self._unposted = []

    def part(self, report: "PartReport") -> None:
        """Take a report from inside a step; the monitor gets one per second."""
        if time.monotonic() - self._last_part_s > _POLL_S:
            self._last_part_s = time.monotonic()
            self._monitor.post_part.remote(dataclasses.asdict(report))

    def keep(self, step: int) -> None:
        """Write the lines of all steps since the last call."""
        if self._unkept:
            first = self._unkept[0]["step"]
            (self._folder / f"step-{first:09d}-{step:09d}.jsonl").write_text(_lines(self._unkept))
            self._unkept = []
        self._monitor.keep.remote(step)


@contextlib.contextmanager
def followed(monitor: Any, workspace: Workspace, trackers: Sequence[str]) -> Iterator[None]:
    """Show what the monitor has, once per second, while the block runs; join the lines afterwards.

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
    """Say how far a long step is, and once, from its first micro-batches, what the whole run will take."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._has_estimated = False

    def show(self, part: dict[str, Any]) -> None:
        """Show a report from inside a step, if the step is long."""
        if part["part_s"] * part["num_parts"] < _LONG_STEP_S:
            return
        if not self._has_estimated:
            self._has_estimated = True
            logger.info("%s: %s", self._workspace.reporter.label, estimate(part))
        where = f"in step {part['step'] + 1:,}: {part['done']:,} of {part['num_parts']:,} micro-batches"
        self._workspace.progress(part["step"], part["num_steps"], unit="steps", note=where)


def estimate(part: dict[str, Any]) -> str:
    """Return what the rest of a run will take, from the first micro-batches of a step."""
    step_s = part["part_s"] * part["num_parts"]
    left = part["num_steps"] - part["step"]
    return (
        f"a step takes about {duration(step_s)} ({part['num_parts']:,} micro-batches, {part['num_tokens'] / step_s:,.0f} "
        f"tokens/s), and the {left:,} steps about {duration(left * step_s)}; {part['peak_memory_bytes'] / 1e9:.1f} GB of "
        f"memory in worker 0 so far"
    )


def _show(
    monitor: Any, workspace: Workspace, logs: list[_Log], latest: deque[dict[str, Any]], inside: _InsideSteps
) -> None:
    import ray

    try:
        rows = ray.get(monitor.take.remote(), timeout=10)
        part = ray.get(monitor.take_part.remote(), timeout=10)
    except ray.exceptions.RayError as error:
        logger.debug("no metrics: %s", error)
        return
    for row in rows:
        for log in logs:
            log(row["step"], {name: row[name] for name in MEASURED if row[name] is not None})
    if rows:
        latest.extend(rows)
        last = rows[-1]
        workspace.progress(last["step"], last["num_steps"], unit="steps", note=note(latest))
    elif part:
        inside.show(part)


def note(rows: Sequence[dict[str, Any]]) -> str:
    """Format the latest steps for the terminal: values of the last one, speeds over all of them."""
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
    """Join the lines that workers kept into `metrics.jsonl`: rows in order, each step once."""
    rows = {row["step"]: row for row in read_metrics(location)}
    parts = _parts(location)
    for file in parts:
        rows |= {row["step"]: row for row in map(json.loads, file.read_text().splitlines())}
    ordered = [rows[step] for step in sorted(rows)]
    if ordered:
        (location / METRICS_NAME).write_text(_lines(ordered))
    artifact_files.clear(location, [f"{_PARTS_NAME}/{file.name}" for file in parts])
    return ordered


def kept_steps(location: Location) -> int:
    """Return the last step whose line workers kept so far."""
    files = _parts(location)
    return int(files[-1].name.removesuffix(".jsonl").rsplit("-", 1)[-1]) if files else 0


def kept_peak_bytes(location: Location, *, after_step: int) -> int:
    """Return the most memory that worker 0 reported after a step; 0 if it kept no line since."""
    files = _parts(location)
    rows = [json.loads(line) for file in files[-1:] for line in file.read_text().splitlines()]
    return max((int(row["peak_memory_bytes"]) for row in rows if row["step"] > after_step), default=0)


def read_metrics(location: Location) -> list[dict[str, Any]]:
    """Return the step metrics of a finished run, in order; empty if there are none."""
    file = location / METRICS_NAME
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def _parts(location: Location) -> list[Location]:
    """Return the files of lines that workers kept, in order; other files in their folder are ignored."""
    folder = location / _PARTS_NAME
    return [folder / name for name, _ in folder.listing(".jsonl") if _PART.fullmatch(name)]


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@contextlib.contextmanager
def _tensorboard(workspace: Workspace) -> Iterator[_Log]:
    """Write event files to `tensorboard/` of the artifact."""
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
    """Write a run of Weights & Biases, configured by its own environment variables."""
    name, run_id = workspace.location.name, workspace.fingerprint
    run = _installed(_PACKAGES["wandb"]).init(project=_PROJECT, name=name, id=run_id, resume="allow")
    try:
        yield lambda step, values: run.log(values, step=step)
    finally:
        run.finish()


@contextlib.contextmanager
def _mlflow(workspace: Workspace) -> Iterator[_Log]:
    """Write a run of MLflow, to the server of MLFLOW_TRACKING_URI."""
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
    """Check that the packages of trackers are installed.

    Raises:
        InputError: one is not.
    """
    for name in trackers:
        _installed(_PACKAGES[name])


def _installed(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise InputError(f"trackers names {package!r}, which is not installed; pip install {package}") from error
