"""Estimate how long training workers on several nodes wait for each other's gradients and weights.

Gradients are summed beside the last backward pass of a step (ZeRO 2: of every pass), in buckets; what does not fit beside it
is waited for, and the last bucket always is. ZeRO 3 fetches every weight beside the products of each pass. Between the GPUs
of a node this takes milliseconds, which are not counted.
"""

import math
from dataclasses import dataclass
from typing import Any, Final

from readapt_ray.catalog.shapes import ModelShape
from readapt_ray.planner.machines import Cluster

_USABLE_SHARE: Final = 0.7
"""Of a network's nominal rate, what sums over TCP reach."""
_FORWARD_SHARE: Final = {False: 1 / 2, True: 1 / 3}
"""Of the arithmetic of both passes, the forward one: with frozen weights, and where all weights are trained."""


@dataclass(frozen=True, kw_only=True)
class Steps:
    """The steps of a training run, by what decides how long its workers wait."""

    num_steps: int
    num_workers: int
    worker_tokens: float
    """Tokens per worker and step."""
    work_s: float
    """Seconds that each worker computes in all steps."""
    num_trained: int
    """Numbers that are trained."""


def waiting_s(config: Any, shape: ModelShape, cluster: Cluster, steps: Steps) -> float:
    """Return the seconds of all steps in which workers wait for the network.

    Args:
        config: options of train.
        shape: of the model that is trained.
        cluster: its nodes.
        steps: of the run.
    """
    num_nodes = _num_nodes(cluster, steps.num_workers)
    if num_nodes == 1:
        return 0.0
    from readapt_ray.training.gradients import BUCKET_BYTES

    num_passes: int = math.ceil(steps.worker_tokens / max(config.micro_batch_tokens, config.block_tokens))
    pass_s = steps.work_s / steps.num_steps / num_passes
    forward_s = pass_s * _FORWARD_SHARE[config.method == "full"]
    # Seconds per byte that is on one of the nodes and comes to all others.
    gbit = min(group.network_gbit for group in cluster.gpu_groups or cluster.groups)
    s_per_byte: float = (num_nodes - 1) / num_nodes / (_USABLE_SHARE * gbit * 1e9 / 8)
    scattered_s = 4 * steps.num_trained * s_per_byte
    if config.zero_stage == 3:
        fetched_s = shape.num_parameters * (2 if cluster.computes_low(config.dtype) else 4) * s_per_byte
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
    """Return the number of nodes that workers take: a worker a GPU, or a worker a node where there is none."""
    per_node = max(
        (group.gpus for group in cluster.gpu_groups), default=max(1, num_workers // cluster.num_nodes_with_cpus)
    )
    return math.ceil(num_workers / per_node)
