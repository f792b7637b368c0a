"""Each stage of a run on a cluster: its work, workers, hours, memory and bytes."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from readapt_ray.planner import flops, memory
from readapt_ray.planner.corpus import Corpus
from readapt_ray.planner.machines import Cluster
from readapt_ray.planner.memory import Memory
from readapt_ray.planner.rates import CPU, FIXED_S, Rate, Rates
from readapt_ray.planner.shapes import ModelShape
from readapt_ray.recipes.chain import Step
from readapt_ray.retrieval.index_kinds import KINDS, Wanted, vector_bytes
from readapt_ray.stages.embed import _MAX_SHARD_ROWS, _MIN_SHARD_ROWS, _SHARDS

_LOAD_BYTES_A_SECOND: Final = 5e8
"""Weights from an object store or a disk to a node."""
_STEP_FLOOR_S: Final = {"CPU": 0.02, "GPU": 0.12}
"""Shortest optimizer step: kernel launches, the optimizer, gradients between workers."""
_INDEX_SHARD_BYTES: Final = 512 << 20
_VECTOR_BYTES: Final = {"float32": (4, 0), "float16": (2, 0), "int8": (1, 4)}
"""Bytes a number and a vector, by how vectors are stored (int8 has a scale)."""


@dataclass(frozen=True, kw_only=True)
class StageEstimate:
    """One stage of a run."""

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


def estimate(step: Step, name: str, setting: Setting) -> StageEstimate | None:
    """One stage; None for one that has nothing to do."""
    if step.needs_judgements and not setting.corpus.num_queries:
        return None
    return _ESTIMATES[step.stage](step.config, name, setting)


def embed_workers(config: Any, corpus: Corpus, cluster: Cluster) -> int:
    """Actors that have something to do."""
    rows = config.rows_per_shard or min(_MAX_SHARD_ROWS, max(_MIN_SHARD_ROWS, corpus.num_passages // _SHARDS))
    shards = math.ceil(corpus.num_passages / rows)
    most = cluster.num_gpus or max(1, cluster.num_cpus // (config.num_cpus_per_worker or 1))
    return max(1, min(config.num_workers or most, most, shards))


def index_bytes(config: Any, num_vectors: float, dimension: int) -> dict[str, float]:
    """Bytes in memory of each kind of index with the run's own options, ids aside."""
    options = {name: getattr(config, name) for name in ("storage", "refine", "code_bytes")}
    return {kind.name: num_vectors * vector_bytes(Wanted(kind=kind.name, **options), dimension) for kind in KINDS}


def train_workers(config: Any, cluster: Cluster) -> int:
    """Ray Train workers."""
    if cluster.num_gpus:
        return int(min(config.num_workers or cluster.num_gpus, cluster.num_gpus))
    return int(config.num_workers or cluster.num_nodes)


def train_steps(config: Any, corpus: Corpus) -> int:
    """Optimizer steps."""
    blocks = float(corpus.num_passages)
    if config.mode == "packed":
        blocks = corpus.num_passages * corpus.train_tokens / (config.block_tokens - corpus.train_tokens / 2)
    return max(1, math.ceil(blocks / int(config.batch_size))) * int(config.num_epochs)


def _device(cluster: Cluster) -> tuple[str, float]:
    """The GPU that a synchronous step waits for, or a CPU."""
    if not cluster.gpu_groups:
        return CPU, 0.0
    slowest = min(cluster.gpu_groups, key=lambda group: group.gpu_flops)
    return slowest.gpu, slowest.gpu_flops


def _timed(
    name: str,
    stage: str,
    work: float,
    *,
    units: float,
    workers: int,
    device: str,
    rate: Rate,
    error: float,
    out_bytes: float,
    fixed_s: float = 0.0,
    floor_s: float = 0.0,
    needs: Memory | None = None,
    note: str = "",
) -> StageEstimate:
    """Fixed seconds, and the work at so many units times the rate; never under the floor."""
    fixed = FIXED_S[stage] + fixed_s
    working = max(work / (units * rate.value), floor_s)
    return StageEstimate(
        name=name,
        stage=stage,
        work=work,
        unit=flops.WORK_UNITS[stage],
        workers=workers,
        device=device,
        seconds=fixed + working,
        low_s=0.5 * fixed + working * (1 - min(error, 0.9)) / rate.faster,
        high_s=2 * fixed + working * (1 + error) * rate.slower,
        out_bytes=out_bytes,
        rate=rate,
        memory=needs,
        note=note,
    )


