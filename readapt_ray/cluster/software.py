"""Compare the packages of a node with the driver's.

All nodes are compared when the driver joins a cluster. A node that comes later is compared when a worker starts on it:
an environment variable of the workers has the driver's versions.
"""

import json
import os
from collections.abc import Callable, Mapping

PACKAGES = ("torch", "ray", "transformers", "deepspeed", "faiss", "pyarrow")
"""Modules that the stages import on every node."""
DRIVER_VARIABLE = "READAPT_DRIVER_SOFTWARE"
"""Environment variable of the workers: the driver's versions and missing modules, as JSON."""

_VERSIONED = {"readapt_ray": "readapt-ray", "torch": "torch"}
"""Modules whose version must equal the driver's, and the names of their packages."""
_UNINSTALLED = "from a folder"
_MISSING = "missing"


def reader() -> Callable[[], dict[str, str]]:
    """Return a function that reads versions and missing modules; it also runs on nodes without this package."""
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
    """Return the environment variable that tells workers the versions of this process, the driver."""
    return {DRIVER_VARIABLE: json.dumps(reader()())}


def difference_here() -> str:
    """Return how this worker's node differs from the driver; empty if it does not, or if the variable is not set."""
    told = os.environ.get(DRIVER_VARIABLE)
    return difference(json.loads(told), reader()()) if told else ""


def difference(here: Mapping[str, str], there: Mapping[str, str]) -> str:
    """Return how a node differs from the driver, in versions or in missing modules; empty if it does not.

    Args:
        here: result of `reader()()` on the driver.
        there: the same on the node.
    """
    if text := other_versions(here, there):
        return text
    lacking = sorted(name for name, state in there.items() if state == _MISSING and name not in here)
    return f"lacks {', '.join(lacking)}, which the driver has" if lacking else ""


def other_versions(here: Mapping[str, str], there: Mapping[str, str]) -> str:
    """Describe the versions of a node if they differ from the driver's; empty if they do not. See `difference`.

    Compared are the versions of readapt_ray and torch; other missing modules are ignored.

    Builds of one version are equal: torch is 2.13.0+cpu on a head without GPUs, and 2.13.0+cu130 on a GPU node. Code
    from a job's working directory has no version and equals any, because it is the driver's code.
    """
    pairs = [(here[name].partition("+")[0], there[name].partition("+")[0]) for name in _VERSIONED]
    if all(a == b or (_UNINSTALLED in (a, b) and _MISSING not in (a, b)) for a, b in pairs):
        return ""
    return f"has {_named(there)}, the driver has {_named(here)}"


def _named(found: Mapping[str, str]) -> str:
    return " and ".join(f"{name} {found[name]}" for name in _VERSIONED)
