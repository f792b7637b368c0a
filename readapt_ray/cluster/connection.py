"""Start or join Ray. All of the package connects here; Ray and other libraries log to files, not to the terminal.

Nodes of a cluster may come up one by one. When it is joined, READAPT_NUM_NODES says how many nodes to wait for, for
at most READAPT_WAIT_S seconds (default: 900). Without it, wait at most 50 seconds for the first node that has a CPU.
"""

import contextlib
import json
import logging
import os
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from readapt_ray import environment, hardware, library_logs, termination
from readapt_ray.cluster import gpus, launcher, local_ray, software
from readapt_ray.cluster.nodes import alive, answers, describe_nodes, start_on_each
from readapt_ray.errors import InputError, PlacementError, ReadaptError, WorkerError, first_line
from readapt_ray.storage import Location

logger = logging.getLogger("readapt_ray")

_WAIT_POLL_S = 1.0
_WAIT_LOG_S = 20.0
_FIRST_NODE_S = 50.0
_NODE_ANSWERS_S = 120.0
_DRIVER_LOG = "readapt-driver.log"
_printed = logging.getLogger("ray.printed")
_PROBE = ".seen-"
_HEX = "[0-9a-f]" * 32
_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
_UNPACKED = "working_dir_files"
"""Name of the folder into which Ray unpacks the working directories of jobs."""
_QUIET = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
_JOINING = threading.Lock()


@dataclass(frozen=True)
class Resources:
    """Total CPUs, GPUs and nodes of the cluster."""

    num_cpus: int
    num_gpus: int
    """Includes GPUs that the autoscaler may add (READAPT_NUM_GPUS)."""
    num_nodes: int


