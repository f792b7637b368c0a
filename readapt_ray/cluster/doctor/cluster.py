"""Check all nodes of a cluster at the same time.

A node, a check or a worker that does not answer in time becomes a line of the report. Three nodes on one machine take
13 s. With one node that does not answer, and one whose disk hangs, it takes less than a minute. Starting GPU nodes is
not included.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from readapt_ray import environment
from readapt_ray.cluster import autoscaling, connection, launcher, nodes, on_worker, software
from readapt_ray.cluster.doctor.findings import Check, Finding, failed, run_checks
from readapt_ray.cluster.doctor.inspector import Inspector
from readapt_ray.cluster.doctor.machine import CheckOptions
from readapt_ray.cluster.doctor.network import check_clock, check_network
from readapt_ray.cluster.doctor.report import Report
from readapt_ray.cluster.doctor.root import Probe
from readapt_ray.errors import PlacementError, first_line
from readapt_ray.storage import Location

CHECKS_S = 10.0
STARTS_S = 10.0
"""Seconds for a process that runs checks to start."""
_GPU = {"CPU": 1.0, "GPU": 1.0}
_TO_COME = "GPUs to come"
DRIVER = "the driver"

Nodes = dict[str, dict[str, Any]]


def check_cluster(root: str | None, models: tuple[str, ...], *, starts_gpus: bool) -> Report:
    """Check every node of the cluster of RAY_ADDRESS, and the network between them.

    Args:
        root: folder or URI of all artifacts; None to skip this check.
        models: models that every node must have or be able to fetch.
        starts_gpus: start the GPU nodes that the autoscaler may add (READAPT_NUM_GPUS), wait for them, and check them
            too.

    Raises:
        PlacementError: the nodes did not come up in time, or have no CPU.
    """
    connection.connect(check_versions=False)
    report = Report()
    with _gpu_nodes(report, starts=starts_gpus):
        _check_nodes(root, models, report)
    return report


@contextlib.contextmanager
def _gpu_nodes(report: Report, *, starts: bool) -> Iterator[None]:
    """Start the GPU nodes that the autoscaler may add, if asked to; report GPUs that are not up."""
    wanted = environment.num_gpus() or 0
    with contextlib.ExitStack() as stack:
        if starts:
            asked = autoscaling.requested(
                wanted, _GPU, least=1, patience_s=autoscaling.PATIENCE_S, check_versions=False
            )
            try:
                stack.enter_context(asked)
            except PlacementError as error:
                report.together[_TO_COME] = failed(str(error))
        if _TO_COME not in report.together:
            report.together.update(_num_up(wanted))
        yield


def _num_up(wanted: int) -> dict[str, Finding]:
    """Return findings: how many of the wanted GPUs are up, and which nodes the launcher could not start."""
    found = {}
    if wanted:
        num_up = sum(map(_gpus, nodes.alive()))
        unchecked = ", the others were not checked; --gpus starts and checks them" if num_up < wanted else ""
        found[_TO_COME] = Finding(f"{num_up} of {wanted} are up{unchecked}")
    if failures := launcher.failures():
        found["launcher"] = failed(f"nodes could not be started: {'; '.join(failures)}")
    return found


def _check_nodes(root: str | None, models: tuple[str, ...], report: Report) -> None:
    """Check the nodes that are up, and the network between them."""
    import ray

    up = {nodes.name_of(node): node for node in nodes.alive()}
    read_versions = software.reader()
    versions = nodes.start_on_each(list(up.values()), read_versions)
    probe = None if root is None else Probe(on_worker.absolute(Location(root)))
    actors: list[Any] = []
    try:
        options = _check_options(probe, models, report)
        usable = _alike(up, read_versions(), nodes.answers(versions, timeout_s=STARTS_S), report)
        inspectors = {name: _start(node) for name, node in usable.items()}
        actors += inspectors.values()
        gpu_workers = {
            f"GPU {at} of {name}": _start(node, num_gpus=1)
            for name, node in usable.items()
            for at in range(_gpus(node))
        }
        actors += gpu_workers.values()
        loading = {name: worker.load_torch.remote() for name, worker in (gpu_workers or inspectors).items()}
        answering = _examine(inspectors, usable, options, report)
        # An actor that imports torch answers late, and the time of its answer is compared with the driver's.
        nodes.answers({name: loading[name] for name in answering if name in loading}, timeout_s=STARTS_S)
        for name, inspector in answering.items():
            report.add(name, {"clock": check_clock(inspector)})
        report.together.update(check_network(answering, gpu_workers))
    finally:
        for actor in actors:
            ray.kill(actor)
        if probe is not None:
            probe.remove()


def _check_options(probe: Probe | None, models: tuple[str, ...], report: Report) -> CheckOptions:
    """Write the driver's probe file into the root; return what each node is to check.

    If the driver cannot write into a local root, the nodes skip the check of the root.
    """
    options = CheckOptions(root=None, models=models, limit_s=CHECKS_S)
    if probe is None:
        return options
    hangs = f"{probe.root} hangs: look at its mount, or at the network to its store"
    found = run_checks([Check("root", probe.place, hangs)], limit_s=CHECKS_S)
    if found["root"].problems:
        report.add(DRIVER, found)
    if probe.name is None and probe.root.is_local:
        return options
    return dataclasses.replace(options, root=str(probe.root), probe_name=probe.name)


def _alike(up: Nodes, here: Mapping[str, str], said: Mapping[str, Any], report: Report) -> Nodes:
    """Report nodes with other versions; return the nodes that answer and have readapt_ray installed."""
    usable = {}
    for name, there in said.items():
        if isinstance(there, Exception):
            report.add(name, {"versions": _silent(there)})
            continue
        text = software.other_versions(here, there)  # missing packages are checked on each node
        advice = "install the same versions on all nodes, or remove this node"
        report.add(name, {"versions": failed(f"{text}; {advice}")} if text else {})
        if there["readapt_ray"] != "missing":
            usable[name] = up[name]
    return usable


def _silent(error: Exception) -> Finding:
    import ray

    late = isinstance(error, ray.exceptions.GetTimeoutError)
    reason = f"no answer within {STARTS_S + CHECKS_S:g} s" if late else first_line(error)
    return failed(f"the node does not work: {reason}; restart it, or leave it out")


def _gpus(node: Mapping[str, Any]) -> int:
    return int(node["Resources"].get("GPU", 0))


def _start(node: Mapping[str, Any], num_gpus: int = 0) -> Any:
    import ray

    options = {"num_cpus": 0, "num_gpus": num_gpus, "max_concurrency": 4, "scheduling_strategy": nodes.only_on(node)}
    return ray.remote(**options)(Inspector).remote()


def _examine(inspectors: Mapping[str, Any], up: Nodes, options: CheckOptions, report: Report) -> dict[str, Any]:
    """Check every node; return the inspectors of the nodes that answered."""
    started = {}
    for name, inspector in inspectors.items():
        store_bytes = int(up[name]["Resources"].get("object_store_memory", 0))
        own = dataclasses.replace(options, num_gpus=_gpus(up[name]), store_bytes=store_bytes)
        started[name] = inspector.examine.remote(own)
    answering = {}
    for name, said in nodes.answers(started, timeout_s=STARTS_S + CHECKS_S).items():
        if isinstance(said, Exception):
            report.add(name, {"checks": _silent(said)})
        else:
            answering[name] = inspectors[name]
            report.add(name, said)
    return answering
