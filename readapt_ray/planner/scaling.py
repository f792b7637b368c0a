"""Plan the same run at other sizes: time and cost, and what breaks first as the corpus or the cluster grows.

Both use the estimates of the stages, so the table of other sizes and the limits agree. A limit is a number of passages
or workers from which something that does not grow with the cluster is the bottleneck: the process that ingests, the
driver's memory, the number of files, the batch, a flat scan.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd, inf
from typing import Any, Final

from readapt_ray.planner import index_stages, stages
from readapt_ray.planner.cost import cost_of
from readapt_ray.planner.estimates import Setting, StageEstimate
from readapt_ray.planner.machines import Cluster, NodeGroup
from readapt_ray.progress import amount
from readapt_ray.recipes.chain import Step, by_stage, runs_beside_next
from readapt_ray.training.step_size import MIN_STEPS, TOKENS_PER_WORKER

PASSAGES: Final = (10_000, 100_000, 1_000_000, 10_000_000, 100_000_000, 1_000_000_000)
WORKERS: Final = (1, 8, 64, 256, 1000)

_DAY_S: Final = 86_400
_ID_BYTES: Final = {"none": 48, "exact": 126, "auto": 126, "near": 4096}
"""Bytes per passage that ingest holds in one process, by option `deduplicate` (stages/ingest.py)."""
_MAX_FILES: Final = 100_000
_SCANNED_PER_S: Final = 2.5e9
"""Vector components per second that a flat scan compares on eight CPUs, for any storage type."""
_SHARE_OF_MEMORY: Final = 0.7
_LONG_SCAN_S: Final = 1.0
_MOST_PASSAGES: Final = 1e13
_MANY_PASSAGES: Final = 1_000_000_000
_PRECISION: Final = 1.001


@dataclass(frozen=True)
class Limit:
    """A size from which something that does not grow with the cluster is the bottleneck."""

    at: float
    """Number of passages or workers."""
    what: str
    """What happens above this size."""
    advice: str
    """What to change."""
    stage: str = ""
    """Artifact that cannot be made above this size; empty if it only takes longer."""


def scaled(cluster: Cluster, workers: int) -> Cluster:
    """Return the cluster with this many GPUs, or nodes if it has no GPU.

    GPUs come in whole nodes of the first GPU group, or in equal parts of such nodes (12 GPUs of nodes with 8: three
    halves of a node). Other GPU groups are left out; groups without GPUs stay. Without GPUs, nodes are those of the
    largest group, and heads that take no tasks stay; other groups are left out.
    """
    if not cluster.gpu_groups:
        heads = (group for group in cluster.groups if not group.cpus)
        return replace(cluster, groups=(replace(cluster.largest, count=workers), *heads))
    fast = cluster.gpu_groups[0]
    gpus = gcd(fast.gpus, workers)
    share = gpus / fast.gpus
    one = replace(
        fast,
        count=workers // gpus,
        gpus=gpus,
        cpus=max(1, int(fast.cpus * share)),
        memory_bytes=fast.memory_bytes * share,
        usd_per_hour=fast.usd_per_hour * share,
        min_count=None if fast.min_count is None else min(fast.min_count * fast.gpus, workers) // gpus,
    )
    return replace(cluster, groups=(one, *(group for group in cluster.groups if not group.gpus)))


def estimates(steps: Sequence[tuple[str, Step]], setting: Setting) -> list[StageEstimate]:
    """Estimate every stage of a run, in order, without stages that have nothing to do.

    Args:
        steps: the steps of the run, with the folder of each one's artifact under the root.
        setting: corpus, cluster, rates and models of the plan.
    """
    found = []
    for position, (name, step) in enumerate(steps):
        estimate = stages.estimate_stage(step, name, setting)
        if estimate is not None:
            beside = bool(setting.cluster.num_gpus) and runs_beside_next([each for _, each in steps], position)
            found.append(replace(estimate, is_beside_next=beside))
    return found


@dataclass(frozen=True)
class Cell:
    """Expected time and cost of a run with some number of passages on some number of workers."""

    seconds: float
    usd: float


def grid(steps: Sequence[tuple[str, Step]], setting: Setting) -> dict[int, dict[int, Cell]]:
    """Estimate the run for each number of PASSAGES on each number of WORKERS (GPUs, or nodes without GPUs).

    Args:
        steps: as in `estimates`.
        setting: the plan's own corpus and cluster, which are scaled.

    Returns:
        Expected time and cost, by number of passages, then by number of workers.
    """
    return {size: {workers: _cell(steps, setting, size, workers) for workers in WORKERS} for size in PASSAGES}


def _cell(steps: Sequence[tuple[str, Step]], setting: Setting, num_passages: int, workers: int) -> Cell:
    cluster = scaled(setting.cluster, workers)
    found = estimates(steps, replace(setting, cluster=cluster, corpus=setting.corpus.with_num_passages(num_passages)))
    cost = cost_of(found, cluster, lambda stage: stage.seconds)
    return Cell(cost.seconds, cost.usd)


def passage_limits(steps: Sequence[tuple[str, Step]], setting: Setting) -> list[Limit]:
    """Return what breaks as the corpus grows, in ascending order of passages.

    Limits that the corpus has already passed are included; limits that no size reaches are left out. The arguments are
    as in `estimates`.
    """
    configs = by_stage(step for _, step in steps)
    train, corpus, cluster = configs["train"], setting.corpus, setting.cluster
    rate = setting.rates.rate_of("ingest", "CPU", 0, is_16_bit=False).value
    id_bytes = _ID_BYTES[configs["ingest"].deduplicate]
    is_split = corpus.num_parts != 1
    readers = stages.ingest_workers(corpus.with_num_passages(_MANY_PASSAGES), cluster)
    head_bytes = _head(cluster).memory_bytes
    rows = stages.embed_rows(configs["embed"], replace(setting, corpus=replace(corpus, num_passages=_MANY_PASSAGES)))
    limits = [
        Limit(
            _DAY_S * readers * rate / corpus.text_bytes,
            f"ingest takes over a day on {readers:,} CPUs" if is_split else "ingest is one process: over a day",
            "more CPU nodes" if is_split else "split the source, and ingest its parts side by side",
        ),
        Limit(
            inf if is_split else _SHARE_OF_MEMORY * head_bytes / id_bytes,
            f"ingest holds {id_bytes} bytes per passage: over the head node's memory ({head_bytes / 1e9:.0f} GB)",
            "--deduplicate none, a larger head node, or cut the source into parts",
            "corpus",
        ),
        Limit(
            float(rows * _MAX_FILES),
            f"over {_MAX_FILES:,} files of vectors: object listing and Ray Data's bookkeeping take minutes",
            "a larger embed.rows_per_shard",
        ),
        *_flat_index_limits(configs["index"], setting),
    ]
    if (at := _passages_of_a_week(*_named(steps, "train"), setting)) is not None:
        what = f"training on every passage once takes over a week (batch of {train.batch_size})"
        limits.append(Limit(at, what, "train on a sample, or raise train.batch_size with train.num_workers"))
    return sorted((limit for limit in limits if limit.at < inf), key=lambda limit: limit.at)


def _passages_of_a_week(step: Step, name: str, setting: Setting) -> float | None:
    """Return the number of passages that take a week to train on; None if no number does.

    It is found by search over estimates, because time is not proportional to passages: a small corpus spends most of it
    on the start, and does not use all workers.
    """

    def is_long(num_passages: float) -> bool:
        found = stages.estimate_stage(
            step, name, replace(setting, corpus=setting.corpus.with_num_passages(round(num_passages)))
        )
        return found is not None and found.seconds > 7 * _DAY_S

    low, high = 1.0, 2.0
    while not is_long(high):
        low, high = high, 2 * high
        if high > _MOST_PASSAGES:
            return None
    while high / low > _PRECISION:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if is_long(middle) else (middle, high)
    return high


def _flat_index_limits(index: Any, setting: Setting) -> list[Limit]:
    """Return the limits of a flat index, whose vectors are neither compressed nor searched approximately."""
    cluster = setting.cluster
    flat = index_stages.index_bytes(index, setting)["flat"] / setting.corpus.num_passages
    scanned = _SCANNED_PER_S * max(1, cluster.num_cpus / 8)
    return [
        Limit(
            _SHARE_OF_MEMORY * cluster.largest.memory_bytes / flat,
            f"a flat index ({flat:,.0f} bytes per vector) is over the largest node's memory",
            "a compressed kind of index, or serve its shards from several nodes",
        ),
        Limit(
            _LONG_SCAN_S * scanned / setting.dimension,
            "a flat scan of all vectors takes over a second for each batch of queries",
            "an approximate kind of index, or more CPUs",
        ),
    ]


def worker_limits(steps: Sequence[tuple[str, Step]], setting: Setting) -> list[Limit]:
    """Return why a larger cluster is no faster, in ascending order of workers (GPUs, or nodes without GPUs).

    Numbers of workers are tried up to 1,000. The arguments are as in `estimates`.
    """
    configs = by_stage(step for _, step in steps)
    many = scaled(setting.cluster, max(WORKERS))
    limits = [_batch_limit(configs["train"], setting, many)]
    shards = stages.embed_workers(
        configs["embed"].model_copy(update={"num_workers": None}), replace(setting, cluster=many)
    )
    if shards < many.num_gpus or not setting.cluster.num_gpus:
        what = f"embed has {amount(shards, 'data shards')}: more actors have nothing to do"
        limits.append(Limit(float(shards), what, "lower embed.rows_per_shard"))
    limits += _stuck(steps, setting)
    return sorted(limits, key=lambda limit: limit.at)


def _batch_limit(train: Any, setting: Setting, many: Cluster) -> Limit:
    """Return the limit on workers that a training step has work for."""
    step = stages.train_step_size(train.model_copy(update={"num_workers": None}), setting.corpus, many)
    if train.batch_size == "auto":
        what = f"a run takes {MIN_STEPS} steps of {TOKENS_PER_WORKER:,} tokens per worker: more workers stay out of training"
        return Limit(float(step.num_workers), what, "train on more passages or epochs")
    what = f"train shares out batch_size = {step.batch_size} blocks a step: more workers have nothing to do"
    advice = "raise train.batch_size (it changes the result), or train on fewer GPUs than you embed with"
    return Limit(float(step.batch_size), what, advice)


def _stuck(steps: Sequence[tuple[str, Step]], setting: Setting) -> list[Limit]:
    """Return the number of workers from which most of the time goes to stages that more workers do not speed up."""
    kind = "GPUs" if setting.cluster.num_gpus else "nodes"
    alone = estimates(steps, replace(setting, cluster=scaled(setting.cluster, 1)))
    for workers in WORKERS[1:]:
        found = estimates(steps, replace(setting, cluster=scaled(setting.cluster, workers)))
        stuck = [each for each, one in zip(found, alone, strict=True) if each.seconds > 0.9 * one.seconds]
        if sum(each.seconds for each in stuck) > 0.5 * sum(each.seconds for each in found):
            what = (
                f"over half of the time goes to stages that get no faster ({', '.join({s.stage: None for s in stuck})})"
            )
            advice = f"give the run fewer {kind}, or run stages apart on clusters of their own size"
            return [Limit(float(workers), what, advice)]
    return []


def _named(steps: Sequence[tuple[str, Step]], stage: str) -> tuple[Step, str]:
    return next((step, name) for name, step in steps if step.stage == stage)


def _head(cluster: Cluster) -> NodeGroup:
    heads = [group for group in cluster.groups if "head" in group.name]
    return heads[0] if heads else cluster.largest
