"""Data shards through embedding actors until each has its file of vectors.

In: shards and a job. Out: a file a shard, in the job's folder. A file appears whole or not at all, with what
made it in its own footer, so the files are their own ledger: what is there is done, and a kill at any moment
costs the shards in flight.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from readapt_ray import errors
from readapt_ray.cluster import autoscaling, connection, nodes, on_worker
from readapt_ray.cluster.placement import Placement, place_actors
from readapt_ray.cluster.shard_encoder import SHARDS_AT_A_TIME, EmbedJob, ShardEncoder, pickled_shards
from readapt_ray.errors import CorruptFileError, PlacementError, WorkerError
from readapt_ray.retrieval.footers import at_once
from readapt_ray.retrieval.shard_plan import DataShard
from readapt_ray.retrieval.vector_files import Footer, read_footer

logger = logging.getLogger("readapt_ray")

_MAX_VAIN_STARTS = 3


def encode_shards(
    shards: Sequence[DataShard], job: EmbedJob, placement: Placement, progress: Callable[[int, int], None]
) -> list[Footer]:
    """Encode what has no file yet; go on with what is left when an actor dies.

    Args:
        progress: is told the passages done, and all.

    Returns:
        What each file says of itself, in the order of the shards.

    Raises:
        PlacementError: the cluster does not have what the actors ask for.
        WorkerError: it had that at first, and nodes were lost; or actors died again and again.
        CorruptFileError: files that were written are gone.
        ReadaptError: what an actor ran into.
    """
    total = sum(map(len, shards))
    footers = _written(shards, job)
    vain = 0
    has_started = False
    while pending := [shard for shard in shards if shard.name not in footers]:
        done = total - sum(map(len, pending))
        progress(done, total)
        vain += 1
        has_failed = True
        try:
            for num_rows in _results(pending, job, placement):
                vain = 0
                done += num_rows
                progress(done, total)
            has_failed = False
        except WorkerError as error:
            if vain >= _MAX_VAIN_STARTS:
                raise
            logger.warning("%s; the actors are started again for what is left", error)
        except PlacementError as error:
            if not has_started:
                raise
            raise WorkerError(f"nodes were lost, and what is written stays: {error}") from None
        has_started = True
        footers |= _written(pending, job)
        if not has_failed:
            _check_there(shards, footers, job)
    return [footers[shard.name] for shard in shards]


def _check_there(shards: Sequence[DataShard], footers: Mapping[str, Footer], job: EmbedJob) -> None:
    """See that no file of an earlier shard was removed meanwhile; one listing, no file is opened."""
    there = {name for name, _ in job.vectors.listing(".parquet")}
    lost = [shard.name for shard in shards if shard.name not in there or shard.name not in footers]
    if lost:
        raise CorruptFileError(
            f"{len(lost)} files were written to {job.vectors} and are not there, {lost[0]} first; see what removes them, "
            f"and run `readapt embed` again"
        )


def _written(shards: Sequence[DataShard], job: EmbedJob) -> dict[str, Footer]:
    """Read the footer of each shard whose file is there and is one that this job would have written."""
    there = {name for name, _ in job.vectors.listing(".parquet")}
    found = [shard for shard in shards if shard.name in there]
    footers = at_once(lambda shard: _whole_footer(shard, job), found)
    return {shard.name: footer for shard, footer in zip(found, footers, strict=True) if footer is not None}


def _whole_footer(shard: DataShard, job: EmbedJob) -> Footer | None:
    try:
        footer = read_footer(job.vectors / shard.name)
    except CorruptFileError as error:
        logger.warning("%s; it is computed again", error)
        return None
    made_by = footer.metadata.get("encoder", {}).get("fingerprint")
    num_rows = footer.num_rows + len(footer.left_out)
    return footer if num_rows == len(shard) and made_by == job.encoder["fingerprint"] else None


def _results(pending: Sequence[DataShard], job: EmbedJob, placement: Placement) -> Iterator[int]:
    """The number of passages of each shard, as it is written."""
    connection.connect()
    connection.check_seen_by_all(job.vectors)
    num_workers, num_cpus, num_gpus = place_actors(placement, len(pending))
    each = {"CPU": num_cpus, "GPU": num_gpus}
    budgets: set[int] = set()
    from ray.exceptions import RayError

    try:
        with autoscaling.requested(num_workers, each, least=1):
            pool = _pool_sizes(placement, num_workers, each, len(pending))
            for batch in _batches(pending, job, each, pool):
                for kind, message in zip(batch["error"].tolist(), batch["message"].tolist(), strict=True):
                    if kind:
                        raise getattr(errors, kind)(message)
                _tell_lowered(set(batch["batch_tokens"].tolist()) - {0}, budgets)
                yield int(batch["num_rows"].sum())
    except RayError as error:
        raise connection.cause_of(error) from None


def _pool_sizes(placement: Placement, num_workers: int, each: Mapping[str, float], num_pending: int) -> dict[str, int]:
    """Return how many actors the pool has: as many as have room now, and more when nodes come late or return.

    On one machine nothing comes, and a pool of fixed size starts all its actors at once.
    """
    if connection.connect().num_nodes == 1 and not autoscaling.may_grow(each):
        return {"size": num_workers}
    now = max(1, min(num_workers, nodes.room_for(each)))
    return {"min_size": now, "max_size": max(now, placement.num_workers or num_pending)}


def _batches(
    pending: Sequence[DataShard], job: EmbedJob, each: Mapping[str, float], pool: dict[str, int]
) -> Iterator[dict[str, Any]]:
    """What the actors say of the shards that they wrote."""
    import ray
    from ray.data import ActorPoolStrategy
    from ray.util.annotations import RayDeprecationWarning

    dataset = ray.data.from_items(pickled_shards(pending), override_num_blocks=len(pending))
    dataset.context.execution_no_progress_timeout_s = -1
    # With restarts, Ray prints a line of its own on the user's terminal. On one machine we do without, and
    # `encode_shards` starts again; on several, one lost node must not stop the actors of the others.
    restarts = {"max_restarts": 0} if "size" in pool else {}
    with warnings.catch_warnings(action="ignore", category=RayDeprecationWarning):  # Ray 2.64 needs another way
        written = dataset.map_batches(
            ShardEncoder,
            fn_constructor_args=(job, on_worker.this_node(), each["CPU"]),
            batch_size=1,
            compute=ActorPoolStrategy(
                **pool,
                max_tasks_in_flight_per_actor=SHARDS_AT_A_TIME,
                max_concurrent_calls_per_actor=SHARDS_AT_A_TIME,
                enable_true_multi_threading=True,
            ),
            num_cpus=each["CPU"],
            num_gpus=each["GPU"],
            **restarts,
        )
    yield from written.iter_batches(batch_size=None, prefetch_batches=0)


def _tell_lowered(found: set[int], told: set[int]) -> None:
    for tokens in sorted(found - told):
        logger.warning(
            "out of memory: an encoder went on with %d tokens a batch; give --batch-tokens %d next time", tokens, tokens
        )
    told |= found
