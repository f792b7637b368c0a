"""Estimate how long training workers on several nodes wait for gradients and weights from each other.

Gradients are summed in buckets during the last backward pass of a step (with ZeRO 2, during every one). Workers wait
for the part that takes longer than the pass, and always for the last bucket. ZeRO 3 also fetches every weight during
each pass. Transfers between the GPUs of one node take milliseconds and are not counted.
"""

import math
from dataclasses import dataclass
from typing import Any, Final

from readapt_ray.catalog.shapes import ModelShape
from readapt_ray.planner.machines import Cluster

_USABLE_SHARE: Final = 0.7
"""Share of a network's nominal rate that an all-reduce over TCP reaches."""
_FORWARD_SHARE: Final = {False: 1 / 2, True: 1 / 3}
"""Share of the FLOPs of both passes that the forward pass takes, by whether all weights are trained."""


@dataclass(frozen=True, kw_only=True)
class Steps:
    """The figures of a training run that decide how long its workers wait."""

    num_steps: int
    num_workers: int
    """Workers that have blocks to train on."""
    worker_tokens: float
    """Tokens per worker and step."""
    work_s: float
    """Seconds that each worker computes, over all steps."""
    num_trained: int
    """Number of trained parameters."""


def waiting_s(config: Any, shape: ModelShape, cluster: Cluster, steps: Steps) -> float:
    """Estimate the seconds that workers wait for the network, over all steps; 0.0 if they are all on one node.

    Args:
        config: options of train.
        shape: shape of the model that is trained.
        cluster: nodes and their network; the slowest network counts.
        steps: figures of the training run.
    """
    num_nodes = _num_nodes(cluster, steps.num_workers)
    if num_nodes == 1:
        return 0.0
    from readapt_ray.training.gradients import BUCKET_BYTES

    num_passes: int = math.ceil(steps.worker_tokens / max(config.micro_batch_tokens, config.block_tokens))
    pass_s = steps.work_s / steps.num_steps / num_passes
    forward_s = pass_s * _FORWARD_SHARE[config.method == "full"]
    # Seconds to send one byte from one node to all others.
    gbit = min(group.network_gbit for group in cluster.gpu_groups or cluster.groups)
    s_per_byte: float = (num_nodes - 1) / num_nodes / (_USABLE_SHARE * gbit * 1e9 / 8)
    scattered_s = 4 * steps.num_trained * s_per_byte
    if config.zero_stage == 3:
        fetched_s = shape.num_parameters * (2 if cluster.computes_in_16_bits(config.dtype) else 4) * s_per_byte
        num_forward = 2 if config.gradient_checkpointing else 1
        waited_s: float = num_forward * max(0.0, fetched_s - forward_s)
        waited_s += max(0.0, fetched_s + scattered_s - (pass_s - forward_s))
        return steps.num_steps * num_passes * waited_s
    last_bucket_s = 2 * min(BUCKET_BYTES, 4 * steps.num_trained) * s_per_byte
    left_s: float = max(last_bucket_s, 2 * scattered_s - (pass_s - forward_s))
    if config.zero_stage:
        left_s = scattered_s + left_s * (num_passes if config.zero_stage == 2 else 1)
    return steps.num_steps * left_s


def _num_nodes(cluster: Cluster, num_workers: int) -> int:
    """Return the number of nodes that workers use: one worker per GPU, or one per node without GPUs."""
    per_node = max(
        (group.gpus for group in cluster.gpu_groups), default=max(1, num_workers // cluster.num_nodes_with_cpus)
    )
    return math.ceil(num_workers / per_node)
