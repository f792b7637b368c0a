"""Read the nodes of a plan from a Slurm batch script: its #SBATCH options, and one line for what these do not say.

#READAPT gpu=H100 memory_gb=1000 usd_per_hour=0
"""

import math
import re
import shlex
from collections.abc import Iterator
from typing import Any

from readapt_ray.errors import InputError

_LONG_NAMES = {"N": "nodes", "n": "ntasks", "c": "cpus-per-task", "G": "gpus"}
"""Long names of one-letter options."""
_OURS = re.compile(r"^#READAPT\s+(.*)$", re.MULTILINE)
_MEMORY = re.compile(r"(\d+)([KMGT]?)B?")
_GB_PER_UNIT = {"K": 1e-6, "": 1e-3, "M": 1e-3, "G": 1.0, "T": 1e3}
"""Without a unit, Slurm counts in megabytes."""


def is_slurm_script(text: str) -> bool:
    """Return whether a text is a Slurm batch script: it has #SBATCH lines before the first command."""
    return any(_options(text))


def nodes_of(text: str, where: str) -> dict[str, Any]:
    """Return the nodes of a script in the format of a plain list of nodes: `{"nodes": [GROUP]}` with one group.

    Values of the #READAPT line win over the #SBATCH options. Without them, the network has 10 Gbit/s and nodes cost
    nothing. Of a range of nodes (`--nodes=2-4`) the larger number counts.

    Args:
        text: the script.
        where: name of the script in error messages.

    Raises:
        InputError: the kind of GPU or the memory of the nodes is missing, or a value is not a number.
    """
    options = dict(_options(text))
    ours = dict(each.split("=", 1) for found in _OURS.findall(text) for each in found.split() if "=" in each)

    def whole(name: str, default: int = 0) -> int:
        return _whole(options.get(name) or str(default), name, where)

    tasks = whole("ntasks-per-node")
    count = _whole(options["nodes"].split("-")[-1], "nodes", where) if options.get("nodes") else 0
    count = count or math.ceil(whole("ntasks", 1) / (tasks or whole("ntasks", 1)))
    tasks = tasks or math.ceil(whole("ntasks", 1) / count)
    cpus = whole("cpus-per-task", 1) * tasks
    kind, gpus = _gpus(options, tasks, count, where)
    memory = _memory_gb(options.get("mem", "0")) or _memory_gb(options.get("mem-per-cpu", "0")) * cpus
    node: dict[str, Any] = {
        "name": "slurm",
        "count": count,
        "cpus": cpus,
        "gpus": gpus,
        "gpu": ours.get("gpu", kind) if gpus else "",
        "memory_gb": _own(ours, "memory_gb", where) or memory or _memory_gb(options.get("mem-per-gpu", "0")) * gpus,
        "network_gbit": _own(ours, "network_gbit", where) or 10.0,
        "usd_per_hour": _own(ours, "usd_per_hour", where),
    }
    absent = [name for name in ("gpu", "memory_gb") if not node[name] and (name != "gpu" or gpus)]
    if absent:
        raise InputError(
            f"{where} does not say the {' and '.join(absent)} of its nodes; add a line such as "
            f"#READAPT gpu=H100 memory_gb=1000 usd_per_hour=0"
        )
    return {"nodes": [node]}


def _options(text: str) -> Iterator[tuple[str, str]]:
    """Yield names (the long ones) and values of #SBATCH options; like Slurm, stop at the first command."""
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            return
        if not line.startswith("#SBATCH"):
            continue
        words = line.removeprefix("#SBATCH").partition(" #")[0]
        try:
            given = shlex.split(words)
        except ValueError:  # a quote is not closed
            given = words.split()
        yield from _named(given)


def _named(words: list[str]) -> Iterator[tuple[str, str]]:
    """Yield names and values of `--nodes=2`, `--nodes 2`, `-N 2` and `-N2`; the value of a flag is empty."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if not word.startswith("-"):
            continue
        is_long = word.startswith("--")
        name, mark, value = word[2:].partition("=") if is_long else (word[1:2], word[2:], word[2:])
        value = value if mark else "" if following.startswith("-") else following
        yield (name if is_long else _LONG_NAMES.get(name, name)), value


def _gpus(options: dict[str, str], tasks: int, count: int, where: str) -> tuple[str, int]:
    """Return the kind of GPU (empty if not given) and GPUs per node, from 4, h100:4, gpu:h100:4 or h100 (one GPU)."""
    resources = [each for each in options.get("gres", "").split(",") if each.split(":")[0] == "gpu"]
    of_gres = (resources[0].removeprefix("gpu").removeprefix(":") or "1") if resources else ""
    for name, given, times in (
        ("gpus-per-node", options.get("gpus-per-node"), 1.0),
        ("gres", of_gres, 1.0),
        ("gpus", options.get("gpus"), 1 / count),
        ("gpus-per-task", options.get("gpus-per-task"), float(tasks)),
    ):
        if given:
            kind, _, number = given.split(",")[0].rpartition(":")
            if not kind and not number.isdecimal():
                kind, number = number, "1"
            return kind.upper(), math.ceil(_whole(number, name, where) * times)
    return "", 0


def _whole(text: str, name: str, where: str) -> int:
    if not text.isdecimal():
        raise InputError(f"{where}: #SBATCH --{name}={text}: must be a whole number")
    return int(text)


def _own(ours: dict[str, str], name: str, where: str) -> float:
    """Return a number of the #READAPT line; 0 if it is missing."""
    text = ours.get(name, "0")
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise InputError(f"{where}: #READAPT {name}={text}: must be a number, such as {name}=1000")
    return number


def _memory_gb(text: str) -> float:
    """Return a memory option in gigabytes; 0, which means all memory in Slurm, stays 0."""
    found = _MEMORY.fullmatch(text.upper())
    return float(found[1]) * _GB_PER_UNIT[found[2]] if found else 0.0
