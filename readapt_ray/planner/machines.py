"""Describe the cluster that a plan is for: node groups with their CPUs, memory, GPUs and price.

`cluster_files.py` reads it.
"""

from dataclasses import dataclass, replace
from typing import Final

from readapt_ray import hardware
from readapt_ray.planner.prices import PriceTable

_GB: Final = 1_000_000_000
_OBJECT_STORE_SHARE: Final = 0.3
"""Share of a node's memory that Ray sets aside for its object store."""
_GPU_STAGES: Final = ("train", "finetune", "embed", "tune")


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
    packed_dtypes: frozenset[str] = frozenset({"float32", "bfloat16"})
    """Types in which encoding may keep a packed copy of the weights; both where the CPUs are not known."""

    @property
    def num_lasting(self) -> int:
        """Nodes that are up for the whole run; only groups with GPUs are scaled down during it."""
        return self.count if self.min_count is None or not self.gpus else min(self.count, self.min_count)

    def share_bytes(self, cpus: int) -> float:
        """Return the memory in bytes of each of as many tasks with so many CPUs as a node holds, without Ray's object store."""
        return self.memory_bytes * (1 - _OBJECT_STORE_SHARE) / max(1, self.cpus // cpus)


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
    def num_nodes_with_cpus(self) -> int:
        """Number of nodes that take tasks: not the head of `num-cpus: 0`."""
        return sum(group.count for group in self.groups if group.cpus) or self.num_nodes

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
        """The group whose nodes have the most memory, of those that take tasks."""
        return max(self.groups, key=lambda group: (group.cpus > 0, group.memory_bytes))

    @property
    def largest_lasting(self) -> NodeGroup:
        """The same of the nodes that are up while no stage needs GPUs."""
        return max(
            self.groups, key=lambda group: (group.num_lasting * group.cpus > 0, group.cpus > 0, group.memory_bytes)
        )

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
            return smallest.gpu_memory_bytes * hardware.GPU_USABLE_SHARE, f"one {smallest.gpu}"
        group = self.largest
        on_a_node = max(1, group.cpus // cpus)
        if num_workers:
            on_a_node = min(on_a_node, -(-num_workers // self.num_nodes_with_cpus))
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
