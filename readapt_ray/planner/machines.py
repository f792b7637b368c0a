"""Read the cluster that a plan is for: node groups with their CPUs, memory, GPUs and price.

Read from what a cluster is started with: a Ray cluster launcher file (`cluster_name`, AWS or GCP), a KubeRay
manifest (`kind: RayCluster`, `RayJob` or `RayService`), a Slurm script, a plain list (`nodes`), or `local`, this machine. Prices and what a
machine type has come from a table that the user can replace.
"""

import math
import re
from dataclasses import dataclass, replace
from typing import Any, Final

from readapt_ray import hardware
from readapt_ray.config import Config
from readapt_ray.errors import InputError
from readapt_ray.planner.prices import Machine, PriceTable, read_mapping
from readapt_ray.planner.quantities import quantity
from readapt_ray.planner.slurm_script import is_slurm_script, nodes_of
from readapt_ray.storage import Location

_PLACEHOLDER: Final = re.compile(r"\b(?:ACCOUNT|PROJECT|REGISTRY|BUCKET)\b")
"""Words of our cluster files that a user replaces."""
_GB: Final = 1_000_000_000
_OBJECT_STORE_SHARE: Final = 0.3
"""Share of a node's memory that Ray sets aside for its object store."""
_USABLE_SHARE: Final = 0.94
"""Share of a GPU's memory that can be used; the rest is the driver's and fragmentation."""
_RAY_MAX_WORKERS: Final = 2
"""What Ray takes where a launcher file does not say."""
_GPU_STAGES: Final = ("train", "finetune", "embed", "tune")
_KINDS = "a Ray launcher file (cluster_name, provider), a KubeRay manifest (kind: RayCluster), a Slurm script, or a list of nodes"


