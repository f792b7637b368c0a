"""Read the nodes of the cluster that a plan is for, from the file that starts the cluster.

The file is a Ray cluster launcher file (`cluster_name`, AWS or GCP), a KubeRay manifest (`kind: RayCluster`, `RayJob`
or `RayService`), a Slurm script, or a plain list (`nodes`); `local` means this machine. CPUs, memory, GPUs and prices
of machine types come from a table that the user can replace.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from pydantic import Field

from readapt_ray import hardware
from readapt_ray.config import Config, meant
from readapt_ray.errors import InputError
from readapt_ray.planner.machines import Cluster, NodeGroup
from readapt_ray.planner.prices import Machine, PriceTable, read_mapping
from readapt_ray.planner.quantities import quantity
from readapt_ray.planner.slurm_script import is_slurm_script, nodes_of
from readapt_ray.storage import Location

_PLACEHOLDER: Final = re.compile(r"\b(?:ACCOUNT|PROJECT|REGISTRY|BUCKET)\b")
"""Placeholders in our cluster files, which the user must replace."""
_GB: Final = 1_000_000_000
_RAY_MAX_WORKERS: Final = 2
"""Ray's default for max_workers in a launcher file."""
_NODES = (
    "a YAML file such as `nodes: [{name: a, count: 2, cpus: 16, memory_gb: 200, gpu: H100, gpus: 1, usd_per_hour: 3}]`"
)
_KINDS = (
    "a file of `ray up` (with cluster_name and provider), a KubeRay manifest (kind: RayCluster, RayJob or RayService), a "
    f"Slurm script, {_NODES}, or `local` for this machine"
)


def read_cluster(uri: str, prices: PriceTable) -> Cluster:
    """Read the nodes of a cluster from the file that starts it, or describe this machine.

    Groups have their largest size; groups of 0 nodes are left out.

    Args:
        uri: path or URI of a Ray launcher file, a KubeRay manifest, a Slurm script or a list of nodes; `local` for this
            machine.
        prices: table of machine types and GPUs.

    Raises:
        InputError: there is no such file, its kind is unknown, a value has a wrong type, a machine or GPU is not in the
            price table, or no node has a CPU for tasks.
    """
    if uri == "local":
        return Cluster(name="local", groups=(_this_machine(prices),))
    location = Location(uri)
    values = _values(location)
    if "nodes" in values:
        groups = _plain(values, prices, uri)
    elif "cluster_name" in values:
        groups = _launcher(values, prices, uri)
    elif str(values.get("kind", "")) in ("RayCluster", "RayJob", "RayService"):
        groups = _kuberay(values, prices, uri)
    else:
        raise InputError(f"{uri!r} does not describe a cluster; give {_KINDS}")
    groups = tuple(group for group in groups if group.count)
    if not groups:
        raise InputError(f"{uri!r} has no node: all its groups count 0")
    if not any(group.cpus for group in groups):
        raise InputError(f"{uri!r} has no node for tasks: all have 0 CPUs; add workers")
    name = str(values.get("cluster_name") or location.name)
    left = ", ".join(sorted(set(_PLACEHOLDER.findall(str(values)))))
    unfilled = left and f"{uri} still has {left} in it: fill it in before you start the cluster"
    return Cluster(name=name, groups=groups, idle_timeout_s=_idle_timeout_s(values, uri), unfilled=unfilled)


def _values(location: Location) -> dict[str, Any]:
    """Return the options in a cluster's file; a Slurm script becomes a list of nodes.

    Raises:
        InputError: there is no such file, or it is a folder; then the message names the files in it.
    """
    if location.is_folder():
        names = [name for name in location.children()[0] if name.endswith((".yaml", ".yml", ".sh"))]
        raise InputError(
            f"{location.uri!r} is a folder; give one of its files: {', '.join(sorted(names)) or 'it has none'}"
        )
    if location.is_file() and location.name.endswith((".sh", ".sbatch", ".slurm")):
        text = location.read_text()
        if is_slurm_script(text):
            return nodes_of(text, repr(location.uri))
    return read_mapping(location, "a cluster")


