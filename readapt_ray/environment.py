"""Read and check the environment variables of readapt_ray, except READAPT_API_KEYS (`serving/keys.py`)."""

import math
import os
from pathlib import Path

from readapt_ray.errors import InputError

_LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_WAIT_S = 900.0
_CACHE_GB = 100.0


def log_level() -> str:
    """Return the log level: READAPT_LOG_LEVEL, or INFO if it is not set.

    Raises:
        InputError: the value is not a log level.
    """
    level = os.environ.get("READAPT_LOG_LEVEL", "").upper() or "INFO"
    if level not in _LOG_LEVELS:
        raise _wrong("READAPT_LOG_LEVEL", f"one of {', '.join(_LOG_LEVELS)}")
    return level


def shows_tracebacks() -> bool:
    """Return whether READAPT_DEBUG is set. If so, an unexpected error prints its traceback."""
    return bool(os.environ.get("READAPT_DEBUG"))


def cache_folder() -> Path:
    """Return the cache folder for downloaded models and servers' local copies: READAPT_CACHE, or ~/.cache/readapt.

    It may not exist yet.

    Raises:
        InputError: the path exists and is not a folder; or it begins with `~`, and there is no such home folder.
    """
    text = os.environ.get("READAPT_CACHE") or "~/.cache/readapt"
    try:
        folder = Path(text).expanduser()
    except RuntimeError:  # no HOME, and a user id without an entry in /etc/passwd, as in some containers
        raise InputError(
            f"the cache folder {text!r} is in a home folder, which this machine does not know; set READAPT_CACHE to a folder"
        ) from None
    if folder.exists() and not folder.is_dir():
        raise _wrong("READAPT_CACHE", "a folder, or a path where one can be made")
    return folder


def cache_gb() -> float:
    """Return the maximum size of the cache folder in gigabytes: READAPT_CACHE_GB, or 100 if it is not set.

    Raises:
        InputError: the value is not a number of 0 or more.
    """
    return _number("READAPT_CACHE_GB", _CACHE_GB, "in gigabytes")


def num_cpus() -> int | None:
    """Return READAPT_NUM_CPUS: the number of CPUs of a Ray that is started on this machine. None (not set) means all.

    Raises:
        InputError: the value is not a whole number of 1 or more.
    """
    return _whole_number("READAPT_NUM_CPUS")


def num_gpus() -> int | None:
    """Return READAPT_NUM_GPUS: how many GPUs the cluster may grow to by Ray's autoscaler. None (not set): it does not grow.

    Raises:
        InputError: the value is not a whole number of 1 or more.
    """
    return _whole_number("READAPT_NUM_GPUS")


def num_nodes() -> int:
    """Return how many nodes a cluster must have before work starts: READAPT_NUM_NODES, or 1 if it is not set.

    Raises:
        InputError: the value is not a whole number of 1 or more.
    """
    return _whole_number("READAPT_NUM_NODES") or 1


def wait_s() -> float:
    """Return how many seconds to wait for the nodes of a cluster: READAPT_WAIT_S, or 900 if it is not set.

    Raises:
        InputError: the value is not a number of 0 or more.
    """
    return _number("READAPT_WAIT_S", _WAIT_S, "in seconds")


def _number(name: str, default: float, unit: str) -> float:
    text = os.environ.get(name)
    if not text:
        return default
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not number >= 0 or math.isinf(number):
        raise _wrong(name, f"a number of 0 or more, {unit}")
    return number


def _whole_number(name: str) -> int | None:
    text = os.environ.get(name)
    if not text:
        return None
    if not text.strip().isascii() or not text.strip().isdecimal() or int(text) < 1:
        raise _wrong(name, "a whole number from 1 on")
    return int(text)


def _wrong(name: str, allowed: str) -> InputError:
    return InputError(f"{name} = {os.environ[name]!r}: must be {allowed}; set it so, or unset it")
