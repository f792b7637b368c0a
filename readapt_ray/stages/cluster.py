"""The one place that starts or joins Ray: quiet on the terminal, complete in the log files."""

import contextlib
import logging
import os
from collections import Counter
from dataclasses import dataclass
from typing import Any

from readapt_ray import hardware
from readapt_ray.errors import ReadaptError, WorkerError

_QUIET = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


@dataclass(frozen=True)
class Resources:
    """What the cluster has in all."""

    num_cpus: int
    num_gpus: int
    num_nodes: int


def connect() -> Resources:
    """Join the cluster of `RAY_ADDRESS`, or start Ray on this machine; nothing happens where it runs already."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS")
        here = {"num_cpus": int(os.environ["READAPT_NUM_CPUS"])} if "READAPT_NUM_CPUS" in os.environ else {}
        ray.init(
            address=address,
            include_dashboard=None if address else False,
            **({} if address else here),
            logging_level=logging.ERROR,
            log_to_driver=False,
            runtime_env={"env_vars": {name: os.environ[name] for name in _QUIET}},
        )
    _hush_ray_data()
    totals = ray.cluster_resources()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    found = Resources(num_cpus=int(totals.get("CPU", 0)), num_gpus=int(totals.get("GPU", 0)), num_nodes=len(nodes))
    hardware.note_cluster(num_nodes=found.num_nodes, num_cpus=found.num_cpus, gpus=_gpus_by_kind(nodes))
    return found


def _gpus_by_kind(nodes: list[dict[str, Any]]) -> dict[str, int]:
    """Number of GPUs of each kind, by Ray's names of them."""
    gpus: Counter[str] = Counter()
    for node in nodes:
        resources = node["Resources"]
        kinds = [name.partition(":")[2] for name in resources if name.startswith("accelerator_type:")]
        if resources.get("GPU"):
            gpus[kinds[0] if kinds else "GPU"] += int(resources["GPU"])
    return dict(gpus)


def _hush_ray_data() -> None:
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray.data", "ray.train", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)


def cause_of(error: BaseException) -> BaseException:
    """What really went wrong inside Ray's wrappings: our own error where there is one, with its message."""
    from ray.exceptions import RayTaskError

    seen: list[BaseException] = []
    pending: list[BaseException | None] = [error]
    while pending:
        current = pending.pop(0)
        if current is None or current in seen:
            continue
        seen.append(current)
        if isinstance(current, ReadaptError):
            return current
        inner = [current.cause] if isinstance(current, RayTaskError) else []
        failures = getattr(current, "worker_failures", None) or {}
        pending += [*inner, *failures.values(), current.__cause__, current.__context__]
    return WorkerError(f"a worker failed: {_last_line(seen[-1])}")


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def disconnect() -> None:
    """Leave Ray; a Ray that `connect` started on this machine ends."""
    import ray

    with contextlib.suppress(ConnectionError):
        ray.shutdown()
