"""The same run at other sizes: hours and money from 1 to 1,000 GPUs and 10K to 10G passages, and what breaks first.

Each limit is a count of passages or of workers beyond which something that does not grow with the cluster decides:
the one process that ingests, the driver's memory, the number of files, the batch, a flat scan.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from readapt_ray.planner import stages
from readapt_ray.planner.machines import Cluster, NodeGroup
from readapt_ray.planner.stages import Setting, StageEstimate
from readapt_ray.recipes.chain import Step

PASSAGES: Final = (10_000, 100_000, 1_000_000, 10_000_000, 100_000_000, 1_000_000_000, 10_000_000_000)
WORKERS: Final = (1, 8, 64, 256, 1000)

_DAY_S: Final = 86_400
_ID_BYTES: Final = {"none": 48, "exact": 96, "auto": 96, "near": 4096}
"""Bytes a passage that ingest holds, by `deduplicate` (stages/ingest.py)."""
_EMBED_DRIVER_BYTES: Final = 142
"""Bytes a passage in embed's driver: hashes of the ids, sorted, and a file's ids as text; measured over 10M passages
(benchmarks/results/bookkeeping.json)."""
_MAX_FILES: Final = 100_000
_SCAN_BYTES_A_SECOND: Final = 1e10
_SHARE_OF_MEMORY: Final = 0.7
_LONG_SCAN_S: Final = 1.0


@dataclass(frozen=True, kw_only=True)
class Limit:
    """From `at` on, `what` decides."""

    at: float
    what: str
    mend: str


@dataclass(frozen=True)
class Cell:
    """A run of one size on so many workers."""

    seconds: float
    usd: float


def scaled(cluster: Cluster, workers: int) -> Cluster:
    """The cluster with so many GPUs (nodes, where it has no GPU); other groups stay."""
    if not cluster.gpu_groups:
        return replace(cluster, groups=(replace(cluster.largest, count=workers),))
    fast = cluster.gpu_groups[0]
    one = replace(
        fast,
        count=workers,
        gpus=1,
        cpus=max(1, fast.cpus // fast.gpus),
        memory_bytes=fast.memory_bytes / fast.gpus,
        usd_per_hour=fast.usd_per_hour / fast.gpus,
    )
    return replace(cluster, groups=(one, *(group for group in cluster.groups if not group.gpus)))


def cell(steps: Sequence[tuple[str, Step]], setting: Setting, num_passages: int, workers: int) -> Cell:
    """What a run of another size takes."""
    cluster = scaled(setting.cluster, workers)
    found = estimates(steps, replace(setting, cluster=cluster, corpus=setting.corpus.of(num_passages)))
    seconds = sum(each.seconds for each in found)
    return Cell(seconds, seconds / 3600 * cluster.usd_per_hour)


def estimates(steps: Sequence[tuple[str, Step]], setting: Setting) -> list[StageEstimate]:
    """Every stage that has something to do."""
    found = (stages.estimate(step, name, setting) for name, step in steps)
    return [each for each in found if each is not None]


def passage_limits(steps: Sequence[tuple[str, Step]], setting: Setting) -> list[Limit]:
    """What breaks as the corpus grows, the first first."""
    configs: dict[str, Any] = {step.stage: step.config for _, step in steps}
    ingest, train, embed = (configs[stage] for stage in ("ingest", "train", "embed"))
    corpus, head, largest = setting.corpus, _head(setting.cluster), setting.cluster.largest
    rate = setting.rates.of("ingest", "CPU", 0, is_low=False).value
    ids = _ID_BYTES[ingest.deduplicate]
    room = _SHARE_OF_MEMORY * head.memory_bytes
    flat = 4.0 * setting.dimension
    scanned = _SCAN_BYTES_A_SECOND * max(1, setting.cluster.num_cpus / 8)
    rows = embed.rows_per_shard or 4096
    trained = stages.estimate(*_named(steps, "train"), setting)
    limits = [
        Limit(
            at=_DAY_S * rate / corpus.text_bytes,
            what="ingest is one process: over a day",
            mend="split the source, and ingest its parts side by side",
        ),
        Limit(
            at=room / ids,
            what=f"ingest holds {ids} bytes a passage: over the head node's memory ({head.memory_bytes / 1e9:.0f} GB)",
            mend="--deduplicate none, a larger head node, or parts",
        ),
        Limit(
            at=room / _EMBED_DRIVER_BYTES,
            what=f"embed's driver holds {_EMBED_DRIVER_BYTES} bytes a passage to see that no id repeats",
            mend="a larger head node, or parts",
        ),
        Limit(
            at=float(rows * _MAX_FILES),
            what=f"over {_MAX_FILES:,} files of vectors: object listing and Ray Data's bookkeeping take minutes",
            mend="embed.rows_per_shard: 65536",
        ),
        Limit(
            at=_SHARE_OF_MEMORY * largest.memory_bytes / flat,
            what=f"a flat index ({flat / 1024:.0f} KiB a vector) is over the largest node's memory",
            mend="a compressed kind of index, or serve its shards from several nodes",
        ),
        Limit(
            at=_LONG_SCAN_S * scanned / flat,
            what="a flat scan of all vectors takes over a second a batch of queries",
            mend="an approximate kind of index, or more CPUs",
        ),
    ]
    if trained is not None:
        limits.append(
            Limit(
                at=7 * _DAY_S * corpus.num_passages / max(1e-9, trained.seconds),
                what=f"training on every passage once takes over a week (batch of {train.batch_size})",
                mend="train on a sample, or raise train.batch_size with train.num_workers",
            )
        )
    return sorted(limits, key=lambda limit: limit.at)


def worker_limits(steps: Sequence[tuple[str, Step]], setting: Setting) -> list[Limit]:
    """What stops a larger cluster from being a faster one, the first first."""
    kind = "GPUs" if setting.cluster.num_gpus else "nodes"
    configs: dict[str, Any] = {step.stage: step.config for _, step in steps}
    many = replace(setting, cluster=scaled(setting.cluster, max(WORKERS)))
    shards = stages.embed_workers(
        configs["embed"].model_copy(update={"num_workers": None}), setting.corpus, many.cluster
    )
    limits = [
        Limit(
            at=float(configs["train"].batch_size),
            what=f"train shares out batch_size = {configs['train'].batch_size} blocks a step: more workers have nothing to do",
            mend="raise train.batch_size (it changes the result), or train on fewer GPUs than you embed with",
        )
    ]
    if shards < many.cluster.num_gpus or not setting.cluster.num_gpus:
        limits.append(
            Limit(
                at=float(shards),
                what=f"embed has {shards:,} data shards: more actors have nothing to do",
                mend="lower embed.rows_per_shard",
            )
        )
    alone = estimates(steps, replace(setting, cluster=scaled(setting.cluster, 1)))
    for workers in WORKERS[1:]:
        found = estimates(steps, replace(setting, cluster=scaled(setting.cluster, workers)))
        stuck = [each for each, one in zip(found, alone, strict=True) if each.seconds > 0.9 * one.seconds]
        if sum(each.seconds for each in stuck) > 0.5 * sum(each.seconds for each in found):
            names = ", ".join(dict.fromkeys(each.stage for each in stuck))
            limits.append(
                Limit(
                    at=float(workers),
                    what=f"over half of the time goes to stages that get no faster ({names})",
                    mend=f"give the run fewer {kind}, or run stages apart on clusters of their own size",
                )
            )
            break
    return sorted(limits, key=lambda limit: limit.at)


def _named(steps: Sequence[tuple[str, Step]], stage: str) -> tuple[Step, str]:
    return next((step, name) for name, step in steps if step.stage == stage)


def _head(cluster: Cluster) -> NodeGroup:
    heads = [group for group in cluster.groups if "head" in group.name]
    return heads[0] if heads else cluster.largest
