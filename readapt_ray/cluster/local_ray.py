"""Start Ray on this machine. A machine that is busy gets a second chance: Ray gives its processes 30 s to come up."""

import logging
import os
from collections.abc import Mapping
from typing import Any

from readapt_ray import environment, hardware
from readapt_ray.errors import WorkerError

logger = logging.getLogger("readapt_ray")

_TIMED_OUT = "timed out during startup"
"""Part of Ray's message when its processes did not start within 30 s. No option changes this limit."""
_LOCAL = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
"""For a Ray on this machine alone, where nobody gives notice of taking the node away: one process fewer to start."""


def start() -> None:
    """Start a Ray of our own, and once more if it does not come up in time; its workers inherit the environment of this process.

    A runtime environment would say the same to them, but Ray then cannot use the workers that it starts ahead, one per
    CPU: the first task waits for a new process.
    """
    import ray

    logger.info("starting Ray on this machine")
    for name, value in _LOCAL.items():
        os.environ.setdefault(name, value)
    options = {
        "address": "local",  # without a word Ray joins what it last saw on this machine, alive or not
        "include_dashboard": False,
        "num_cpus": environment.num_cpus() or hardware.num_cores(),
        "logging_level": logging.ERROR,
        "log_to_driver": False,
    }
    try:
        ray.init(**options)
    except Exception as error:
        if _TIMED_OUT not in str(error):
            raise
        logger.warning("Ray did not start in time: %s; trying once more", _how_busy())
        ray.shutdown()
        _start_again(options)


def _start_again(options: Mapping[str, Any]) -> None:
    """Start Ray on this machine a second time.

    Raises:
        WorkerError: the machine is too busy for that, too.
    """
    import ray

    try:
        ray.init(**options)
    except Exception as error:
        if _TIMED_OUT not in str(error):
            raise
        ray.shutdown()
        raise WorkerError(
            f"Ray did not start in time, twice: {_how_busy()}; run the command again when less runs here"
        ) from None


def _how_busy() -> str:
    return f"this machine is busy ({os.getloadavg()[0]:.0f} processes want to run on {hardware.num_cores()} cores)"
