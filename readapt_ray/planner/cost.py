"""Compute what a run costs: which nodes are up for how long.

Nodes of a group's `min_workers` are up for the whole run. Those above it come when a stage needs GPUs, which takes some
minutes, and end some idle minutes after the last one that did; all of it is paid for, and for as many as the stage has workers. Stages that run side by side take
the time of the longer one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from readapt_ray.planner.estimates import StageEstimate
from readapt_ray.planner.machines import Cluster

START_S: Final = 300.0
"""From the request for a GPU node until it works: the machine boots, pulls an image of 10 GB, joins."""
Duration = Callable[[StageEstimate], float]
"""Which of a stage's three durations is meant."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Time and cost of all stages for one of their durations."""

    seconds: float
    usd: float
    waiting_usd: float
    """Of `usd`, what GPU nodes cost while they start and while they are idle."""


def rounds(stages: Sequence[StageEstimate]) -> list[list[StageEstimate]]:
    """Return the stages in the order in which they run, those side by side together."""
    found: list[list[StageEstimate]] = []
    for each in stages:
        if found and found[-1][-1].is_beside_next:
            found[-1].append(each)
        else:
            found.append([each])
    return found


def cost_of(stages: Sequence[StageEstimate], cluster: Cluster, duration: Duration) -> Cost:
    """Return what stages cost on a cluster, one round after the other."""
    idle_s = cluster.idle_timeout_s
    total_s = working_s = waiting_s = 0.0  # working_s counts the seconds of all GPU nodes, of fewer in proportion
    let_go_s: float | None = None
    """When the last stage with GPUs ended."""
    for each in rounds(stages):
        gpu_s = max(_gpu_seconds(stage, duration) for stage in each)
        if gpu_s:
            gap_s = float("inf") if let_go_s is None else total_s - let_go_s
            waiting_s += gap_s if gap_s <= idle_s else START_S + (0.0 if let_go_s is None else idle_s)
            if gap_s > idle_s and cluster.growing_usd_per_hour:
                total_s += START_S
        if gpu_s:
            working_s += gpu_s * max(_share_up(stage, cluster) for stage in each)
            let_go_s = total_s + gpu_s
        total_s += max(duration(stage) for stage in each)
    waiting_s += 0.0 if let_go_s is None else idle_s
    waiting_usd = cluster.growing_usd_per_hour * waiting_s / 3600
    return Cost(
        seconds=total_s,
        usd=(cluster.lasting_usd_per_hour * total_s + cluster.growing_usd_per_hour * working_s) / 3600 + waiting_usd,
        waiting_usd=waiting_usd,
    )


def stage_usd(stage: StageEstimate, cluster: Cluster) -> float:
    """Return the cost of the nodes that are up while a stage runs, without those that start or are idle."""
    growing = cluster.growing_usd_per_hour * _share_up(stage, cluster)
    gpu_s = _gpu_seconds(stage, lambda each: each.seconds)
    return (stage.seconds * cluster.lasting_usd_per_hour + gpu_s * growing) / 3600


def _gpu_seconds(stage: StageEstimate, duration: Duration) -> float:
    """Return for how many of its seconds a stage takes GPUs."""
    return duration(stage) if stage.needs_gpus else min(stage.first_gpus_s, duration(stage))


def _share_up(stage: StageEstimate, cluster: Cluster) -> float:
    """Return the share of the GPU nodes that a stage asks for."""
    asked = stage.workers if stage.needs_gpus else stage.first_gpus
    return min(1.0, asked / cluster.num_gpus) if cluster.num_gpus else 0.0