def connect(*, check_versions: bool = True) -> Resources:
    """Join the cluster at `RAY_ADDRESS`, or start Ray on this machine if it is not set; return the cluster's resources.

    A second call does not connect again, and checks no versions; it returns the present resources. Libraries of this
    process are silenced, and its threads limited.

    Args:
        check_versions: refuse nodes whose package versions differ from the driver's, or whose GPUs cannot be used.

    Raises:
        InputError: `RAY_ADDRESS` is an http address, which only accepts jobs; or a READAPT_* variable is wrong.
        PlacementError: the nodes did not come up in time, or are refused.
        WorkerError: Ray did not start on this machine in time, twice.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    num_nodes, _ = environment.num_nodes(), environment.wait_s()  # invalid values fail before Ray starts
    with _JOINING:
        joins = not ray.is_initialized()
        if joins:
            _join(os.environ.get("RAY_ADDRESS"))
        termination.take_back()
        _hush_libraries(is_new=joins)
        nodes = _nodes_that_came(num_nodes if joins else 1)
        if joins and check_versions and len(nodes) > 1:
            check_alike(nodes)
    hardware.limit_threads()
    totals = ray.cluster_resources()
    num_gpus = max(int(totals.get("GPU", 0)), environment.num_gpus() or 0)
    found = Resources(num_cpus=int(totals.get("CPU", 0)), num_gpus=num_gpus, num_nodes=len(nodes))
    hardware.note_cluster(num_nodes=found.num_nodes, num_cpus=found.num_cpus, gpus=_gpus_by_kind(nodes))
    return found


@contextlib.contextmanager
def connecting_ahead() -> Iterator[None]:
    """Connect in a thread while the block runs, since Ray takes seconds to start.

    Errors of the thread are ignored: the block's first `connect` raises them again. The end of the block waits until
    the thread has connected or failed.
    """

    has_tried = threading.Event()

    def attempt() -> None:
        with contextlib.suppress(Exception):
            connect()
        has_tried.set()
        threading.Event().wait()  # Ray's processes are killed when the thread that started them ends

    threading.Thread(target=attempt, daemon=True).start()
    try:
        yield
    finally:
        has_tried.wait()


def _join(address: str | None) -> None:
    """Join the cluster at an address, or start Ray on this machine."""
    import ray

    if not address:
        local_ray.start()
        return
    if address.startswith(("http://", "https://")):
        raise InputError(
            f"RAY_ADDRESS = {address!r} is where jobs are submitted to, and no cluster can be joined there; submit this with "
            f"`ray job submit`, or on a node of the cluster set RAY_ADDRESS to auto, or to HOST:6379 of its head"
        )
    logger.info("joining Ray at %s", address)
    variables = {name: os.environ[name] for name in _QUIET if name not in _of_the_job()} | software.driver_variable()
    ray.init(address=address, runtime_env={"env_vars": variables}, logging_level=logging.ERROR, log_to_driver=False)


def _of_the_job() -> dict[str, str]:
    """Return the variables that a submitted job already sets for all workers; Ray refuses to set a variable twice."""
    of_job = json.loads(os.environ.get(_JOB_VARIABLE, "{}")).get("runtime_env") or {}
    return dict(of_job.get("env_vars") or {})


def _nodes_that_came(wanted: int) -> list[dict[str, Any]]:
    """Wait until `wanted` nodes are up and one has a CPU; return the nodes that are up.

    Raises:
        PlacementError: they did not come in time, or none of them has a CPU for tasks.
    """
    limit_s = environment.wait_s() if wanted > 1 else _FIRST_NODE_S
    deadline_s = time.monotonic() + limit_s
    said_s = 0.0
    while True:
        nodes = alive()
        has_cpus = any(node["Resources"].get("CPU") for node in nodes)
        if len(nodes) >= wanted and has_cpus:
            return nodes
        if time.monotonic() > deadline_s or (len(nodes) >= wanted > 1):
            needed, advice = "tasks need a node with CPUs", "start one"
            if len(nodes) < wanted:
                needed, advice = f"READAPT_NUM_NODES asks for {wanted} nodes", "start the others, or ask for fewer"
            raise PlacementError(
                f"{needed}, and the cluster has {describe_nodes(nodes)}; {advice}{launcher.described_failures()}"
            )
        if time.monotonic() - said_s > _WAIT_LOG_S:
            said_s = time.monotonic()
            logger.info(
                "waiting for nodes: %d are wanted, there is %s%s",
                wanted,
                describe_nodes(nodes),
                launcher.described_failures(),
            )
        time.sleep(_WAIT_POLL_S)


def check_alike(nodes: Sequence[Mapping[str, Any]]) -> None:
    """Check that each node has the driver's versions of readapt_ray and torch, lacks no package, and can use its GPUs.

    A node that does not answer within two minutes is skipped, with a warning.

    Args:
        nodes: nodes as `ray.nodes()` lists them.

    Raises:
        PlacementError: a node fails the check; the message names the nodes.
    """
    installed = software.reader()
    here = installed()
    found = {where: software.difference(here, there) for where, there in _on_each(nodes, installed).items()}
    if any(found.values()):
        raise PlacementError(
            "nodes differ: "
            + "; ".join(f"{where} {text}" for where, text in sorted(found.items()) if text)
            + "; install the same on all of them, or leave those nodes out (`readapt doctor --cluster` looks for more)"
        )
    _check_gpus(nodes)


def _check_gpus(nodes: Sequence[Mapping[str, Any]]) -> None:
    """Check that torch can use the GPUs that Ray counts on these nodes.

    Raises:
        PlacementError: torch cannot use a GPU; the message names the nodes.
    """
    found: dict[str, str] = {}
    for count in {int(node["Resources"].get("GPU", 0)) for node in nodes} - {0}:
        have_these = [node for node in nodes if int(node["Resources"].get("GPU", 0)) == count]
        # `max_calls`: CUDA keeps the set of GPUs that a process saw first, so a later worker with one GPU must not
        # reuse a process that saw all of them.
        found |= _on_each(have_these, gpus.why_unusable, count, max_calls=1)
    if any(found.values()):
        raise PlacementError(
            "GPUs cannot be used: " + "; ".join(f"{where}: {text}" for where, text in sorted(found.items()) if text)
        )


def check_seen_by_all(folder: Location) -> None:
    """Check that every node sees a folder, before workers write to it: output on a node's local disk would be lost.

    Log a warning if the folder is inside a job's working directory, which Ray removes after the job. URIs, and clusters
    of one node, are not checked. A node that does not answer within two minutes is skipped, with a warning.

    Args:
        folder: where workers will write. A file is written there for the check, and deleted.

    Raises:
        PlacementError: a node does not see the folder; the message names the nodes.
    """
    if folder.is_local and _UNPACKED in folder.local_path.parts:
        logger.warning(
            "%s is inside the job's working directory, which Ray removes after the job: give an absolute path or a URI",
            folder,
        )
    nodes = alive()
    if not folder.is_local or len(nodes) < 2:
        return
    for left_by_a_killed_run in folder.local_path.glob(f"{_PROBE}{_HEX}"):
        left_by_a_killed_run.unlink(missing_ok=True)
    probe = folder / f"{_PROBE}{uuid.uuid4().hex}"

    def sees(path: str) -> bool:
        import pathlib

        return pathlib.Path(path).is_file()

    probe.write_bytes(b"")
    try:
        blind = sorted(where for where, seen in _on_each(nodes, sees, probe.path).items() if not seen)
    finally:
        probe.delete()
    if blind:
        raise PlacementError(
            f"{folder} is not on a disk that all nodes share: {', '.join(blind)} cannot see it; give a URI (s3://, gs://), or "
            f"a folder of a shared filesystem"
        )


def _on_each(
    nodes: Sequence[Mapping[str, Any]], function: Callable[..., Any], *args: Any, max_calls: int = 0
) -> dict[str, Any]:
    """Call a function on each node; return the results by the node's address, without nodes that do not answer."""
    import ray

    found = {}
    started = start_on_each(nodes, function, *args, max_calls=max_calls)
    for where, answer in answers(started, timeout_s=_NODE_ANSWERS_S).items():
        if isinstance(answer, ray.exceptions.RayTaskError):
            raise answer
        if isinstance(answer, ray.exceptions.RayError):
            logger.warning("node %s did not answer: %s", where, first_line(answer))
        else:
            found[where] = answer
    return found


