"""Running a function on Ray Train workers, with its step metrics shown while it runs.

State lives in our own checkpoints under the artifact (see training/engine.py), not in Ray Train's, so
what counts as done is what was really committed. Ray Train starts the workers, forms their process
group, and starts them again after a failure.
"""

import contextlib
import dataclasses
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from readapt_ray.artifacts import Workspace
from readapt_ray.stages import cluster
from readapt_ray.storage import Location

logger = logging.getLogger("readapt_ray")

_POLL_S = 1.0
_WRITE_S = 15.0
_ABORT_TIMEOUT_S = 20.0


def placement(num_workers: int | None, num_cpus_per_worker: int | None) -> tuple[int, dict[str, float], bool]:
    """Number of workers, resources of each, and whether they have a GPU.

    Default: one worker a GPU; without GPUs one worker that has all the cores of a machine to itself,
    since threads share weights and need no messages.

    Raises:
        PlacementError: the cluster does not have that much.
    """
    total = cluster.connect()
    if total.num_gpus:
        count = num_workers or total.num_gpus
        resources = {"GPU": 1.0, "CPU": float(num_cpus_per_worker or 1)}
    else:
        cpus = num_cpus_per_worker or max(1, total.num_cpus // max(1, num_workers or total.num_nodes))
        count = num_workers or total.num_nodes
        resources = {"CPU": float(cpus)}
    cluster.check_placement(count, resources, who="workers")
    return count, resources, bool(total.num_gpus)


class _Board:
    """An actor that collects the metrics of worker 0, for whoever asks."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []

    def post(self, rows: list[dict[str, Any]]) -> None:
        self._rows.extend(rows)

    def take(self) -> list[dict[str, Any]]:
        rows, self._rows = self._rows, []
        return rows


class StepPoster:
    """Sends step reports of worker 0 to the driver, a second's worth at a time."""

    def __init__(self, board: Any, worker_rank: int) -> None:
        self._board = board
        self._rows: list[dict[str, Any]] | None = [] if worker_rank == 0 else None
        self._last = 0.0

    def __call__(self, report: Any) -> None:
        """Take a step report (a dataclass)."""
        if self._rows is None:
            return
        self._rows.append(dataclasses.asdict(report))
        if time.monotonic() - self._last > _POLL_S or report.step == report.num_steps:
            self._last = time.monotonic()
            self._board.post.remote(self._rows)
            self._rows = []


def run_workers(
    work: Callable[[dict[str, Any]], None],
    job: dict[str, Any],
    workspace: Workspace,
    *,
    num_workers: int,
    resources: dict[str, float],
    use_gpu: bool,
    max_failures: int,
) -> None:
    """Run `work(job)` on Ray Train workers until all of them end.

    Args:
        work: runs on every worker inside a process group; finds the driver's board in `job["board"]`.
        job: plain values.
        workspace: progress goes there, step metrics into its `metrics.jsonl`.
        max_failures: times that the workers are started again after one of them died.

    Raises:
        ReadaptError: the workers' own, with its message; or one that says how they died.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    board = ray.remote(num_cpus=0)(_Board).remote()

    trainer = TorchTrainer(
        _entered,
        train_loop_config={"work": work, "job": {**job, "board": board}},
        scaling_config=ScalingConfig(num_workers=num_workers, resources_per_worker=resources, use_gpu=use_gpu),
        run_config=RunConfig(
            name="workers",
            storage_path=_train_storage(workspace.location),
            failure_config=FailureConfig(max_failures=max_failures),
        ),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
    )
    # Ctrl-C stays Python's: Ray Train's handler ends the process with code 1, and stays in place after the run.
    controllers: list[Any] = []
    trainer._register_sigint_handler = controllers.append
    metrics = _Metrics(workspace)
    try:
        with metrics.followed(board):
            trainer.fit()
    except TrainingFailedError as error:
        raise cluster.cause_of(error) from None
    except KeyboardInterrupt:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get([each.abort.remote() for each in controllers], timeout=_ABORT_TIMEOUT_S)
        raise
    finally:
        ray.kill(board)
    (workspace.location / "workers").delete()


def _entered(config: dict[str, Any]) -> None:
    """On the worker: as many threads as it has CPUs, then the work."""
    import ray
    import torch

    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
        torch.set_num_threads(max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))))
    config["work"](config["job"])


def _train_storage(location: Location) -> str:
    return str(location.local_path) if location.is_local else location.uri


class _Metrics:
    """The step metrics as they come: progress for the user, and lines of JSON beside the artifact."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._file = workspace.location / "metrics.jsonl"
        self._lines: dict[int, str] = {}
        self._written_s = time.monotonic()
        if self._file.is_file():
            for line in self._file.read_text().splitlines():
                self._lines[json.loads(line)["step"]] = line

    @contextlib.contextmanager
    def followed(self, board: Any) -> Iterator[None]:
        """While the block runs, take what the board has, once a second."""
        stop = threading.Event()

        def follow() -> None:
            while not stop.wait(_POLL_S):
                self._take(board)
                if time.monotonic() - self._written_s > _WRITE_S:
                    self._write()

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            self._take(board)
            self._write()

    def _write(self) -> None:
        self._written_s = time.monotonic()
        if self._lines:
            self._file.write_text("\n".join(self._lines[step] for step in sorted(self._lines)) + "\n")

    def _take(self, board: Any) -> None:
        import ray

        try:
            rows = ray.get(board.take.remote(), timeout=10)
        except ray.exceptions.RayError as error:
            logger.debug("no metrics: %s", error)
            return
        for row in rows:
            self._lines[row["step"]] = json.dumps(row)
        if rows:
            last = rows[-1]
            self._workspace.progress(last["step"], last["num_steps"], unit="steps", note=_note(last))


def _note(row: dict[str, Any]) -> str:
    return f"loss {row['loss']:.3f}, {row['num_tokens'] / max(row['seconds'], 1e-9):,.0f} tokens/s"


def read_metrics(location: Location) -> list[dict[str, Any]]:
    """The step metrics of a run, in order; empty where there are none."""
    file = location / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
