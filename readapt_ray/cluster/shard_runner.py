"""Encode data shards with Ray Data, until each shard has its file of vectors.

In: shards and a job. Out: a file per shard, in the job's folder. Tasks on any idle core read and tokenise. A pool of
actors, one per GPU, encodes and writes; it grows and shrinks with the nodes. If CPUs encode and no core is idle, the
actors tokenise. A file is written as a whole, and its footer says what made it. So a shard whose file exists is done,
and a kill at any moment costs only the shards in flight.
"""

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from readapt_ray import errors
from readapt_ray.cluster import autoscaling, connection, nodes, on_worker
from readapt_ray.cluster.embed_job import EmbedJob
from readapt_ray.cluster.placement import Placement, place_actors
from readapt_ray.cluster.shard_encoder import SHARDS_AT_A_TIME, ShardEncoder
from readapt_ray.dead_rows import share_part
from readapt_ray.errors import PlacementError, WorkerError
from readapt_ray.retrieval.footers import map_in_threads
from readapt_ray.retrieval.shard_ledger import ShardLedger, shared_figures
from readapt_ray.retrieval.shard_plan import DataShard, shard_name

logger = logging.getLogger("readapt_ray")

_MAX_VAIN_STARTS = 3
_SAVE_S = 60.0
_SHARED_CPUS = 0.1
"""CPUs that every encoder leaves to tasks that read, so that they can run if no core is idle."""


def encode_shards(
    shards: Sequence[DataShard], job: EmbedJob, placement: Placement, progress: Callable[[int, int], None]
) -> ShardLedger:
    """Encode the shards that have no file of vectors yet; restart actors that die.

    Kept files of earlier vectors are shared with the artifact. The ledger (the record of finished shards) is saved once
    per minute.

    Args:
        shards: data shards, numbered from 0.
        job: what is encoded, with which model, into which folder.
        placement: the user's options for the encoding actors.
        progress: called with the number of passages done, and of all passages.

    Returns:
        The ledger, with figures of all shards.

    Raises:
        PlacementError: the cluster has no room for the actors at the start.
        WorkerError: nodes were lost and no room is left; or actors died three times without a finished shard.
        CorruptFileError: files that were written are gone.
        ReadaptError: a task or an actor raised it.
    """
    total = sum(map(len, shards))
    ledger = shard_ledger(shards, job)
    ledger.find()
    _share_kept(ledger, job)
    vain, has_started = 0, False
    while pending := ledger.pending:
        progress(ledger.num_done, total)
        vain += 1
        try:
            for _ in _recorded(pending, job, placement, ledger):
                vain = 0
                progress(ledger.num_done, total)
            ledger.check_there()
        except WorkerError as error:
            if vain >= _MAX_VAIN_STARTS:
                raise
            logger.warning("%s; the actors are started again for what is left", error)
            ledger.find()
        except PlacementError as error:
            if not has_started:
                raise
            raise WorkerError(f"nodes were lost, and what is written stays: {error}") from None
        has_started = True
    return ledger


def shard_ledger(shards: Sequence[DataShard], job: EmbedJob) -> ShardLedger:
    """Return the ledger of a job (which shards are finished, with their figures), without a look at its files.

    No shard counts as finished before `find` is called on it.
    """
    made_by, rows_per_shard = job.encoder["fingerprint"], job.rows_per_shard
    return ShardLedger(shards, job.output, made_by=made_by, rows_per_shard=rows_per_shard, plan=job.plan)


def _share_kept(ledger: ShardLedger, job: EmbedJob) -> None:
    """Share the kept files of earlier vectors with this artifact, and record them in the ledger."""
    pending = [shard for shard in ledger.pending if shard.kept]
    if job.earlier is None or not pending:
        return
    folder = job.earlier.folder

    def share(shard: DataShard) -> None:
        assert shard.kept is not None
        share_part(folder / shard.kept.name, job.vectors, shard_name(shard.number), shard.kept.dead)
        ledger.record(shard.number, shared_figures(shard.kept, job.dimension))

    map_in_threads(share, pending)
    ledger.save()


def _recorded(pending: Sequence[DataShard], job: EmbedJob, placement: Placement, ledger: ShardLedger) -> Iterator[None]:
    """Record each shard when it is written; save the ledger once per minute, and at the end, also after an error."""
    saved_s = -_SAVE_S
    try:
        for figures in _results(pending, job, placement):
            ledger.record(figures["number"], figures)
            if time.monotonic() - saved_s > _SAVE_S:
                ledger.save()
                saved_s = time.monotonic()
            yield
    finally:
        ledger.save()


