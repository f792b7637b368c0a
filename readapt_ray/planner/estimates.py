"""Define the estimate of a stage (work, workers, seconds, memory, bytes) and the inputs that all stages share."""

from dataclasses import dataclass
from typing import Final

from readapt_ray.catalog.shapes import ModelShape
from readapt_ray.planner.corpus import Corpus
from readapt_ray.planner.machines import Cluster
from readapt_ray.planner.rates import CPU, FIXED_S, WORK_UNITS, Rate, Rates
from readapt_ray.planner.worker_memory import Memory

LOAD_BYTES_PER_S: Final = 5e8
"""Speed at which a node reads weights from an object store or a disk."""


@dataclass(frozen=True, kw_only=True)
class StageEstimate:
    """The estimate of one stage."""

    name: str
    """Folder of its artifact under the root."""
    stage: str
    work: float
    """Amount of work, in `unit`."""
    unit: str
    """Unit of the work, see `rates.WORK_UNITS`."""
    workers: int
    """Number that is shown before `device`: workers, or CPUs that work at the same time."""
    device: str
    """Kind of GPU that each worker uses, or `CPU`."""
    seconds: float
    """Expected time."""
    low_s: float
    """Time if all goes well: the rates are as fast as their bounds allow."""
    high_s: float
    """Time if all goes badly."""
    out_bytes: float
    """Size of its artifact."""
    rate: Rate
    """Speed of one device."""
    memory: Memory | None = None
    """Memory of one worker; None if it is not estimated."""
    note: str = ""
    first_gpus: int = 0
    """GPUs that a search uses at first, to encode its queries."""
    first_gpus_s: float = 0.0
    """Seconds for which a search uses them."""
    is_beside_next: bool = False
    """Whether it runs at the same time as the next stage."""
    problem: str = ""
    """Why the stage would refuse to start, other than memory; empty if it would start."""

    @property
    def needs_gpus(self) -> bool:
        """Return whether its workers use GPUs."""
        return self.device != CPU


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The inputs that all stages of a plan share: corpus, cluster, rates and models."""

    corpus: Corpus
    cluster: Cluster
    rates: Rates
    pretrained: ModelShape
    retriever: ModelShape
    dimension: int
    """Dimension of the stored vectors."""
    vector_dtype: str
    """Data type of the stored vectors."""
    general: Corpus | None = None
    """The general collection; None if the run does not measure one."""


def device_of(cluster: Cluster) -> tuple[str, float]:
    """Return name and peak FLOP per second of the slowest GPU, for which each training step waits; or CPU and 0."""
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
    """Return the estimate of a stage, with its time computed from work and rate.

    seconds = fixed + max(work / (units * rate), floor_s) + waiting_s. The low and high times take half and twice the
    fixed seconds, and the bounds of the rate and of the work for the rest.

    Args:
        name: folder of its artifact.
        stage: the stage.
        work: amount of work, in the unit of `rates.WORK_UNITS`.
        rate: speed of one device, with bounds.
        out_bytes: size of its artifact.
        units: number of devices that work at the same time.
        workers: number of workers to show.
        device: kind of GPU, or `CPU`.
        error: relative error of the work, such as 0.1.
        fixed_s: seconds in addition to the stage's `FIXED_S`, such as loading a model.
        floor_s: least seconds of the work.
        waiting_s: seconds that workers wait for the network.
        needs: memory of one worker; None if it is not estimated.
        note: remark for the table.
        problem: why the stage would refuse to start, besides memory; empty if it would start.
    """
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
    """Return the rate of one CPU for a stage; for train and embed it is the rate in float32."""
    return setting.rates.rate_of(stage, CPU, 0, is_16_bit=False)
