"""Read the environment variables of readapt_ray.

READAPT_API_KEYS, which is a small file in itself, is read in `serving/keys.py`.
"""

import math
import os
from pathlib import Path

from readapt_ray.errors import InputError

_LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_WAIT_S = 900.0
_CACHE_GB = 100.0


def log_level() -> str:
    """Return READAPT_LOG_LEVEL: how much is logged; INFO unless it is set.

    Raises:
        InputError: it is not a level.
    """
    level = os.environ.get("READAPT_LOG_LEVEL", "").upper() or "INFO"
    if level not in _LOG_LEVELS:
        raise _wrong("READAPT_LOG_LEVEL", f"one of {', '.join(_LOG_LEVELS)}")
    return level


def shows_tracebacks() -> bool:
    """Return whether READAPT_DEBUG is set: an unexpected error then shows where it was raised."""
    return bool(os.environ.get("READAPT_DEBUG"))


def cache_folder() -> Path:
    """Return READAPT_CACHE: the folder for fetched models and for what servers copy; ~/.cache/readapt unless it is set.

    Raises:
        InputError: it is not a folder.
    """
    folder = Path(os.environ.get("READAPT_CACHE") or "~/.cache/readapt").expanduser()
    if folder.exists() and not folder.is_dir():
        raise _wrong("READAPT_CACHE", "a folder, or a path where one can be made")
    return folder


def cache_gb() -> float:
    """Return READAPT_CACHE_GB: how many gigabytes READAPT_CACHE may hold; 100 unless it is set.

    Raises:
        InputError: it is not a number of 0 or more.
    """
    return _number("READAPT_CACHE_GB", _CACHE_GB, "in gigabytes")


def num_cpus() -> int | None:
    """Return READAPT_NUM_CPUS: the CPUs of a Ray that is started here; all of them unless it is set.

    Raises:
        InputError: it is not a whole number from 1.
    """
    return _whole_number("READAPT_NUM_CPUS")


def num_gpus() -> int | None:
    """Return READAPT_NUM_GPUS: how many GPUs Ray's autoscaler may bring; None where the cluster is what is up.

    Raises:
        InputError: it is not a whole number from 1.
    """
    return _whole_number("READAPT_NUM_GPUS")


def num_nodes() -> int:
    """Return READAPT_NUM_NODES: how many nodes a cluster must have before work starts; 1 unless it is set.

    Raises:
        InputError: it is not a whole number from 1.
    """
    return _whole_number("READAPT_NUM_NODES") or 1


def wait_s() -> float:
    """Return READAPT_WAIT_S: the seconds to wait for the nodes of a cluster; 900 unless it is set.

    Raises:
        InputError: it is not a number of 0 or more.
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