def _results(pending: Sequence[DataShard], job: EmbedJob, placement: Placement) -> Iterator[dict[str, Any]]:
    """Yield the figures of each shard when it is written."""
    connection.connect()
    connection.check_seen_by_all(job.vectors)
    num_workers, num_cpus, num_gpus = place_actors(placement, len(pending))
    each = {"CPU": num_cpus, "GPU": num_gpus}
    job = replace(job, num_threads=num_cpus, driver_node=on_worker.this_node())
    budgets: set[int] = set()
    from ray.exceptions import RayError

    try:
        with autoscaling.requested(num_workers, each, least=1):
            pool = _pool_sizes(placement, num_workers, each, len(pending))
            for figures in _stream(pending, job, each, pool):
                if figures["error"]:
                    raise getattr(errors, figures["error"])(figures["message"])
                _tell_lowered({figures["batch_tokens"]} - {0}, budgets)
                yield figures
    except RayError as error:
        raise connection.cause_of(error) from None


def _pool_sizes(placement: Placement, num_workers: int, each: Mapping[str, float], num_pending: int) -> dict[str, int]:
    """Return the size of the actor pool: as many as fit now, and more when nodes come late or return.

    One machine does not grow, so its pool has a fixed size and starts all actors at once.
    """
    if connection.connect().num_nodes == 1 and not autoscaling.may_grow(each):
        return {"size": num_workers}
    now = max(1, min(num_workers, nodes.room_for(each)))
    return {"min_size": now, "max_size": max(now, placement.num_workers or num_pending)}


def _num_idle_cores(num_encoders: int, each: Mapping[str, float]) -> int:
    """Return the number of cores that encoders leave idle."""
    return int(connection.connect().num_cpus - num_encoders * each["CPU"])


def tasks_tokenize(num_encoders: int, each: Mapping[str, float]) -> bool:
    """Return whether read tasks tokenise; otherwise the encoders do.

    If CPUs encode and none is idle, a task would take a core from them, and load the tokenizer once more.

    Args:
        num_encoders: number of encoding actors.
        each: resources of one encoding actor, by "CPU" and "GPU".
    """
    return each["GPU"] > 0 or _num_idle_cores(num_encoders, each) >= 1


def _stream(
    pending: Sequence[DataShard], job: EmbedJob, each: Mapping[str, float], pool: dict[str, int]
) -> Iterator[dict[str, Any]]:
    """Run the shards through Ray Data; yield the row that an actor returns for each shard that it wrote."""
    import ray
    from ray.data import ActorPoolStrategy
    from ray.util.annotations import RayDeprecationWarning

    from readapt_ray.cluster.shard_source import ShardSource

    num_encoders = pool.get("size") or pool["min_size"]
    reader_cpus = 1 if _num_idle_cores(num_encoders, each) >= 1 else _SHARED_CPUS
    # On several nodes, Ray restarts lost actors, so that one lost node does not stop the actors of the others. On one
    # machine `encode_shards` starts again instead, because Ray would print a line on the user's terminal.
    restarts = {"max_restarts": 0} if "size" in pool else {}
    with warnings.catch_warnings(action="ignore", category=RayDeprecationWarning):  # Ray 2.64 needs another way
        source = ShardSource(pending, replace(job, earlier=None), tokenizes=tasks_tokenize(num_encoders, each))
        shards = ray.data.read_datasource(source, num_cpus=reader_cpus)
        shards.context.execution_no_progress_timeout_s = -1
        shards.context.target_max_block_size = 1  # blocks of one row: a shard moves on as soon as it is read
        written = shards.map_batches(
            ShardEncoder,
            fn_constructor_args=(job,),
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                **pool,
                max_tasks_in_flight_per_actor=SHARDS_AT_A_TIME,
                max_concurrent_calls_per_actor=SHARDS_AT_A_TIME,
                enable_true_multi_threading=True,
            ),
            num_cpus=each["CPU"] - _SHARED_CPUS,
            num_gpus=each["GPU"],
            **restarts,
        )
    for batch in written.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from batch.to_pylist()


def _tell_lowered(found: set[int], told: set[int]) -> None:
    for tokens in sorted(found - told):
        logger.warning(
            "out of memory: an encoder continued with %d tokens per batch; give --batch-tokens %d next time",
            tokens,
            tokens,
        )
    told |= found
