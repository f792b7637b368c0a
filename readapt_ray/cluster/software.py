"""Compare what a node has installed with what the driver runs.

All nodes of a cluster are compared when the driver joins it, and a node that came later when a worker starts on it: the
driver's own list is in the workers' environment.
"""

import json
import os
from collections.abc import Callable, Mapping

PACKAGES = ("torch", "ray", "transformers", "deepspeed", "faiss", "pyarrow")
"""Modules that the stages import on every node."""
DRIVER_VARIABLE = "READAPT_DRIVER_SOFTWARE"
"""Environment variable of the workers: what the driver runs, as JSON."""

_VERSIONED = {"readapt_ray": "readapt-ray", "torch": "torch"}
"""Modules whose versions must be the driver's, and their packages."""
_UNINSTALLED = "from a folder"
_MISSING = "missing"


def reader() -> Callable[[], dict[str, str]]:
    """Return a function that reads what a node has installed, even one without this package: versions, and what is missing."""
    modules, versioned, missing, uninstalled = PACKAGES, _VERSIONED, _MISSING, _UNINSTALLED

    def installed() -> dict[str, str]:  # nested, so that it is sent by value
        import importlib.metadata
        import importlib.util

        found = {}
        for module, package in versioned.items():
            try:
                found[module] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                found[module] = uninstalled if importlib.util.find_spec(module) else missing
        absent = [name for name in modules if name not in found and importlib.util.find_spec(name) is None]
        return found | dict.fromkeys(absent, missing)

    return installed


def driver_variable() -> dict[str, str]:
    """Return the environment variable that tells workers what this process, the driver, runs."""
    return {DRIVER_VARIABLE: json.dumps(reader()())}


def difference_here() -> str:
    """Return how this worker's node differs from the driver; empty if it does not, or if the driver did not say."""
    told = os.environ.get(DRIVER_VARIABLE)
    return difference(json.loads(told), reader()()) if told else ""


def difference(here: Mapping[str, str], there: Mapping[str, str]) -> str:
    """Return how a node differs from the driver; empty if it does not."""
    if text := other_versions(here, there):
        return text
    lacking = sorted(name for name, state in there.items() if state == _MISSING and name not in here)
    return f"lacks {', '.join(lacking)}, which the driver has" if lacking else ""


def other_versions(here: Mapping[str, str], there: Mapping[str, str]) -> str:
    """Return which versions a node has, if they are not the driver's; empty if they are.

    Code from a job's working directory has no version and is the driver's own. Builds of one version are alike: torch is
    2.13.0+cpu on a head without GPUs and 2.13.0+cu130 on a GPU node.
    """
    pairs = [(here[name].partition("+")[0], there[name].partition("+")[0]) for name in _VERSIONED]
    if all(a == b or (_UNINSTALLED in (a, b) and _MISSING not in (a, b)) for a, b in pairs):
        return ""
    return f"has {_named(there)}, the driver has {_named(here)}"


def _named(found: Mapping[str, str]) -> str:
    return " and ".join(f"{name} {found[name]}" for name in _VERSIONED)
