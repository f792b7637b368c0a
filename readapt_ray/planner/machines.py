"""Define the cluster that a plan is for: node groups with their CPUs, memory, GPUs and prices.

`cluster_files.py` reads it from a file.
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
    """A group of equal nodes."""

    name: str
    count: int
    """Most nodes of the group."""
    cpus: int
    """CPUs per node."""
    memory_bytes: float
    """Memory per node."""
    gpu: str = ""
    """Kind of GPU, by its name in the price table; empty without GPUs."""
    gpus: int = 0
    """GPUs per node."""
    gpu_flops: float = 0.0
    """Peak FLOP per second of one GPU."""
    gpu_memory_bytes: float = 0.0
    """Memory of one GPU."""
    network_gbit: float = 10.0
    """Network between nodes, in Gbit/s."""
    usd_per_hour: float = 0.0
    """Price of one node."""
    machine_type: str = ""
    """A machine type of the price table; empty if the cluster's file has the price of its nodes."""
    is_spot: bool = False
    """Whether its nodes are spot instances; `usd_per_hour` is then the spot price."""
    min_count: int | None = None
    """Number of nodes that are always up; None for all of them."""
    has_bfloat16_units: bool = False
    """Whether its CPUs are known to have matrix units for bfloat16."""
    packed_dtypes: frozenset[str] = frozenset({"float32", "bfloat16"})
    """Data types in which encoding keeps a packed copy of the weights; both if the CPUs are unknown."""

    @property
    def num_always_up(self) -> int:
        """Return the number of nodes that are up for the whole run; only groups with GPUs are scaled down."""
        return self.count if self.min_count is None or not self.gpus else min(self.count, self.min_count)

    def share_bytes(self, cpus: int) -> float:
        """Return the bytes of memory per task, if tasks of `cpus` CPUs each fill a node.

        30% of the node's memory is left out, for Ray's object store. A task with more CPUs than the node gets all.
        """
        return self.memory_bytes * (1 - _OBJECT_STORE_SHARE) / max(1, self.cpus // cpus)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The nodes of a cluster, with all groups at their largest size."""

    name: str
    groups: tuple[NodeGroup, ...]
    idle_timeout_s: float = 300.0
    """Seconds that an idle node stays up, and is paid for, before the autoscaler removes it."""
    unfilled: str = ""
    """A sentence that names placeholders (in capitals) left in the cluster's file; empty if there are none."""

    @property
    def num_gpus(self) -> int:
        """Return the number of GPUs of all nodes."""
        return sum(group.count * group.gpus for group in self.groups)

    @property
    def num_cpus(self) -> int:
        """Return the number of CPUs of all nodes."""
        return sum(group.count * group.cpus for group in self.groups)

    @property
    def num_always_up_cpus(self) -> int:
        """Return the number of CPUs of the nodes that are up while no stage needs GPUs; all CPUs if there are none."""
        return sum(group.num_always_up * group.cpus for group in self.groups) or self.num_cpus

    @property
    def num_nodes(self) -> int:
        """Return the number of nodes."""
        return sum(group.count for group in self.groups)

    @property
    def num_nodes_with_cpus(self) -> int:
        """Return the number of nodes that run tasks: all but a head with `num-cpus: 0`; all nodes if none has CPUs."""
        return sum(group.count for group in self.groups if group.cpus) or self.num_nodes

    @property
    def usd_per_hour(self) -> float:
        """Return the price of the whole cluster, at its largest size, in USD per hour."""
        return sum(group.count * group.usd_per_hour for group in self.groups)

    @property
    def always_up_usd_per_hour(self) -> float:
        """Return the price in USD per hour of the nodes that are up for the whole run."""
        return sum(group.num_always_up * group.usd_per_hour for group in self.groups)

    @property
    def has_spot(self) -> bool:
        """Return whether some nodes are spot instances."""
        return any(group.is_spot for group in self.groups)

    def on_demand(self, prices: PriceTable) -> "Cluster":
        """Return a copy of the cluster whose spot nodes cost the price on demand; other groups keep their price."""
        groups = (
            replace(group, usd_per_hour=prices.machines[group.machine_type].on_demand, is_spot=False)
            if group.is_spot
            else group
            for group in self.groups
        )
        return replace(self, groups=tuple(groups))

    @property
    def autoscaled_usd_per_hour(self) -> float:
        """Return the price in USD per hour of the nodes that are up only while GPUs are needed."""
        return self.usd_per_hour - self.always_up_usd_per_hour

    def usd_per_hour_of(self, stage: str) -> float:
        """Return the price in USD per hour of the nodes that are up while a stage runs.

        These are all nodes for train, finetune, embed and tune; else only nodes that are always up.
        """
        return self.always_up_usd_per_hour + (self.autoscaled_usd_per_hour if stage in _GPU_STAGES else 0.0)

    @property
    def gpu_groups(self) -> tuple[NodeGroup, ...]:
        """Return the groups that have GPUs, in the order of the cluster's file; empty without GPUs."""
        return tuple(group for group in self.groups if group.gpus and group.count)

    @property
    def largest(self) -> NodeGroup:
        """Return the group whose nodes have the most memory, among groups with CPUs (all groups, if none has CPUs)."""
        return max(self.groups, key=lambda group: (group.cpus > 0, group.memory_bytes))

    @property
    def largest_always_up(self) -> NodeGroup:
        """Return the group whose nodes have the most memory, among groups that are up while no stage needs GPUs.

        If there is none, it is the same as `largest`.
        """
        return max(
            self.groups, key=lambda group: (group.num_always_up * group.cpus > 0, group.cpus > 0, group.memory_bytes)
        )

    def computes_in_16_bits(self, dtype: str) -> bool:
        """Return whether a model computes in bfloat16 or float16 on this cluster.

        Args:
            dtype: option of a stage. `auto` does if the cluster has GPUs, or if all its CPUs are known to have bfloat16
                units. Of the other types, all but float32 do.
        """
        if dtype == "auto":
            return bool(self.num_gpus) or all(group.has_bfloat16_units for group in self.groups)
        return dtype != "float32"

    def room(self, cpus: int, num_workers: int | None) -> tuple[float, str]:
        """Return the bytes of memory that a worker may use, and the name of the GPU or node group that limits them.

        With GPUs it is the usable memory of the smallest GPU, and the arguments do not matter. Without, it is a
        worker's share of a node of the largest group, without Ray's object store.

        Args:
            cpus: CPUs per worker.
            num_workers: number of workers, spread evenly over the nodes; None for as many as fit.
        """
        if self.gpu_groups:
            smallest = min(self.gpu_groups, key=lambda group: group.gpu_memory_bytes)
            return smallest.gpu_memory_bytes * hardware.GPU_USABLE_SHARE, f"one {smallest.gpu}"
        group = self.largest
        on_a_node = max(1, group.cpus // cpus)
        if num_workers:
            on_a_node = min(on_a_node, -(-num_workers // self.num_nodes_with_cpus))
        return group.memory_bytes * (1 - _OBJECT_STORE_SHARE) / on_a_node, group.name

    def describe(self) -> str:
        """Return one line of text with the groups, their sizes and prices."""
        parts = []
        for group in self.groups:
            gpus = f", {group.gpus} x {group.gpu}" if group.gpus else ""
            count = f"{group.num_always_up} to {group.count}" if group.num_always_up < group.count else f"{group.count}"
            parts.append(
                f"{count} x {group.name} ({group.cpus} CPUs, {group.memory_bytes / _GB:.0f} GB{gpus}, {group.usd_per_hour:.2f} USD/h)"
            )
        return "; ".join(parts)