def _section(values: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    """Return a section by name; an empty dict if it is absent or empty."""
    value = values.get(name)
    if value is not None and not isinstance(value, dict):
        raise InputError(f"{where}: {name} = {value!r}: must be a section of options by name")
    return value or {}


def _number(values: Mapping[str, Any], name: str, default: float, where: str) -> float:
    """Return a number of 0 or more; the default if it is absent or empty."""
    value = values.get(name)
    try:
        number = math.nan if isinstance(value, bool) else float(default if value is None else value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise InputError(f"{where}: {name} = {value!r}: must be a number of 0 or more")
    return number


def _count(values: Mapping[str, Any], name: str, default: int, where: str) -> int:
    """Return a whole number of 0 or more; the default if it is absent or empty."""
    number = _number(values, name, default, where)
    if not number.is_integer():
        raise InputError(f"{where}: {name} = {values[name]!r}: must be a whole number")
    return int(number)


def _idle_timeout_s(values: dict[str, Any], where: str) -> float:
    """Return after how many seconds the autoscaler stops an idle node: the file's value, else Ray's default."""
    if "cluster_name" in values:
        return 60.0 * _number(values, "idle_timeout_minutes", 5, where)
    if "nodes" in values:
        return 60.0
    options = _section(_ray_cluster(values, where), "autoscalerOptions", where)
    return _number(options, "idleTimeoutSeconds", 60, where)


def _this_machine(prices: PriceTable) -> NodeGroup:
    from readapt_ray.nn import packed_linear

    node = NodeGroup(
        name="this machine",
        count=1,
        cpus=hardware.num_cores(),
        memory_bytes=float(hardware.memory_bytes()),
        has_bfloat16_units=hardware.has_bfloat16_units(),
        packed_dtypes=packed_linear.faster_dtypes(),
    )
    if not (kind := own_gpu(prices)):
        return node
    import torch

    return replace(
        node,
        gpu=kind,
        gpus=torch.cuda.device_count(),
        gpu_flops=prices.gpus[kind].tflops * 1e12,
        gpu_memory_bytes=float(torch.cuda.get_device_properties(0).total_memory),
    )


def own_gpu(prices: PriceTable) -> str:
    """Return the price table's name for this machine's first GPU ("A100-80GB"); empty if torch sees no GPU.

    Raises:
        InputError: the table does not have this kind.
    """
    import torch

    if not torch.cuda.is_available():
        return ""
    name = torch.cuda.get_device_name(0)
    num_bytes = torch.cuda.get_device_properties(0).total_memory
    kinds = [kind for kind in prices.gpus if kind.partition("-")[0] in re.split(r"[\s-]+", name)]
    if not kinds:
        raise InputError(
            f"this machine has the GPU {name!r}, which the price table does not know; it knows {', '.join(prices.gpus)}: give a "
            f"table that has it with --prices"
        )
    return min(kinds, key=lambda kind: abs(prices.gpus[kind].memory_gb * _GB - num_bytes))


class _PlainNode(Config):
    """A node group in a plain list."""

    name: str
    """Name of the group."""
    count: int = Field(default=1, ge=0)
    """Number of nodes."""
    machine: str = ""
    """A machine type of the price table; if omitted, give cpus, memory_gb and usd_per_hour."""
    spot: bool = False
    """Use spot instances."""
    cpus: int = Field(default=0, ge=0)
    """CPUs of one node."""
    memory_gb: float = Field(default=0.0, ge=0)
    """Memory of one node in 10^9 bytes."""
    gpu: str = ""
    """Kind of GPU, by its name in the price table."""
    gpus: int = Field(default=0, ge=0)
    """GPUs of one node."""
    network_gbit: float = Field(default=10.0, gt=0)
    """Gbit/s between nodes."""
    usd_per_hour: float | None = Field(default=None, ge=0)
    """Price of one node in USD per hour."""


def _plain(values: dict[str, Any], prices: PriceTable, where: str) -> tuple[NodeGroup, ...]:
    if not isinstance(values["nodes"], list):
        raise InputError(f"{where}: nodes must be a list of groups")
    if others := ", ".join(map(repr, values.keys() - {"nodes"})):
        raise InputError(f"{where}: {others} beside nodes: a list of nodes has nothing beside it; remove it")
    groups = []
    for each in values["nodes"]:
        node = _PlainNode.parse(each if isinstance(each, dict) else {"name": each}, where=f"{where}: nodes")
        _check_plain(node, where)
        machine = _machine(node.machine, prices, where) if node.machine else _described(node)
        group = _group(node.name, node.count, machine, prices, spot=node.spot, where=where)
        groups.append(replace(group, machine_type=node.machine, is_spot=group.is_spot and bool(node.machine)))
    return tuple(groups)


def _check_plain(node: _PlainNode, where: str) -> None:
    """Check that a node has either a machine type or its own CPUs, memory and GPUs.

    Raises:
        InputError: it has neither, or both, or only one of gpu and gpus.
    """
    if not node.machine and (node.cpus < 1 or node.memory_gb <= 0):
        raise InputError(f"{where}: node {node.name!r} says neither its machine nor its cpus and memory_gb")
    described = ("cpus", "memory_gb", "gpu", "gpus", "network_gbit", "usd_per_hour")
    if node.machine and (twice := [name for name in described if name in node.model_fields_set]):
        raise InputError(
            f"{where}: node {node.name!r} has machine = {node.machine!r} and {', '.join(twice)}; what a machine has and costs is "
            f"in the price table (--prices): leave one out"
        )
    if not node.machine and ("gpu" in node.model_fields_set) != ("gpus" in node.model_fields_set):
        raise InputError(f"{where}: node {node.name!r} must say both gpu, its kind, and gpus, their number, or neither")


def _described(node: _PlainNode) -> Machine:
    price = node.usd_per_hour or 0.0
    said = node.model_dump(include={"cpus", "memory_gb", "gpu", "gpus", "network_gbit"})
    return Machine(**said, on_demand=price, spot=price)


def _machine(kind: str, prices: PriceTable, where: str) -> Machine:
    if kind not in prices.machines:
        raise InputError(
            f"{where}: the price table has no machine {kind!r}; it has {', '.join(sorted(prices.machines))}: give a table "
            f"that has it with --prices FILE.yaml"
        )
    return prices.machines[kind]


def _group(name: str, count: int, machine: Machine, prices: PriceTable, *, spot: bool = False, where: str) -> NodeGroup:
    """Return a group of nodes of one machine, with FLOPs and memory of its GPU from the price table.

    Raises:
        InputError: the price table does not have the GPU.
    """
    device = prices.gpus.get(machine.gpu)
    if machine.gpus and device is None:
        raise InputError(
            f"{where}: group {name!r} has the GPU {machine.gpu!r}, which the price table does not know; it knows "
            f"{', '.join(prices.gpus)}: name one of them, or give a table that has it with --prices"
        )
    has_gpus = bool(machine.gpus and device)
    return NodeGroup(
        name=name,
        count=count,
        cpus=machine.cpus,
        memory_bytes=machine.memory_gb * _GB,
        gpu=machine.gpu if has_gpus else "",
        gpus=machine.gpus,
        gpu_flops=device.tflops * 1e12 if has_gpus and device else 0.0,
        gpu_memory_bytes=device.memory_gb * _GB if has_gpus and device else 0.0,
        network_gbit=machine.network_gbit,
        usd_per_hour=machine.spot if spot else machine.on_demand,
        is_spot=spot,
    )


def _launcher(values: dict[str, Any], prices: PriceTable, where: str) -> tuple[NodeGroup, ...]:
    """Return the groups of a Ray cluster launcher file with their largest sizes, limited by max_workers of the file."""
    provider = str(_section(values, "provider", where).get("type", ""))
    if provider not in ("aws", "gcp"):
        raise InputError(
            f"{where}: provider type {provider!r}; only aws and gcp can be read; for another cluster give {_NODES}"
        )
    head, types = values.get("head_node_type"), _section(values, "available_node_types", where)
    if head not in types:
        hint = meant(str(head), types) or f"the types are {', '.join(types) or 'none'}"
        raise InputError(f"{where}: head_node_type = {head!r} is not in available_node_types; {hint}")
    most = _count(values, "max_workers", _RAY_MAX_WORKERS, where)
    heads: list[NodeGroup] = []
    workers: list[NodeGroup] = []
    for name in types:
        kind, place = _section(types, name, where), f"{where}: {name}"
        machine, spot = _of_provider(provider, _section(kind, "node_config", place), place)
        count = 1 if name == head else _count(kind, "max_workers", most, place)
        group = _group(name, count, _machine(machine, prices, where), prices, spot=spot, where=where)
        cpus = _count(_section(kind, "resources", place), "CPU", group.cpus, place)
        group = replace(group, cpus=cpus, machine_type=machine)
        group = group if name == head else replace(group, min_count=_count(kind, "min_workers", 0, place))
        (heads if name == head else workers).append(group)
    return (*heads, *_within(most, workers))


def _of_provider(provider: str, config: dict[str, Any], where: str) -> tuple[str, bool]:
    """Return the machine type of a node's config, and whether it is a spot instance."""
    if provider == "aws":
        return str(config.get("InstanceType", "")), "spot" in str(config.get("InstanceMarketOptions", "")).lower()
    scheduling = _section(config, "scheduling", where)
    spot = scheduling.get("provisioningModel") == "SPOT" or bool(scheduling.get("preemptible"))
    return str(config.get("machineType", "")).rsplit("/", 1)[-1], spot


def _within(most: int, groups: Sequence[NodeGroup]) -> list[NodeGroup]:
    """Limit the groups to `most` nodes together.

    Nodes that are always up come first, then nodes with the most GPUs, because the long stages need GPUs.
    """
    counts: dict[str, int] = {}
    for group in groups:
        counts[group.name] = min(group.count, group.min_count or 0, most - sum(counts.values()))
    for group in sorted(groups, key=lambda each: -each.gpus):
        room = most - sum(counts.values()) + counts[group.name]
        counts[group.name] = min(group.count, room)
    return [replace(group, count=counts[group.name]) for group in groups]


def _kuberay(values: dict[str, Any], prices: PriceTable, where: str) -> tuple[NodeGroup, ...]:
    """Return the groups of a RayCluster, RayJob or RayService; with autoscaling at their maxReplicas."""
    spec = _ray_cluster(values, where)
    head = {"groupName": "head", **_section(spec, "headGroupSpec", where), "replicas": 1}
    workers = spec.get("workerGroupSpecs") or []
    if not isinstance(workers, list) or not all(isinstance(each, dict) for each in workers):
        raise InputError(f"{where}: workerGroupSpecs must be a list of groups")
    is_scaled = bool(spec.get("enableInTreeAutoscaling"))
    pods = [_pods(head, prices, where, is_scaled=False)]
    return (*pods, *(_pods(group, prices, where, is_scaled=is_scaled) for group in workers))


def _ray_cluster(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the spec of a RayCluster, also of one inside a RayJob or RayService."""
    spec = _section(values, "spec", where)
    return _section(spec, "rayClusterSpec", where) or _section(spec, "rayClusterConfig", where) or spec


def _pods(group: dict[str, Any], prices: PriceTable, where: str, *, is_scaled: bool) -> NodeGroup:
    name = str(group.get("groupName"))
    place = f"{where}: group {name!r}"
    template = _section(group, "template", place)
    asked = _resources(_section(template, "spec", place), place)
    annotations = _section(_section(template, "metadata", place), "annotations", place)
    price = _number(annotations, "readapt.dev/usd-per-hour", 0, place)
    started = _section(group, "rayStartParams", place)
    machine = Machine(
        cpus=max(1, math.floor(quantity(asked["cpu"], place))),
        memory_gb=quantity(asked["memory"], place) / _GB,
        gpu=str(annotations.get("readapt.dev/gpu", "")),
        gpus=_count(started, "num-gpus", _count(asked, "nvidia.com/gpu", 0, place), place),
        network_gbit=_number(annotations, "readapt.dev/network-gbit", 10, place),
        on_demand=price,
        spot=price,
    )
    hosts = _count(group, "numOfHosts", 1, place)
    count = _count(group, "replicas", 1, place)
    most = _count(group, "maxReplicas", count, place) if is_scaled else count
    least = _count(group, "minReplicas", 0, place) if is_scaled else count
    found = _group(name, most * hosts, machine, prices, where=where)
    return replace(found, cpus=_count(started, "num-cpus", found.cpus, place), min_count=least * hosts)


def _resources(pod: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the resources of the first container of a pod: its limits, else its requests.

    Raises:
        InputError: the container sets neither a limit nor a request of cpu or of memory.
    """
    containers = pod.get("containers")
    first = containers[0] if isinstance(containers, list) and containers else {}
    resources = _section(first if isinstance(first, dict) else {}, "resources", where)
    asked = {**_section(resources, "requests", where), **_section(resources, "limits", where)}
    if missing := [name for name in ("cpu", "memory") if asked.get(name) is None]:
        raise InputError(
            f"{where} sets no limit or request of {' and '.join(missing)} for its first container; add it to "
            f"resources.limits"
        )
    return asked
