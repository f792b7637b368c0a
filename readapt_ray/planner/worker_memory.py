"""Estimate the memory that one worker of a stage needs and has; for training it is the estimate of its own check."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from readapt_ray.catalog import retrievers
from readapt_ray.catalog.shapes import ModelShape
from readapt_ray.cluster.optimization import adapter_shape, worker_setup
from readapt_ray.cluster.placement import Placement
from readapt_ray.planner.machines import Cluster, NodeGroup
from readapt_ray.retrieval.encoder_sizes import (
    CPU_BATCH_TOKENS,
    activation_bytes,
    encoders_per_gpu,
    free_for_batches,
    gpu_batch_tokens,
    resident_bytes,
)

if TYPE_CHECKING:
    from readapt_ray.training.dora import AdapterShape


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory that one worker needs and has, in bytes."""

    parts: dict[str, float]
    """Bytes needed, by part."""
    available: float
    """Bytes that the worker may use."""
    where: str
    """Name of the GPU or node that the memory belongs to."""
    advice: str
    """What to change if it does not fit."""
    is_checked: bool = True
    """Whether the stage refuses to start if it does not fit."""

    @property
    def needed(self) -> float:
        """Return the sum of all parts in bytes."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Return whether a worker has enough memory."""
        return self.needed <= self.available

    def arithmetic(self) -> str:
        """Format the sum of the parts: "weights 14.48 + process 0.60 = 15.08 GB of 72.00 GB (one H100)"."""
        terms = " + ".join(f"{name} {size / 1e9:.2f}" for name, size in self.parts.items())
        return f"{terms} = {self.needed / 1e9:.2f} GB of {self.available / 1e9:.2f} GB ({self.where})"


def train_adapter(config: Any, shape: ModelShape) -> "AdapterShape | None":
    """Return the adapter that train would make; None if all weights are trained (`method` full).

    Args:
        config: options of train.
        shape: shape of the pretrained model; its family decides the layers if `target_modules` is not set.

    Raises:
        ModelError: the options name no layers, and none are known for the model's family.
    """
    targets = tuple(config.target_modules)
    if config.method != "full" and not targets:
        targets = retrievers.target_modules(shape.model_type)
    return adapter_shape(config, targets)


def train_memory(config: Any, shape: ModelShape, cluster: Cluster, num_workers: int) -> Memory:
    """Estimate the memory of a training worker, as training does before it starts.

    Args:
        config: options of train.
        shape: shape of the pretrained model.
        cluster: the cluster of the plan.
        num_workers: number of training workers, over all nodes.

    Raises:
        ModelError: as in `train_adapter`.
    """
    import torch

    from readapt_ray.training import memory

    is_16_bit = cluster.computes_in_16_bits(config.dtype)
    setup = worker_setup(
        config,
        train_adapter(config, shape),
        num_workers=num_workers,
        micro_batch_tokens=max(config.micro_batch_tokens, config.block_tokens),
        dtype=torch.bfloat16 if is_16_bit else torch.float32,
        device_type="cuda" if cluster.num_gpus else "cpu",
    )
    cpus = config.num_cpus_per_worker or (1 if cluster.num_gpus else max(1, cluster.num_cpus // max(1, num_workers)))
    available, where = cluster.room(cpus, num_workers)
    larger = "a larger GPU" if cluster.num_gpus else "nodes with more memory"
    smaller = memory.advice_that_fits(shape, setup, available, section="train.") or "set train.gradient_checkpointing"
    return Memory(
        parts={name: float(size) for name, size in memory.estimate_memory(shape, setup).parts.items()},
        available=available,
        where=where,
        advice=f"lower train.micro_batch_tokens (it bounds memory, not the result), {smaller}, raise "
        f"train.zero_stage with more workers, or take {larger}",
        is_checked=config.check_memory,
    )


def gpu_share(config: Any, shape: ModelShape, cluster: Cluster) -> float:
    """Return the fraction of a GPU that an embedding actor reserves; 0 without GPUs.

    Args:
        config: options of embed.
        shape: shape of the retriever; several actors of a small model share a GPU.
        cluster: the cluster of the plan.
    """
    placement = Placement(None, None, config.num_gpus_per_worker, encoders_per_gpu(shape))
    return placement.gpu_share(cluster.num_cpus, cluster.num_gpus)


def embed_memory(config: Any, shape: ModelShape, cluster: Cluster) -> Memory:
    """Estimate the memory of an embedding actor: weights (and packed copies), the activations of a batch, the process.

    Args:
        config: options of embed.
        shape: shape of the retriever.
        cluster: the cluster of the plan.
    """
    from readapt_ray.training.memory import process_bytes

    is_16_bit = cluster.computes_in_16_bits(config.dtype)
    width = 2 if is_16_bit else 4
    available, where = cluster.room(config.num_cpus_per_worker or 1, config.num_workers)
    share = gpu_share(config, shape, cluster)
    if 0 < share < 1:
        available, where = available * share, f"{share:.2g} of {where}"
    packed_dtypes = set() if cluster.num_gpus else {name for group in cluster.groups for name in group.packed_dtypes}
    weights, copies = map(float, resident_bytes(shape, config.dtype, is_16_bit=is_16_bit, packed_dtypes=packed_dtypes))
    if cluster.num_gpus:
        free = free_for_batches(available, weights)
        tokens = config.batch_tokens or gpu_batch_tokens(shape, free, width=width, is_packed=is_16_bit)
    else:
        tokens = config.batch_tokens or CPU_BATCH_TOKENS
    return Memory(
        parts={
            "weights": weights,
            **({"packed copy of the weights": copies} if copies else {}),
            f"a batch of {tokens:,} tokens": float(tokens * activation_bytes(shape, width)),
            "process": float(process_bytes("cuda" if cluster.num_gpus else "cpu")),
        },
        available=available,
        where=where,
        advice=_embed_advice(config, share),
    )


def _embed_advice(config: Any, gpu_share: float) -> str:
    if not gpu_share:
        return "lower embed.num_workers, set embed.dtype to bfloat16, or take nodes with more memory"
    fewer = "lower embed.batch_tokens, " if config.batch_tokens else ""
    alone = "set embed.num_gpus_per_worker to 1, " if gpu_share < 1 else ""
    return f"{fewer}{alone}set embed.dtype to bfloat16, or take a larger GPU"


def index_memory(shard_bytes: float, cpus: int, group: NodeGroup) -> Memory:
    """Estimate the memory of an indexing task: its shard, a second copy while it is written, and the process.

    Args:
        shard_bytes: size of a stored shard.
        cpus: CPUs per task.
        group: nodes that the task runs on.
    """
    return Memory(
        parts={"shard": shard_bytes, "copy that is written": shard_bytes, "process": 3e8},
        available=group.share_bytes(cpus),
        where=f"a share of {cpus} {'CPU' if cpus == 1 else 'CPUs'} of {group.name}",
        advice="lower index.rows_per_shard, or take nodes with more memory per CPU",
    )
