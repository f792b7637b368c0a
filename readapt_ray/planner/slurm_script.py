"""Read nodes from a Slurm batch script: its #SBATCH options, and one line of what Slurm does not say.

#READAPT gpu=H100 memory_gb=1000 usd_per_hour=0
"""

import re
from typing import Any

from readapt_ray.errors import InputError

_OPTION = re.compile(r"^#SBATCH\s+--([a-z-]+)(?:[= ]+(\S+))?", re.MULTILINE)
_OURS = re.compile(r"^#READAPT\s+(.*)$", re.MULTILINE)
_MEMORY = re.compile(r"(\d+)([KMGT]?)B?")
_GB_PER_UNIT = {"K": 1e-6, "": 1e-3, "M": 1e-3, "G": 1.0, "T": 1e3}
"""Without a unit, Slurm counts in megabytes."""


def is_slurm_script(text: str) -> bool:
    """Return whether a file is a Slurm batch script."""
    return _OPTION.search(text) is not None


def nodes_of(text: str, where: str) -> dict[str, Any]:
    """Return the nodes of a script as a plain list of nodes.

    Args:
        text: the script.
        where: what errors call it.

    Raises:
        InputError: it does not say which GPU its nodes have, or how much memory.
    """
    options = {name: value or "" for name, value in _OPTION.findall(text)}
    ours = dict(each.split("=", 1) for found in _OURS.findall(text) for each in found.split() if "=" in each)
    kind, gpus = _gpus(options)
    node: dict[str, Any] = {
        "name": "slurm",
        "count": int(options.get("nodes", "1").split("-")[-1]),
        "cpus": int(options.get("cpus-per-task", "1")) * int(options.get("ntasks-per-node", "1")),
        "gpus": gpus,
        "gpu": ours.get("gpu", kind) if gpus else "",
        "memory_gb": float(ours["memory_gb"]) if "memory_gb" in ours else _memory_gb(options.get("mem", "0")),
        "network_gbit": float(ours.get("network_gbit", 10)),
        "usd_per_hour": float(ours.get("usd_per_hour", 0)),
    }
    absent = [name for name in ("gpu", "memory_gb") if not node[name] and (name != "gpu" or gpus)]
    if absent:
        raise InputError(
            f"{where} does not say the {' and '.join(absent)} of its nodes; add a line such as "
            f"#READAPT gpu=H100 memory_gb=1000 usd_per_hour=0"
        )
    return {"nodes": [node]}


def _gpus(options: dict[str, str]) -> tuple[str, int]:
    """Return the kind of GPU, if it is said, and how many a node has: 4, h100:4 or gpu:h100:4."""
    given = options.get("gpus-per-node") or options.get("gres", "").removeprefix("gpu:") or "0"
    kind, _, count = given.rpartition(":")
    return kind.upper(), int(count)


def _memory_gb(text: str) -> float:
    """Return the memory of a node in gigabytes; 0 is Slurm's word for all of it."""
    found = _MEMORY.fullmatch(text.upper())
    return float(found[1]) * _GB_PER_UNIT[found[2]] if found else 0.0
