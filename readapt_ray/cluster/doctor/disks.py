"""Check that the disks and shared memory of this machine have free space, can be written and are fast enough."""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from readapt_ray import environment
from readapt_ray.cluster.doctor.findings import Finding, Problem
from readapt_ray.errors import first_line

SHARED_MEMORY = Path("/dev/shm")

_GB = 10**9
_LEAST_FREE_BYTES = 1 * _GB
_LITTLE_FREE_BYTES = 20 * _GB
_MOST_USED = 0.95
"""Ray does not spill to a disk that is fuller than this (its setting local_fs_capacity_threshold)."""
_ADVICE = "free some, mount a larger disk, or move it (--root, READAPT_CACHE, HF_HOME, `ray start --temp-dir`)"
_WRITTEN_BYTES = 64 << 20
_SLOW_BYTES_PER_S = 50e6
_LEAST_SHARED_BYTES = 1 * _GB
"""Docker's default is 64 MB, with which NCCL fails between GPUs."""


def working_folders(ray_folder: str) -> list[Path]:
    """Return the folders that stages write to on this machine: Ray's spill folder and the caches of models.

    They may not exist yet.

    Args:
        ray_folder: Ray's spill folder; empty for the system's temporary folder.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    return [Path(ray_folder or tempfile.gettempdir()), environment.cache_folder(), Path(HF_HUB_CACHE)]


def check_disks(folders: Sequence[Path]) -> Finding:
    """Measure free space and write speed, once for each disk that holds one of the folders.

    Args:
        folders: absolute paths; of one that does not exist, its nearest parent is checked.
    """
    by_disk: dict[int, Path] = {}
    for folder in folders:
        there = existing(folder)
        by_disk.setdefault(there.stat().st_dev, there)
    found = [check_disk(folder) for folder in by_disk.values()]
    shown = "; ".join(dict.fromkeys(each.shown for each in found))
    return Finding(shown, tuple(problem for each in found for problem in each.problems))


def existing(folder: Path) -> Path:
    """Return the folder if it exists, else its nearest parent that exists. The path must be absolute."""
    return next(each for each in (folder, *folder.parents) if each.is_dir())


def check_disk(folder: Path) -> Finding:
    """Measure free space and write speed of the disk that holds a folder, which must exist.

    Up to 64 MiB are written there and deleted. A folder that cannot be written is a problem that makes a run fail; a
    speed below 50 MB/s only makes it slower.
    """
    problems = space_problems(folder)
    free = shutil.disk_usage(folder).free
    shown = f"{free / _GB:,.0f} GB"
    try:
        speed = _bytes_per_s(folder, min(_WRITTEN_BYTES, free // 2))
    except OSError as error:
        text = f"{folder} cannot be written ({first_line(error)}); give this user the right, or {_ADVICE}"
        return Finding(shown, (*problems, Problem(text)))
    if speed < _SLOW_BYTES_PER_S:
        text = (
            f"{folder} is written at {speed / 1e6:.0f} MB/s; models load in minutes: use a local SSD or a faster volume"
        )
        problems = (*problems, Problem(text, fails=False))
    return Finding(f"{shown} at {speed / 1e6:,.0f} MB/s", problems)


def space_problems(folder: Path) -> tuple[Problem, ...]:
    """Return problems with the free space of the disk that holds a folder; empty if there is enough.

    A run fails below 1 GB or on a disk that is over 95% full; below 20 GB it is a warning.
    """
    usage = shutil.disk_usage(folder)
    if usage.free < _LEAST_FREE_BYTES or usage.used / usage.total > _MOST_USED:
        text = f"{folder} has {usage.free / _GB:.1f} of {usage.total / _GB:.1f} GB free, too little to work; {_ADVICE}"
        return (Problem(text),)
    if usage.free < _LITTLE_FREE_BYTES:
        text = f"{folder} has {usage.free / _GB:.0f} GB free; models of 7 billion parameters take 15 GB each: {_ADVICE}"
        return (Problem(text, fails=False),)
    return ()


def _bytes_per_s(folder: Path, num_bytes: int) -> float:
    """Write a file and measure the speed, including the sync to disk."""
    started_s = time.monotonic()
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".readapt-doctor-") as file:
        file.write(os.urandom(1 << 20) * max(1, num_bytes >> 20))
        file.flush()
        with contextlib.suppress(OSError):  # some network disks do not support it
            os.fsync(file.fileno())
    return num_bytes / (time.monotonic() - started_s)


def check_shared_memory(store_bytes: int, num_gpus: int) -> Finding:
    """Check that shared memory (/dev/shm) is large enough for Ray's objects and NCCL's buffers.

    Below 1 GB with several GPUs a run fails; below the size of the object store it is slower. Without /dev/shm nothing
    is checked.

    Args:
        store_bytes: size of Ray's object store on this machine, in bytes; 0 without Ray.
        num_gpus: number of GPUs that workers use on this machine.
    """
    if not SHARED_MEMORY.is_dir():
        return Finding("none")
    total = shutil.disk_usage(SHARED_MEMORY).total
    shown = f"{total / _GB:.1f} GB"
    advice = "start the container with a larger --shm-size, or mount an emptyDir with `medium: Memory` at /dev/shm"
    if total < _LEAST_SHARED_BYTES and num_gpus > 1:
        text = f"{SHARED_MEMORY} has {total / 1e6:.0f} MB, and NCCL needs more between {num_gpus} GPUs; {advice}"
        return Finding(shown, (Problem(text),))
    if total < store_bytes:
        text = f"{SHARED_MEMORY} has {shown} and Ray's objects may take {store_bytes / _GB:.1f} GB, so they go to disk; {advice}"
        return Finding(shown, (Problem(text, fails=False),))
    return Finding(shown)