def all_have_bfloat16_units() -> bool:
    """Return whether the CPUs of every node multiply matrices faster in bfloat16 than in float32.

    Nodes without CPUs for tasks, and nodes that do not answer, do not count.
    """
    nodes = alive()
    if len(nodes) == 1:
        return hardware.has_bfloat16_units()
    with_cpus = [node for node in nodes if node["Resources"].get("CPU")]
    return all(_on_each(with_cpus, hardware.has_bfloat16_units).values())


def _gpus_by_kind(nodes: list[dict[str, Any]]) -> dict[str, int]:
    """Return the number of GPUs of each kind, by Ray's names for them."""
    gpus: Counter[str] = Counter()
    for node in nodes:
        resources = node["Resources"]
        kinds = [name.partition(":")[2] for name in resources if name.startswith("accelerator_type:")]
        if resources.get("GPU"):
            gpus[kinds[0] if kinds else "GPU"] += int(resources["GPU"])
    return dict(gpus)


def _hush_libraries(*, is_new: bool) -> None:
    """Stop libraries from printing on the terminal; write their logs to a file beside Ray's logs."""
    from ray._private import worker
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # Ray's wrapper would lose the cause
    worker.print_to_stdstream = _to_log  # Ray's notices, such as a task that failed at the end
    _printed.setLevel(logging.INFO)  # Ray's own logger drops all but errors
    library_logs.silence()
    if is_new and (folder := logs_folder()):
        library_logs.add_file(folder / _DRIVER_LOG)


def _to_log(data: Mapping[str, Any], **_: Any) -> None:
    """Log the lines that Ray would print."""
    for line in data["lines"]:
        _printed.warning("%s", line)


def logs_folder() -> Path | None:
    """Return the folder of Ray's logs on this machine (of Ray, workers and this driver); None if not connected."""
    from ray._private import worker

    node = getattr(worker, "_global_node", None)
    return Path(node.get_logs_dir_path()) if node is not None else None


def _see_logs() -> str:
    """Return the end of an error message that names the folder of Ray's logs; empty if not connected."""
    folder = logs_folder()
    return f"; Ray's logs: {folder}" if folder else ""


def cause_of(error: BaseException) -> BaseException:
    """Unwrap an error of Ray: return the ReadaptError inside it, else a new WorkerError with the innermost message.

    The error is returned, not raised. A ReadaptError that is not wrapped is returned as it is.
    """
    from ray.exceptions import RayTaskError

    for each in _linked(error, with_contexts=True):
        if isinstance(each, ReadaptError) and not isinstance(each, RayTaskError):  # Ray's wrapper has the type of both
            return each
    return WorkerError(f"a worker failed: {reason_of(error)}{_see_logs()}")


def reason_of(error: BaseException) -> str:
    """Return the last line of the innermost error's message; its type's name if the message is empty."""
    lines = [line.strip() for line in str(_linked(error)[-1]).splitlines() if line.strip()]
    return lines[-1] if lines else type(_linked(error)[-1]).__name__


def _linked(error: BaseException, *, with_contexts: bool = False) -> list[BaseException]:
    """Return an error and its causes, nearest first; `with_contexts` adds errors that were being handled then."""
    from ray.exceptions import RayTaskError

    found: list[BaseException] = []
    pending: list[BaseException | None] = [error]
    while pending:
        current = pending.pop(0)
        if current is None or current in found:
            continue
        found.append(current)
        inner = [current.cause] if isinstance(current, RayTaskError) else []
        failures = getattr(current, "worker_failures", None) or {}
        pending += [*inner, *failures.values(), current.__cause__]
        pending += [current.__context__] if with_contexts else []
    return found


def has_ended() -> bool:
    """Return whether one of Ray's server processes (gcs_server, raylet) that this process started has died.

    False if Ray is not started, or if this process joined a cluster that others started.
    """
    node = getattr(sys.modules.get("ray._private.worker"), "_global_node", None)
    return node is not None and bool({kind for kind, _ in node.dead_processes()} & {"gcs_server", "raylet"})