@dataclass(frozen=True, kw_only=True)
class NodeGroup:
    """Nodes of one kind."""

    name: str
    count: int
    """At most."""
    cpus: int
    memory_bytes: float
    gpu: str = ""
    gpus: int = 0
    gpu_flops: float = 0.0
    gpu_memory_bytes: float = 0.0
    network_gbit: float = 10.0
    """Between nodes, per second."""
    usd_per_hour: float = 0.0
    """Of one node."""
    machine_type: str = ""
    """A name of the price table; empty if the cluster's file says what its nodes cost."""
    is_spot: bool = False
    min_count: int | None = None
    """Nodes that are always up; None means all of them."""
    has_bfloat16_units: bool = False
    """Whether its CPUs are known to have matrix units for bfloat16."""

    @property
    def num_lasting(self) -> int:
        """Nodes that are up for the whole run; only groups with GPUs are scaled down during it."""
        return self.count if self.min_count is None or not self.gpus else min(self.count, self.min_count)

    @property
    def cpu_share_bytes(self) -> float:
        """Memory per CPU in bytes, without Ray's object store."""
        return self.memory_bytes * (1 - _OBJECT_STORE_SHARE) / max(1, self.cpus)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """All nodes of a cluster."""

    name: str
    groups: tuple[NodeGroup, ...]
    idle_timeout_s: float = 300.0
    """How long an idle node stays up, and is paid for, where the autoscaler may take it."""
    unfilled: str = ""
    """A sentence that names the CAPITALS left in its file; empty if there are none."""

    @property
    def num_gpus(self) -> int:
        """GPUs of all nodes."""
        return sum(group.count * group.gpus for group in self.groups)

    @property
    def num_cpus(self) -> int:
        """CPUs of all nodes."""
        return sum(group.count * group.cpus for group in self.groups)

    @property
    def num_lasting_cpus(self) -> int:
        """CPUs of the nodes that are up while no stage needs GPUs; all CPUs if there are none such."""
        return sum(group.num_lasting * group.cpus for group in self.groups) or self.num_cpus

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return sum(group.count for group in self.groups)

    @property
    def usd_per_hour(self) -> float:
        """Price of the whole cluster in USD per hour."""
        return sum(group.count * group.usd_per_hour for group in self.groups)

    @property
    def lasting_usd_per_hour(self) -> float:
        """Price in USD per hour of the nodes that are up for the whole run."""
        return sum(group.num_lasting * group.usd_per_hour for group in self.groups)

    @property
    def has_spot(self) -> bool:
        """Whether some nodes are on spot."""
        return any(group.is_spot for group in self.groups)

    def on_demand(self, prices: PriceTable) -> "Cluster":
        """Return the same cluster with no node on spot."""
        groups = (
            replace(group, usd_per_hour=prices.machines[group.machine_type].on_demand, is_spot=False)
            if group.is_spot
            else group
            for group in self.groups
        )
        return replace(self, groups=tuple(groups))

    @property
    def growing_usd_per_hour(self) -> float:
        """Price in USD per hour of the nodes that are up only while GPUs are needed."""
        return self.usd_per_hour - self.lasting_usd_per_hour

    def usd_per_hour_of(self, stage: str) -> float:
        """Return the price in USD per hour of the nodes that are up while a stage runs."""
        return self.lasting_usd_per_hour + (self.growing_usd_per_hour if stage in _GPU_STAGES else 0.0)

    @property
    def gpu_groups(self) -> tuple[NodeGroup, ...]:
        """The groups that have GPUs."""
        return tuple(group for group in self.groups if group.gpus and group.count)

    @property
    def largest(self) -> NodeGroup:
        """The group whose nodes have the most memory."""
        return max(self.groups, key=lambda group: group.memory_bytes)

    def computes_low(self, dtype: str) -> bool:
        """Return whether a model computes in bfloat16 or float16; `auto` means float32 on CPUs that may lack units for
        it.
        """
        if dtype == "auto":
            return bool(self.num_gpus) or all(group.has_bfloat16_units for group in self.groups)
        return dtype != "float32"

    def room(self, cpus: int, num_workers: int | None) -> tuple[float, str]:
        """Return the bytes that a worker with so many CPUs may take, and the name of what limits them."""
        if self.gpu_groups:
            smallest = min(self.gpu_groups, key=lambda group: group.gpu_memory_bytes)
            return smallest.gpu_memory_bytes * _USABLE_SHARE, f"one {smallest.gpu}"
        group = self.largest
        on_a_node = max(1, group.cpus // cpus)
        if num_workers:
            on_a_node = min(on_a_node, -(-num_workers // self.num_nodes))
        return group.memory_bytes * (1 - _OBJECT_STORE_SHARE) / on_a_node, group.name

    def describe(self) -> str:
        """Return the cluster as one line."""
        parts = []
        for group in self.groups:
            gpus = f", {group.gpus} x {group.gpu}" if group.gpus else ""
            count = f"{group.num_lasting} to {group.count}" if group.num_lasting < group.count else f"{group.count}"
            parts.append(
                f"{count} x {group.name} ({group.cpus} CPUs, {group.memory_bytes / _GB:.0f} GB{gpus}, {group.usd_per_hour:.2f} USD/h)"
            )
        return "; ".join(parts)


def read_cluster(uri: str, prices: PriceTable) -> Cluster:
    """Read the cluster from a file, or describe this machine if the file is `local`.

    Raises:
        InputError: there is no such file, its kind is unknown, or a machine of it is not in the price table.
    """
    if uri == "local":
        return Cluster(name="local", groups=(_this_machine(),))
    location = Location(uri)
    values = _values(location)
    if "nodes" in values:
        groups = _plain(values, prices, uri)
    elif "cluster_name" in values:
        groups = _launcher(values, prices, uri)
    elif str(values.get("kind", "")) in ("RayCluster", "RayJob", "RayService"):
        groups = _kuberay(values, prices, uri)
    else:
        raise InputError(f"{uri!r} is of no kind of cluster that is known; give {_KINDS}, or `local` for this machine")
    groups = tuple(group for group in groups if group.count)
    if not groups:
        raise InputError(f"{uri!r} has no node: all its groups count 0")
    name = str(values.get("cluster_name") or location.name)
    left = ", ".join(sorted(set(_PLACEHOLDER.findall(str(values)))))
    unfilled = left and f"{uri} still has {left} in it: fill it in before you start the cluster"
    return Cluster(name=name, groups=groups, idle_timeout_s=_idle_timeout_s(values), unfilled=unfilled)


def _values(location: Location) -> dict[str, Any]:
    """Return what a cluster's file says; a Slurm script as a list of nodes.

    Raises:
        InputError: there is no such file, or it is a folder; the message names the manifests in it.
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


def _idle_timeout_s(values: dict[str, Any]) -> float:
    """Return the seconds after which the autoscaler stops an idle node, from a launcher file or KubeRay manifest, else
    Ray's default.
    """
    if "cluster_name" in values:
        return 60.0 * float(values.get("idle_timeout_minutes", 5))
    return float((_ray_cluster(values).get("autoscalerOptions") or {}).get("idleTimeoutSeconds", 60))


def _this_machine() -> NodeGroup:
    return NodeGroup(
        name="this machine",
        count=1,
        cpus=hardware.num_cores(),
        memory_bytes=float(hardware.memory_bytes()),
        has_bfloat16_units=hardware.has_bfloat16_units(),
    )


class _PlainNode(Config):
    """A node group in a plain list."""

    name: str
    """What to call it."""
    count: int = 1
    """Nodes."""
    machine: str = ""
    """A machine type of the price table; or say cpus, memory_gb and usd_per_hour."""
    spot: bool = False
    """Whether the machine is a spot instance."""
    cpus: int = 0
    """Of one node."""
    memory_gb: float = 0.0
    """Of one node, in 10^9 bytes."""
    gpu: str = ""
    """Kind of GPU."""
    gpus: int = 0
    """GPUs of one node."""
    network_gbit: float = 10.0
    """Gbit/s between nodes."""
    usd_per_hour: float | None = None
    """Of one node."""


def _plain(values: dict[str, Any], prices: PriceTable, where: str) -> tuple[NodeGroup, ...]:
    if not isinstance(values["nodes"], list):
        raise InputError(f"{where}: nodes must be a list of groups")
    groups = []
    for each in values["nodes"]:
        node = _PlainNode.parse(each if isinstance(each, dict) else {"name": each}, where=f"{where}: nodes")
        if not node.machine and (node.cpus < 1 or node.memory_gb <= 0):
            raise InputError(f"{where}: node {node.name!r} says neither its machine nor its cpus and memory_gb")
        machine = _machine(node.machine, prices, where) if node.machine else _described(node)
        group = _group(node.name, node.count, machine, prices, spot=node.spot, where=where)
        groups.append(replace(group, machine_type=node.machine, is_spot=group.is_spot and bool(node.machine)))
    return tuple(groups)


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
    """Return nodes of one machine type, with what the price table says of their GPU."""
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
    """Return the groups of a Ray cluster launcher file, each with its maximum of workers, within the maximum of all."""
    provider = str((values.get("provider") or {}).get("type", ""))
    if provider not in ("aws", "gcp"):
        raise InputError(
            f"{where}: provider type {provider!r}; known are aws and gcp: write other clusters as {_KINDS}"
        )
    head = values.get("head_node_type")
    most = int(values.get("max_workers", _RAY_MAX_WORKERS))
    heads: list[NodeGroup] = []
    workers: list[NodeGroup] = []
    for name, kind in (values.get("available_node_types") or {}).items():
        config = kind.get("node_config") or {}
        if provider == "aws":
            machine = str(config.get("InstanceType", ""))
            spot = "spot" in str(config.get("InstanceMarketOptions", "")).lower()
        else:
            machine = str(config.get("machineType", "")).rsplit("/", 1)[-1]
            scheduling = config.get("scheduling") or {}
            spot = scheduling.get("provisioningModel") == "SPOT" or bool(scheduling.get("preemptible"))
        count = 1 if name == head else int(kind.get("max_workers", most))
        group = _group(name, count, _machine(machine, prices, where), prices, spot=spot, where=where)
        cpus = int((kind.get("resources") or {}).get("CPU", group.cpus))
        group = replace(group, cpus=cpus, machine_type=machine)
        group = group if name == head else replace(group, min_count=int(kind.get("min_workers", 0)))
        (heads if name == head else workers).append(group)
    return (*heads, *_within(most, workers))


def _within(most: int, groups: list[NodeGroup]) -> list[NodeGroup]:
    """Limit the groups to a number of nodes in all; groups with GPUs first, since the long stages ask for them."""
    counts: dict[str, int] = {}
    for group in sorted(groups, key=lambda each: -each.gpus):
        counts[group.name] = min(group.count, most - sum(counts.values()))
    return [replace(group, count=counts[group.name]) for group in groups]


def _kuberay(values: dict[str, Any], prices: PriceTable, where: str) -> tuple[NodeGroup, ...]:
    """Return the groups of a RayCluster, RayJob or RayService, each with its maximum of replicas."""
    spec = _ray_cluster(values)
    head = {"groupName": "head", "replicas": 1, **(spec.get("headGroupSpec") or {})}
    return tuple(_pods(group, prices, where) for group in (head, *(spec.get("workerGroupSpecs") or [])))


def _ray_cluster(values: dict[str, Any]) -> dict[str, Any]:
    """Return the RayCluster, or the one inside a RayJob or RayService."""
    spec = values.get("spec") or {}
    return dict(spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec)


def _pods(group: dict[str, Any], prices: PriceTable, where: str) -> NodeGroup:
    name = str(group.get("groupName"))
    pod = ((group.get("template") or {}).get("spec")) or {}
    containers = pod.get("containers") or [{}]
    resources = containers[0].get("resources") or {}
    asked = {**(resources.get("requests") or {}), **(resources.get("limits") or {})}
    if "cpu" not in asked or "memory" not in asked:
        raise InputError(f"{where}: group {name!r} sets no limits for cpu and memory of its first container; set both")
    count = int(group.get("maxReplicas", group.get("replicas", 1)))
    gpus = int(asked.get("nvidia.com/gpu", 0))
    annotations = (group.get("template") or {}).get("metadata", {}).get("annotations") or {}
    price = float(annotations.get("readapt.dev/usd-per-hour", 0))
    machine = Machine(
        cpus=max(1, math.floor(quantity(asked["cpu"]))),
        memory_gb=quantity(asked["memory"]) / _GB,
        gpu=str(annotations.get("readapt.dev/gpu", "")),
        gpus=gpus,
        network_gbit=float(annotations.get("readapt.dev/network-gbit", 10)),
        on_demand=price,
        spot=price,
    )
    return replace(_group(name, count, machine, prices, where=where), min_count=int(group.get("minReplicas", count)))
