"""Hold the estimate of a stage: its work, workers, seconds, memory and bytes, and what all stages of a plan share."""

from dataclasses import dataclass
from typing import Final

from readapt_ray.catalog.shapes import ModelShape
from readapt_ray.planner.corpus import Corpus
from readapt_ray.planner.machines import Cluster
from readapt_ray.planner.rates import CPU, FIXED_S, WORK_UNITS, Rate, Rates
from readapt_ray.planner.worker_memory import Memory

LOAD_BYTES_PER_S: Final = 5e8
"""Weights from an object store or a disk to a node."""


@dataclass(frozen=True, kw_only=True)
class StageEstimate:
    """The estimate of one stage."""

    name: str
    """Folder of its artifact."""
    stage: str
    work: float
    unit: str
    workers: int
    device: str
    seconds: float
    low_s: float
    high_s: float
    out_bytes: float
    rate: Rate
    memory: Memory | None = None
    note: str = ""
    first_gpus: int = 0
    """GPUs that a search takes at first, to encode its queries."""
    first_gpus_s: float = 0.0
    """Seconds for which it takes them."""
    is_beside_next: bool = False
    """It runs at the same time as the stage after it."""
    problem: str = ""
    """Why the stage would refuse to start, memory aside."""

    @property
    def needs_gpus(self) -> bool:
        """Whether its workers take GPUs."""
        return self.device != CPU


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all stages of a plan share."""

    corpus: Corpus
    cluster: Cluster
    rates: Rates
    pretrained: ModelShape
    retriever: ModelShape
    dimension: int
    """Numbers of a vector that are kept."""
    vector_dtype: str
    """How embed stores them."""
    general: Corpus | None = None
    """The general collection, if the run measures one."""


def device_of(cluster: Cluster) -> tuple[str, float]:
    """Return the slowest GPU, for which a synchronous step waits, or a CPU."""
    if not cluster.gpu_groups:
        return CPU, 0.0
    slowest = min(cluster.gpu_groups, key=lambda group: group.gpu_flops)
    return slowest.gpu, slowest.gpu_flops


def timed(
    name: str,
    stage: str,
    work: float,
    rate: Rate,
    *,
    out_bytes: float,
    units: float = 1,
    workers: int = 1,
    device: str = CPU,
    error: float = 0.0,
    fixed_s: float = 0.0,
    floor_s: float = 0.0,
    waiting_s: float = 0.0,
    needs: Memory | None = None,
    note: str = "",
    problem: str = "",
) -> StageEstimate:
    """Return fixed seconds plus the work at so many units times the rate, never less than the floor, and the waiting."""
    fixed = FIXED_S[stage] + fixed_s
    working = max(work / (units * rate.value), floor_s) + waiting_s
    return StageEstimate(
        name=name,
        stage=stage,
        work=work,
        unit=WORK_UNITS[stage],
        workers=workers,
        device=device,
        seconds=fixed + working,
        low_s=0.5 * fixed + working * (1 - min(error, 0.9)) / rate.faster,
        high_s=2 * fixed + working * (1 + error) * rate.slower,
        out_bytes=out_bytes,
        rate=rate,
        memory=needs,
        note=note,
        problem=problem,
    )


def cpu_rate(setting: Setting, stage: str) -> Rate:
    """Return the rate of one CPU for a stage."""
    return setting.rates.of(stage, CPU, 0, is_low=False)
