"""Compute the cost of a run from how long each node is up.

A group's `min_workers` nodes are up for the whole run. Further nodes start when a stage needs GPUs, as many as it has
workers, which takes minutes. They end after some idle minutes. All of this time is paid for. Stages that run at the
same time take the time of the longer one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from readapt_ray.planner.estimates import StageEstimate
from readapt_ray.planner.machines import Cluster

START_S: Final = 300.0
"""Seconds from the request for a GPU node until it works: the machine boots, pulls an image of 10 GB, joins."""
Duration = Callable[[StageEstimate], float]
"""Function that returns one of a stage's three durations: low_s, seconds or high_s."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Time and cost of several stages."""

    seconds: float
    """Time until the last stage ends, with the minutes in which GPU nodes start."""
    usd: float
    waiting_usd: float
    """Part of `usd` that GPU nodes cost while they start or are idle."""


def rounds(stages: Sequence[StageEstimate]) -> list[list[StageEstimate]]:
    """Return the stages in the order in which they run; stages that run at the same time form one list."""
    found: list[list[StageEstimate]] = []
    for each in stages:
        if found and found[-1][-1].is_beside_next:
            found[-1].append(each)
        else:
            found.append([each])
    return found


def cost_of(stages: Sequence[StageEstimate], cluster: Cluster, duration: Duration) -> Cost:
    """Compute the time and cost of stages on a cluster; autoscaled GPU nodes start when a stage needs them.

    Args:
        stages: estimates in the order in which they run.
        cluster: the cluster.
        duration: which duration of each stage counts, such as `lambda stage: stage.seconds`.
    """
    idle_s = cluster.idle_timeout_s
    total_s = working_s = waiting_s = 0.0  # working_s: seconds that all GPU nodes work; half of them count half
    gpu_stage_end_s: float | None = None
    """End of the last stage with GPUs, in seconds from the start of the run."""
    for each in rounds(stages):
        gpu_s = max(_gpu_seconds(stage, duration) for stage in each)
        if gpu_s:
            gap_s = float("inf") if gpu_stage_end_s is None else total_s - gpu_stage_end_s
            waiting_s += gap_s if gap_s <= idle_s else START_S + (0.0 if gpu_stage_end_s is None else idle_s)
            if gap_s > idle_s and cluster.autoscaled_usd_per_hour:
                total_s += START_S
        if gpu_s:
            working_s += gpu_s * max(_share_up(stage, cluster) for stage in each)
            gpu_stage_end_s = total_s + gpu_s
        total_s += max(duration(stage) for stage in each)
    waiting_s += 0.0 if gpu_stage_end_s is None else idle_s
    waiting_usd = cluster.autoscaled_usd_per_hour * waiting_s / 3600
    return Cost(
        seconds=total_s,
        usd=(cluster.always_up_usd_per_hour * total_s + cluster.autoscaled_usd_per_hour * working_s) / 3600
        + waiting_usd,
        waiting_usd=waiting_usd,
    )


def stage_usd(stage: StageEstimate, cluster: Cluster) -> float:
    """Return the cost in USD of one stage, for its expected time.

    It counts the nodes that are always up, and the GPU nodes that the stage uses; not GPU nodes that start or are idle.
    """
    autoscaled = cluster.autoscaled_usd_per_hour * _share_up(stage, cluster)
    gpu_s = _gpu_seconds(stage, lambda each: each.seconds)
    return (stage.seconds * cluster.always_up_usd_per_hour + gpu_s * autoscaled) / 3600


def _gpu_seconds(stage: StageEstimate, duration: Duration) -> float:
    """Return the seconds for which a stage uses GPUs."""
    return duration(stage) if stage.needs_gpus else min(stage.first_gpus_s, duration(stage))


def _share_up(stage: StageEstimate, cluster: Cluster) -> float:
    """Return the share of the GPU nodes that a stage asks for."""
    asked = stage.workers if stage.needs_gpus else stage.first_gpus
    return min(1.0, asked / cluster.num_gpus) if cluster.num_gpus else 0.0
