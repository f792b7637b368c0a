"""What a worker must hold, part by part, and what it has: weights and optimizer exactly, activations within a factor of two.

Training's parts are those of Rajbhandari et al. (ZeRO, 2020); activations are counted from what autograd keeps in a
transformer layer.
"""

from dataclasses import dataclass
from typing import Any, Final

from readapt_ray.planner.machines import Cluster, NodeGroup
from readapt_ray.planner.shapes import ModelShape

_HIDDEN_KEPT: Final = 16
_INTERMEDIATE_KEPT: Final = 6
_PROCESS_BYTES: Final = {"CPU": 900_000_000, "GPU": 1_300_000_000}
_LOSS_BYTES: Final = {"CPU": 16_000_000, "GPU": 800_000_000}
_OBJECT_STORE_SHARE: Final = 0.3
_USABLE_SHARE: Final = 0.94
"""Of a GPU's memory; the rest is the driver's and fragmentation."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Of one worker."""

    parts: dict[str, float]
    available: float
    where: str
    """What `available` is of."""
    mend: str
    """What to change where it does not fit."""

    @property
    def needed(self) -> float:
        """Bytes of all parts."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether a worker can hold it."""
        return self.needed <= self.available

    def arithmetic(self) -> str:
        """The sum, part by part."""
        terms = " + ".join(f"{name} {size / 1e9:.2f}" for name, size in self.parts.items())
        return f"{terms} = {self.needed / 1e9:.2f} GB of {self.available / 1e9:.2f} GB ({self.where})"


def of_embedding(config: Any, shape: ModelShape, cluster: Cluster) -> Memory:
    """Of an embedding actor: weights, a batch's activations, a data shard."""
    width = 2 if cluster.computes_low(config.dtype) else 4
    tokens = config.batch_tokens or (16_384 if cluster.num_gpus else 1_024)
    available, where, kind = _room(cluster, config.num_cpus_per_worker or 1, config.num_workers)
    return Memory(
        parts={
            "weights": float(shape.num_parameters * width),
            "activations": float(tokens * width * (8 * shape.hidden + 3 * shape.intermediate)),
            "process": float(_PROCESS_BYTES[kind]),
        },
        available=available,
        where=where,
        mend="lower embed.batch_tokens, set embed.dtype to bfloat16, or take a larger GPU"
        if kind == "GPU"
        else "lower embed.num_workers, set embed.dtype to bfloat16, or take nodes with more memory",
    )


def of_training(config: Any, shape: ModelShape, cluster: Cluster, num_workers: int) -> Memory:
    """Of a training worker."""
    is_full = config.method == "full"
    head = shape.hidden * shape.vocabulary
    everything = shape.num_parameters + head
    trained = everything if is_full else shape.adapter_parameters(tuple(config.target_modules), config.lora_rank)
    frozen = 0 if is_full else everything
    width = 2 if cluster.computes_low(config.dtype) else 4
    stage = config.zero_stage
    tokens = max(config.micro_batch_tokens, config.block_tokens)
    layer = tokens * width * (_HIDDEN_KEPT * shape.hidden + _INTERMEDIATE_KEPT * shape.intermediate)
    recomputes = bool(getattr(config, "gradient_checkpointing", False))
    activations = shape.num_layers * tokens * shape.hidden * width + layer if recomputes else shape.num_layers * layer
    each = config.num_cpus_per_worker or (1 if cluster.num_gpus else max(1, cluster.num_cpus // max(1, num_workers)))
    available, where, kind = _room(cluster, each, num_workers)
    return Memory(
        parts={
            "frozen weights": float(frozen * width / (num_workers if stage >= 3 else 1)),
            "trained weights": 4.0 * trained / (num_workers if stage >= 3 else 1),
            "gradients": 4.0 * trained / (num_workers if stage >= 2 else 1),
            "optimizer": (8.0 if stage == 0 else 12.0) * trained / (num_workers if stage >= 1 else 1),
            "activations": float(activations),
            "loss": float(_LOSS_BYTES[kind]),
            "process": float(_PROCESS_BYTES[kind]),
        },
        available=available,
        where=where,
        mend="lower train.micro_batch_tokens (it bounds memory, not the result), raise train.zero_stage with more workers, or take "
        + ("a larger GPU" if kind == "GPU" else "nodes with more memory"),
    )


def of_indexing(shard_bytes: float, cluster: Cluster, largest_shard: float) -> Memory:
    """Of an indexing task: about three times its shard."""
    group = cluster.largest
    return Memory(
        parts={"shard": 3.0 * min(shard_bytes, largest_shard), "process": 3e8},
        available=group.memory_bytes * (1 - _OBJECT_STORE_SHARE) / max(1, group.cpus),
        where=f"a CPU's share of {group.name}",
        mend="lower index.rows_per_shard, or take nodes with more memory a CPU",
    )


def _room(cluster: Cluster, cpus: int, num_workers: int | None) -> tuple[float, str, str]:
    """Bytes that a worker may take, what that is of, and its kind of device."""
    if cluster.gpu_groups:
        smallest = min(cluster.gpu_groups, key=lambda group: group.gpu_memory_bytes)
        return smallest.gpu_memory_bytes * _USABLE_SHARE, f"one {smallest.gpu}", "GPU"
    group = cluster.largest
    return (
        group.memory_bytes * (1 - _OBJECT_STORE_SHARE) / _on_a_node(group, cpus, num_workers, cluster),
        group.name,
        "CPU",
    )


def _on_a_node(group: NodeGroup, cpus: int, num_workers: int | None, cluster: Cluster) -> int:
    most = max(1, group.cpus // cpus)
    return min(most, -(-num_workers // cluster.num_nodes)) if num_workers else most
