"""Start Ray on this machine; try twice, because Ray gives up after 30 s, which a busy machine may exceed."""

import contextlib
import logging
import os
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

from readapt_ray import environment, hardware
from readapt_ray.errors import WorkerError

logger = logging.getLogger("readapt_ray")

_TIMED_OUT = "timed out during startup"
"""Part of Ray's message when its processes did not start within 30 s. No option changes this limit."""
_LOCAL = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody announces a preemption here: saves one process
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # the end of a training is noticed this late; default: 2 s
}
"""Environment variables of Ray on a single machine."""


def start() -> None:
    """Start Ray on this machine, with the cores of `READAPT_NUM_CPUS` or all; try once more if that times out.

    Workers inherit the environment variables of this process. A runtime environment would also pass them, but then Ray
    cannot use the workers that it starts in advance, one per CPU, and the first task waits for a new process.

    Raises:
        WorkerError: Ray did not start in time, twice. Other errors of Ray are raised as they are.
    """
    import ray

    logger.info("starting Ray on this machine")
    for name, value in _LOCAL.items():
        os.environ.setdefault(name, value)
    options = {
        "address": "local",  # by default Ray joins the last Ray that it saw on this machine, alive or not
        "include_dashboard": False,
        "num_cpus": environment.num_cpus() or hardware.num_cores(),
        "logging_level": logging.ERROR,
        "log_to_driver": False,
    }
    try:
        _init(options)
    except Exception as error:
        if _TIMED_OUT not in str(error):
            raise
        logger.warning("Ray did not start in time: %s; trying once more", _how_busy())
        ray.shutdown()
        _start_again(options)


def _start_again(options: Mapping[str, Any]) -> None:
    """Start Ray on this machine a second time.

    Raises:
        WorkerError: Ray again did not start in time.
    """
    import ray

    try:
        _init(options)
    except Exception as error:
        if _TIMED_OUT not in str(error):
            raise
        ray.shutdown()
        raise WorkerError(
            f"Ray did not start in time, twice: {_how_busy()}; run the command again when less runs here"
        ) from None


def _init(options: Mapping[str, Any]) -> None:
    """Start Ray; if that fails or is interrupted, end the processes that it has started.

    Ray itself leaves them running until this process ends: for hours in a notebook, and during the second try.
    """
    import ray
    from ray._private.node import Node

    try:
        with _in_groups_of_their_own():
            ray.init(**options)
    except BaseException as error:
        holders = (frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__))
        node = next((each for each in holders if isinstance(each, Node)), None)
        if node is not None:
            node.kill_all_processes(check_alive=False, allow_graceful=True, wait=True)
        raise


@contextlib.contextmanager
def _in_groups_of_their_own() -> Iterator[None]:
    """Start each of Ray's processes in its own process group while the block runs.

    `timeout` sends its signal to the process group of the command. Ray must survive that signal while the command
    cleans up. When the command ends, Ray's processes end too.
    """
    from ray._private import utils

    end_with_parent = utils.set_kill_on_parent_death_linux

    def leave_group() -> None:
        os.setpgid(0, 0)
        end_with_parent()

    utils.set_kill_on_parent_death_linux = leave_group  # Ray calls it in each process before it starts there
    try:
        yield
    finally:
        utils.set_kill_on_parent_death_linux = end_with_parent


def _how_busy() -> str:
    return f"this machine is busy ({os.getloadavg()[0]:.0f} processes want to run on {hardware.num_cores()} cores)"
