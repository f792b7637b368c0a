"""Describe the machine and the cluster (CPU, cores, memory), for manifests, memory estimates and thread pools."""

import contextlib
import functools
import math
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

GPU_PROCESS_BYTES: Final = 1 << 30
"""GPU memory that a process takes when it first uses torch, before any tensor."""
GPU_USABLE_SHARE: Final = 0.94
"""Fraction of a GPU's memory that can be used. The driver and fragmentation take the rest."""
_CGROUPS: Final = Path("/sys/fs/cgroup")
_OWN_CGROUP: Final = Path("/proc/self/cgroup")
_cluster: dict[str, Any] = {}
_BFLOAT16_UNITS = ("amx_bf16", "avx512_bf16")


def note_cluster(*, num_nodes: int, num_cpus: int, gpus: dict[str, int]) -> None:
    """Remember the size of the cluster that this process joined, for `machine_info`.

    Args:
        num_nodes: number of nodes.
        num_cpus: number of CPUs of all nodes.
        gpus: number of GPUs by kind, such as `{"H100": 8}`.
    """
    _cluster.update(num_nodes=num_nodes, num_cpus=num_cpus, gpus=gpus)


def machine_info() -> dict[str, Any]:
    """Describe the driver's machine (`driver`), and the cluster if one was joined (`cluster`), for the manifest."""
    found: dict[str, Any] = {"driver": _this_machine()}
    return found | ({"cluster": dict(_cluster)} if _cluster else {})


def num_cores() -> int:
    """Return how many cores this process may use: its CPU affinity, limited by its container's quota.

    A pod with 8 CPUs on a host with 192 cores may run on all of them, but only for 8 CPU seconds per second. 192 threads
    would spend most of their time waiting for each other.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *_quotas()]))


def limit_threads() -> None:
    """Limit the threads of pyarrow, torch and FAISS in this process to `num_cores()`. By default they use all of the host's.

    torch and FAISS are limited only if they are already imported. Call this again after importing them.
    """
    import pyarrow as pa

    pa.set_cpu_count(min(pa.cpu_count(), num_cores()))
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(min(torch.get_num_threads(), num_cores()))
    if faiss := sys.modules.get("faiss"):
        faiss.omp_set_num_threads(min(faiss.omp_get_max_threads(), num_cores()))


def _groups(controller: str) -> Iterator[tuple[Path, bool]]:
    """Yield the folder of this process's control group and of each parent group, and whether it is cgroup version 1.

    A missing file means no limit is known: a container sees its own group as the root, whatever path /proc names.
    """
    try:
        lines = _OWN_CGROUP.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = _CGROUPS / controllers
        group = root / path.lstrip("/")
        for folder in (group, *group.parents[: len(group.parts) - len(root.parts)]):
            yield folder, bool(controllers)


def _quotas() -> Iterator[int]:
    """Yield the CPU quotas of this process's control groups, rounded up to whole cores."""
    for folder, is_v1 in _groups("cpu"):
        quota = _quota_v1(folder) if is_v1 else _quota_v2(folder)
        if quota is not None:
            yield quota


def _quota_v2(folder: Path) -> int | None:
    """Return the quota of `cpu.max` in cores. The file holds microseconds (or "max") and a period."""
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return None if quota == "max" else math.ceil(int(quota) / int(period))
    except (OSError, ValueError):
        return None


def _quota_v1(folder: Path) -> int | None:
    """Return the quota of `cpu.cfs_quota_us` in cores. The file holds a negative number if there is no quota."""
    try:
        quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return None if quota <= 0 else math.ceil(quota / period)
    except (OSError, ValueError):
        return None


def _memory_limits() -> Iterator[tuple[int, int]]:
    """Yield, per control group of this process, its memory limit and the memory that is left, in bytes.

    File cache that the kernel can drop counts as left.
    """
    for folder, is_v1 in _groups("memory"):
        limit, held, dropped = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            if is_v1
            else ("memory.max", "memory.current", "inactive_file")
        )
        with contextlib.suppress(OSError, ValueError):  # absent, or "max"
            most, now = (int((folder / name).read_text()) for name in (limit, held))
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            yield most, most - now + int(stat.get(dropped, 0))


def has_bfloat16_units() -> bool:
    """Return whether this CPU multiplies matrices faster in bfloat16 than in float32 (AMX or AVX512_BF16).

    With AVX512_BF16 but no AMX (AMD Zen 4, one core), all-MiniLM-L6-v2 encodes 1.8 times as many tokens per second as in
    float32, and the quickstart's model trains on 1.8 times as many.
    """
    import torch

    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in _BFLOAT16_UNITS)


@functools.cache
def is_amd() -> bool:
    """Return whether this machine has an AMD CPU; False if that cannot be found out."""
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def memory_bytes() -> int:
    """Return the total memory of this machine in bytes, limited by its container."""
    import psutil

    return min([int(psutil.virtual_memory().total), *(limit for limit, _ in _memory_limits())])


def free_memory_bytes() -> int:
    """Return the free memory of this machine in bytes, limited by its container."""
    import psutil

    return min([int(psutil.virtual_memory().available), *(left for _, left in _memory_limits())])


@functools.cache
def _this_machine() -> dict[str, Any]:
    return {"cpu": _cpu_name(), "num_cpus": num_cores(), "memory_bytes": memory_bytes()}


def _cpu_name() -> str:
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