def _ingest(config: Any, name: str, setting: Setting) -> StageEstimate:
    del config
    corpus = setting.corpus
    work = corpus.num_passages * corpus.text_bytes
    rate = setting.rates.of("ingest", CPU, 0, is_low=False)
    return _timed(
        name, "ingest", work, units=1, workers=1, device=CPU, rate=rate, error=corpus.error, out_bytes=0.6 * work
    )


def _pack(config: Any, name: str, setting: Setting) -> StageEstimate:
    del config
    corpus, cluster = setting.corpus, setting.cluster
    work = corpus.num_passages * corpus.train_tokens
    workers = max(1, min(cluster.num_cpus, math.ceil(corpus.num_passages / flops.ROWS_PER_FILE)))
    rate = setting.rates.of("pack", CPU, 0, is_low=False)
    return _timed(
        name,
        "pack",
        work,
        units=workers,
        workers=workers,
        device=CPU,
        rate=rate,
        error=corpus.error,
        out_bytes=2.2 * work,
    )


def _train(config: Any, name: str, setting: Setting) -> StageEstimate:
    corpus, cluster, shape = setting.corpus, setting.cluster, setting.pretrained
    workers = train_workers(config, cluster)
    busy = min(workers, config.batch_size)
    device, peak = _device(cluster)
    steps = train_steps(config, corpus)
    tokens = corpus.num_passages * corpus.train_tokens * config.num_epochs
    work = flops.trained(
        config, shape, num_tokens=tokens, num_passages=corpus.num_passages * config.num_epochs, num_steps=steps
    )
    each = config.num_cpus_per_worker or max(1, cluster.num_cpus // max(1, workers))
    units = busy if cluster.num_gpus else min(cluster.num_cpus, busy * each)
    rate = setting.rates.of("train", device, peak, is_low=cluster.computes_low(config.dtype))
    floor = 0.0 if rate.is_measured else steps * _STEP_FLOOR_S["GPU" if cluster.num_gpus else "CPU"]
    idle = f"{workers - busy} of {workers} workers have nothing to do" if busy < workers else ""
    is_floor = floor > work / (units * rate.value)
    bound = ", so short that what a step costs at least decides" if is_floor else ""
    slow = _taken_as_float32(config, cluster)
    parameters = shape.adapter_parameters(tuple(config.target_modules), config.lora_rank)
    return _timed(
        name,
        "train",
        work,
        units=units,
        workers=workers,
        device=device,
        rate=rate,
        error=corpus.error,
        out_bytes=28.0 * parameters if config.method != "full" else 30.0 * shape.num_parameters,
        fixed_s=2 * shape.num_parameters / _LOAD_BYTES_A_SECOND,
        floor_s=floor,
        needs=memory.of_training(config, shape, cluster, workers),
        note="; ".join(filter(None, [f"{steps:,} steps of {config.batch_size} blocks{bound}", idle, slow])),
    )


def _merge(config: Any, name: str, setting: Setting) -> StageEstimate:
    width = 4 if config.dtype == "float32" else 2
    size = setting.retriever.num_parameters * width
    rate = setting.rates.of("merge", CPU, 0, is_low=False)
    return _timed(name, "merge", 3.0 * size, units=1, workers=1, device=CPU, rate=rate, error=0.0, out_bytes=size)


def _embed(config: Any, name: str, setting: Setting) -> StageEstimate:
    corpus, cluster, shape = setting.corpus, setting.cluster, setting.retriever
    workers = embed_workers(config, corpus, cluster)
    work = corpus.num_passages * corpus.embed_tokens * shape.forward_flops(corpus.embed_tokens)
    is_low = cluster.computes_low(config.dtype)
    device, peak = _device(cluster)
    rate = setting.rates.of("embed", device, peak if is_low else peak / 8, is_low=is_low)
    units = float(workers)
    if cluster.num_gpus:  # shards go to whoever is free, so unlike GPUs add up
        speeds = sorted(
            (
                setting.rates.of(
                    "embed", group.gpu, group.gpu_flops if is_low else group.gpu_flops / 8, is_low=is_low
                ).value
                for group in cluster.gpu_groups
                for _ in range(group.count * group.gpus)
            ),
            reverse=True,
        )
        units = sum(speeds[:workers]) / rate.value
    else:
        units = min(cluster.num_cpus, workers * (config.num_cpus_per_worker or 1))
    number_bytes, more_bytes = _VECTOR_BYTES[config.vector_dtype]
    return _timed(
        name,
        "embed",
        work,
        units=units,
        workers=workers,
        device=device,
        rate=rate,
        error=corpus.error,
        out_bytes=corpus.num_passages * (number_bytes * setting.dimension + more_bytes + 30.0),
        fixed_s=shape.num_parameters * (2 if is_low else 4) / _LOAD_BYTES_A_SECOND,
        needs=memory.of_embedding(config, shape, cluster),
        note=_taken_as_float32(config, cluster),
    )


def _taken_as_float32(config: Any, cluster: Cluster) -> str:
    """Says where `auto` was taken for the slower of what it may mean."""
    if config.dtype != "auto" or cluster.computes_low("auto"):
        return ""
    return "in float32, as dtype auto is on CPUs without bfloat16 units"


def _index(config: Any, name: str, setting: Setting) -> StageEstimate:
    corpus, cluster = setting.corpus, setting.cluster
    size = 4.0 * corpus.num_passages * setting.dimension
    shard = 4.0 * config.rows_per_shard * setting.dimension if config.rows_per_shard else _INDEX_SHARD_BYTES
    workers = max(1, min(cluster.num_cpus, math.ceil(size / shard)))
    rate = setting.rates.of("index", CPU, 0, is_low=False)
    known = {} if config.factory else index_bytes(config, corpus.num_passages, setting.dimension)
    taken = "time" if config.kind in known else "time and bytes"
    return _timed(
        name,
        "index",
        size,
        units=workers,
        workers=workers,
        device=CPU,
        rate=rate,
        error=0.0,
        out_bytes=known.get(config.kind, size),
        needs=memory.of_indexing(shard, cluster, size),
        note="" if known and config.kind == "flat" else f"{taken} of a flat index; see the bytes of each kind below",
    )


def _search(config: Any, name: str, setting: Setting) -> StageEstimate:
    corpus, cluster = setting.corpus, setting.cluster
    work = 2.0 * corpus.num_queries * corpus.num_passages * setting.dimension
    pieces = math.ceil(4.0 * corpus.num_passages * setting.dimension / _INDEX_SHARD_BYTES)
    workers = max(1, min(cluster.num_cpus, pieces))
    rate = setting.rates.of("search", CPU, 0, is_low=False)
    return _timed(
        name,
        "search",
        work,
        units=workers,
        workers=workers,
        device=CPU,
        rate=rate,
        error=corpus.error,
        out_bytes=45.0 * corpus.num_queries * min(config.top_k, corpus.num_passages),
        fixed_s=2 * setting.retriever.num_parameters / _LOAD_BYTES_A_SECOND,
        note=f"{corpus.num_queries:,} queries",
    )


def _evaluate(config: Any, name: str, setting: Setting) -> StageEstimate:
    work = float(setting.corpus.num_queries * len(config.runs))
    rate = setting.rates.of("evaluate", CPU, 0, is_low=False)
    return _timed(name, "evaluate", work, units=1, workers=1, device=CPU, rate=rate, error=0.0, out_bytes=500.0 * work)


_ESTIMATES: dict[str, Callable[[Any, str, Setting], StageEstimate]] = {
    "ingest": _ingest,
    "pack": _pack,
    "train": _train,
    "merge": _merge,
    "embed": _embed,
    "index": _index,
    "search": _search,
    "evaluate": _evaluate,
}
