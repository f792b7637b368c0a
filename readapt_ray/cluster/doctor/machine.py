"""Run all checks of one machine, here or on a node of a cluster."""

import functools
import importlib.metadata
import importlib.util
import os
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.constants import HF_HUB_CACHE

from readapt_ray import environment
from readapt_ray.catalog import retrievers
from readapt_ray.catalog.reachable import check_reachable
from readapt_ray.cluster import software
from readapt_ray.cluster.doctor import disks, gpus, root
from readapt_ray.cluster.doctor.findings import Check, Finding, Problem, failed, run_checks
from readapt_ray.storage import Location
from readapt_ray.yaml_files import read_yaml

_BOOTSTRAP = "~/ray_bootstrap_config.yaml"
"""The cluster file on a head that `ray up` started."""
_PROVIDER_MODULES = {"aws": "boto3", "gcp": "googleapiclient"}
"""The module that Ray's autoscaler imports on the head node, for each type of provider."""


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """The checks to run on a machine, with their inputs."""

    root: str | None
    """Folder or URI of all artifacts; None to skip this check."""
    probe_name: str | None = None
    """Name of the file that the driver wrote into the root; None if it wrote none."""
    models: tuple[str, ...] = ()
    """Models that this node must have or be able to fetch."""
    num_gpus: int | None = None
    """Number of GPUs that Ray gives to workers on the machine; None without Ray."""
    store_bytes: int = 0
    """Size of Ray's object store on the machine, in bytes; 0 without Ray."""
    ray_folder: str = ""
    """Folder that Ray spills objects to."""
    limit_s: float = 15.0
    """Seconds that all checks together may take."""


def check_machine(options: CheckOptions) -> dict[str, Finding]:
    """Run the checks of a machine at the same time; return their findings by column of the report ("disk", "GPUs").

    A check that raises or does not end within `limit_s` has a problem as its finding.
    """
    return run_checks(_checks(options), limit_s=options.limit_s)


def _checks(options: CheckOptions) -> list[Check]:
    num_gpus = options.num_gpus or 0
    folders = disks.working_folders(options.ray_folder)
    driver_hangs = "the driver hangs: look with nvidia-smi and dmesg, and restart this machine"
    disk_hangs = "a disk hangs: look with df and dmesg, and mount it again or leave this node out"
    root_hangs = f"{options.root} hangs: look at its mount, or at the network to its store"
    no_way = "give it a way to the hub (HF_ENDPOINT, HTTPS_PROXY), or give models as folders or URIs"
    checks = [
        Check("packages", check_packages, disk_hangs),
        Check("GPUs", lambda: gpus.check_gpus(options.num_gpus), driver_hangs),
        Check("shared memory", lambda: disks.check_shared_memory(options.store_bytes, num_gpus), disk_hangs),
        Check("disk", lambda: disks.check_disks(folders), disk_hangs),
    ]
    if options.root is not None:
        place = Location(options.root)
        checks.append(Check("root", lambda: root.check_root(place, options.probe_name), root_hangs))
    if options.models:
        checks.append(Check("models", lambda: check_models(options.models, options.limit_s - 1), no_way))
    return checks


def check_packages() -> Finding:
    """Check that the modules that the stages import are installed; nothing is imported.

    On a head that `ray up` started, the module that the autoscaler needs for its cloud is checked too.
    """
    missing = [module for module in software.PACKAGES if importlib.util.find_spec(module) is None]
    if missing:
        return failed(f"{', '.join(missing)} cannot be imported; install readapt-ray there with its dependencies")
    if (module := _provider_module()) and importlib.util.find_spec(module) is None:
        return failed(
            f"{module} cannot be imported, so the autoscaler starts no nodes; build the image of Containerfile.cpu"
        )
    return Finding(f"torch {importlib.metadata.version('torch')}")


def _provider_module() -> str | None:
    """Return the module that the autoscaler on this head node imports for its cloud; None on other machines."""
    file = Path(os.path.expanduser(_BOOTSTRAP))  # stays as it is without a home folder; Path.expanduser would fail
    if not file.is_file():
        return None
    (cluster,) = read_yaml(Location(str(file)), "the cluster file of this head")
    return _PROVIDER_MODULES.get(cluster["provider"]["type"])


def check_models(models: tuple[str, ...], limit_s: float) -> Finding:
    """Check that each model is on this machine, or can be fetched and fits on the disk. Nothing is fetched.

    A model that is missing, is not found in time, or does not fit becomes a problem of the finding; nothing is raised.
    Pickled weights and GGUF files of a local model are converted.

    Args:
        models: catalog names, folders, URIs or hub ids.
        limit_s: seconds for the search for all models together.
    """
    to_fetch: dict[Path, int] = defaultdict(int)

    def look(name: str) -> Finding:
        cache = environment.cache_folder() if "://" in retrievers.hub_id(name) else Path(HF_HUB_CACHE)
        num_bytes = check_reachable(name)
        if num_bytes:
            to_fetch[cache] += num_bytes
        return Finding("ok")

    silent = "{!r} was not found by then: give this node a way to the hub (HF_ENDPOINT, HTTPS_PROXY), or give a folder or a URI"
    checks = [Check(name, functools.partial(look, name), silent.format(name)) for name in models]
    found = run_checks(checks, limit_s=limit_s)
    problems = [problem for finding in found.values() for problem in finding.problems]
    for cache, num_bytes in to_fetch.items():
        free = shutil.disk_usage(disks.existing(cache)).free
        if num_bytes > free:
            text = f"models to fetch take {num_bytes / 1e9:.1f} GB and {cache} has {free / 1e9:.1f} GB free"
            problems.append(Problem(f"{text}; free some, or name a larger disk by READAPT_CACHE and HF_HOME"))
    fails = sum(bool(finding.problems) for finding in found.values())
    return Finding(f"{len(models) - fails} of {len(models)}", tuple(problems))
