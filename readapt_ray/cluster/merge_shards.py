"""Write the weight files of a merge in Ray tasks, on any node of a cluster.

In: model names that every node can open, and the plan of the files. Out: the files that did not exist yet, in a place
that every node can write to. Each task process first reads all inputs once, to check that they equal the driver's, then
the tensors of its file. For memory see `weights/export.py`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from readapt_ray.cluster import connection
from readapt_ray.cluster.bounded_tasks import run_bounded
from readapt_ray.errors import WeightMismatchError
from readapt_ray.storage import Location

if TYPE_CHECKING:
    from readapt_ray.weights.cast_loss import CastLoss
    from readapt_ray.weights.export import WeightPlan
    from readapt_ray.weights.merge_plan import MergeModels
    from readapt_ray.weights.merging import Readapter, Scales


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """The inputs that all tasks of a merge share."""

    models: "MergeModels"
    fingerprints: tuple[str, ...]
    """Fingerprints of the models, as the driver found them."""
    scales: "Scales"
    plan: "WeightPlan"
    target: Location
    """Folder of the weight files; every node must be able to write there."""
    num_threads: int
    """CPUs and threads of one task."""


def write_on_cluster(job: ShardJob, *, num_workers: int, report: Callable[[int], None]) -> "CastLoss":
    """Write the missing weight files in Ray tasks, then the index file; return what the cast to the output dtype lost.

    Args:
        job: models, scales, plan and target folder.
        num_workers: number of tasks that run at the same time.
        report: called with the number of bytes written so far.

    Raises:
        WeightMismatchError: a node finds another model under the same name.
        ModelError: an input holds NaN or infinity, or a value is too large for the output type.
    """
    import ray

    from readapt_ray.weights import export

    connection.connect()
    connection.check_seen_by_all(job.target)
    pending = [number for number, shard in enumerate(job.plan.shards) if not export.is_written(shard, job.target)]
    done = job.plan.num_bytes - sum(job.plan.shards[number].num_bytes for number in pending)
    write = ray.remote(num_cpus=job.num_threads, scheduling_strategy="SPREAD")(_write)
    shared = ray.put(job)
    for num_bytes in run_bounded(lambda number: write.remote(shared, number), pending, num_workers):
        done += num_bytes
        report(done)
    return export.finish_weights(job.plan, job.target)


def _write(job: ShardJob, number: int) -> int:
    """Write one weight file in a Ray task; return its size in bytes."""
    from readapt_ray.weights import export

    readapter = _open(job.models, job.fingerprints)
    export.write_shard(
        readapter,
        job.scales,
        job.plan,
        job.plan.shards[number],
        job.target,
        report=lambda _: None,
        num_threads=job.num_threads,
    )
    return job.plan.shards[number].num_bytes


@functools.lru_cache(maxsize=1)
def _open(models: "MergeModels", fingerprints: tuple[str, ...]) -> "Readapter":
    """Open the models on this node, and check that their content equals the driver's."""
    from readapt_ray.weights.merge_plan import plan_merge

    plan = plan_merge(models)
    other = [
        each.name for each, expected in zip(plan.sources, fingerprints, strict=True) if each.fingerprint != expected
    ]
    if other:
        raise WeightMismatchError(
            f"a node of the cluster finds another model under {other[0]!r} than the driver; give a URI, a hub id, or a folder "
            f"that all nodes share"
        )
    return plan.readapter
