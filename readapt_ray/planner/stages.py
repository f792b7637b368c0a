"""Estimate each stage of a run on a cluster: work, workers, seconds, memory and bytes of output."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from readapt_ray.cluster.batches import BATCH_ADVICE, least_workers
from readapt_ray.planner.corpus import Corpus
from readapt_ray.planner.estimates import LOAD_BYTES_PER_S, Setting, StageEstimate, cpu_rate, device_of, timed
from readapt_ray.planner.exchange import Steps, waiting_s
from readapt_ray.planner.index_stages import index_estimate, search_estimate
from readapt_ray.planner.machines import Cluster
from readapt_ray.planner.rates import ROWS_PER_FILE, Rate
from readapt_ray.planner.worker_memory import embed_memory, gpu_share, train_adapter, train_memory
from readapt_ray.progress import amount
from readapt_ray.recipes.chain import Step
from readapt_ray.retrieval.encoder_sizes import TextSize, shard_rows
from readapt_ray.training.step_size import PackedSize, StepSize, choose_step_size

_STEP_FLOOR_S: Final = {"CPU": 0.02, "GPU": 0.12}
"""Shortest time of an optimizer step: kernel launches, the optimizer, gradients between workers."""
_TOLD_WAITING: Final = 0.05
"""The plan mentions waiting for the network if it is more than this share of the computing time."""
_TOLD_TOKENIZING: Final = 2.0
"""The plan mentions tokenising if CPUs tokenise less than this many times the tokens that GPUs encode."""
_VECTOR_BYTES: Final = {"float32": (4, 0), "float16": (2, 0), "int8": (1, 4)}
"""Bytes per number and additional bytes per vector, by data type of stored vectors (int8 has a scale)."""


def estimate_stage(step: Step, name: str, setting: Setting) -> StageEstimate | None:
    """Estimate one stage of a run; return None if it has nothing to do (it needs judged queries and there are none).

    Args:
        step: the stage and its options. A stage of the general corpus is estimated with that corpus.
        name: folder of its artifact under the root.
        setting: corpus, cluster, rates and models of the plan.
    """
    if step.needs_judgements and not setting.corpus.num_queries:
        return None
    if step.is_general and setting.general is not None:
        setting = replace(setting, corpus=setting.general)
    return _ESTIMATES[step.stage](step.config, name, setting)


def ingest_workers(corpus: Corpus, cluster: Cluster) -> int:
    """Return the number of CPUs that read the source at the same time: one per piece, at most those always up."""
    return min(cluster.num_always_up_cpus, corpus.num_pieces)


def embed_rows(config: Any, setting: Setting) -> int:
    """Return the number of passages per data shard: the option `rows_per_shard`, else the number that embed chooses."""
    corpus = setting.corpus
    text = TextSize(corpus.embed_tokens, corpus.text_bytes)
    on_gpus = bool(setting.cluster.num_gpus)
    return int(
        config.rows_per_shard
        or shard_rows(corpus.num_passages, text, setting.retriever, setting.dimension, on_gpus=on_gpus)
    )


def embed_workers(config: Any, setting: Setting) -> int:
    """Return the number of embedding actors that have work; actors that share a GPU count as one.

    It is `num_workers` or as many as fit, at most one per GPU (without GPUs: as many as the CPUs allow), and at most
    one per data shard.

    Args:
        config: options of embed.
        setting: corpus, cluster and retriever of the plan.
    """
    corpus, cluster, rows = setting.corpus, setting.cluster, embed_rows(config, setting)
    shards = math.ceil(corpus.num_passages / rows)
    asked, most = config.num_workers, max(1, cluster.num_cpus // (config.num_cpus_per_worker or 1))
    if cluster.num_gpus:
        most = cluster.num_gpus
        asked = asked and math.ceil(asked * gpu_share(config, setting.retriever, cluster))
    return max(1, min(asked or most, most, shards))


def train_workers(config: Any, cluster: Cluster) -> int:
    """Return the number of Ray Train workers of a training stage: `num_workers`, at most one per GPU.

    If omitted: one per GPU, or without GPUs one per node with CPUs. Without GPUs `num_workers` is not limited.

    Args:
        config: options of train.
        cluster: the cluster of the plan.
    """
    if cluster.num_gpus:
        return int(min(config.num_workers or cluster.num_gpus, cluster.num_gpus))
    return int(config.num_workers or cluster.num_nodes_with_cpus)


def train_step_size(config: Any, corpus: Corpus, cluster: Cluster) -> StepSize:
    """Return the batch size and number of workers that training will choose.

    A `batch_size` other than auto is kept, and then so is the number of workers of `train_workers`.

    Args:
        config: options of train, with those of pack (mode, block_tokens).
        corpus: size of the corpus.
        cluster: the cluster of the plan.
    """
    num_blocks = float(corpus.num_passages)
    if config.mode == "packed":
        num_blocks = corpus.num_passages * corpus.train_tokens / (config.block_tokens - corpus.train_tokens / 2)
    size = PackedSize(
        num_blocks=num_blocks * config.num_epochs,
        num_passages=float(corpus.num_passages * config.num_epochs),
        num_tokens=corpus.num_passages * corpus.train_tokens * config.num_epochs,
    )
    offered = train_workers(config, cluster)
    if config.batch_size == "auto":
        return choose_step_size(size, num_workers=offered, least_workers=least_workers(config, offered))
    return replace(choose_step_size(size, num_workers=offered, batch_size=config.batch_size), num_workers=offered)


def train_steps(config: Any, corpus: Corpus, step: StepSize) -> int:
    """Return the number of optimizer steps over all epochs; each epoch has at least one.

    Args:
        config: options of train.
        corpus: size of the corpus.
        step: size of a step, from `train_step_size`.
    """
    num_tokens = corpus.num_passages * corpus.train_tokens
    return max(1, math.ceil(num_tokens / step.num_tokens)) * int(config.num_epochs)


def _ingest(_: Any, name: str, setting: Setting) -> StageEstimate:
    corpus = setting.corpus
    work, workers = corpus.num_passages * corpus.text_bytes, ingest_workers(corpus, setting.cluster)
    rate = cpu_rate(setting, "ingest")
    return timed(name, "ingest", work, rate, units=workers, workers=workers, error=corpus.error, out_bytes=0.6 * work)


def _pack(_: Any, name: str, setting: Setting) -> StageEstimate:
    corpus = setting.corpus
    work = corpus.num_passages * corpus.train_tokens
    workers = max(1, min(setting.cluster.num_always_up_cpus, math.ceil(corpus.num_passages / ROWS_PER_FILE)))
    rate = cpu_rate(setting, "pack")
    return timed(name, "pack", work, rate, units=workers, workers=workers, error=corpus.error, out_bytes=2.2 * work)


def _train(config: Any, name: str, setting: Setting) -> StageEstimate:
    from readapt_ray.training.memory import num_trained
    from readapt_ray.training.speed import run_flops

    corpus, cluster, shape = setting.corpus, setting.cluster, setting.pretrained
    step = train_step_size(config, corpus, cluster)
    workers = step.num_workers
    busy = min(workers, step.batch_size)
    device, peak = device_of(cluster)
    steps = train_steps(config, corpus, step)
    adapter = train_adapter(config, shape)
    work = run_flops(
        shape,
        adapter,
        num_tokens=corpus.num_passages * corpus.train_tokens * config.num_epochs,
        num_passages=corpus.num_passages * config.num_epochs,
        num_steps=steps,
        gradient_checkpointing=config.gradient_checkpointing,
    )
    each = config.num_cpus_per_worker or max(1, cluster.num_cpus // max(1, workers))
    units = busy if cluster.num_gpus else min(cluster.num_cpus, busy * each)
    rate = setting.rates.rate_of("train", device, peak, is_16_bit=cluster.computes_in_16_bits(config.dtype))
    floor = 0.0 if rate.is_measured else steps * _STEP_FLOOR_S["GPU" if cluster.num_gpus else "CPU"]
    advice = BATCH_ADVICE.format(num_workers=workers, batch_size=busy)
    work_s = work / (units * rate.value)
    bound = "; the fixed cost per step dominates" if floor > work_s else ""
    trained = num_trained(shape, adapter)
    run = Steps(
        num_steps=steps, num_workers=busy, worker_tokens=step.num_tokens / busy, work_s=work_s, num_trained=trained
    )
    waiting = 0.0 if rate.is_measured else waiting_s(config, shape, cluster, run)
    computed_s = max(work_s, floor)
    waits = f"{waiting / (computed_s + waiting):.0%} of it waiting for the network between nodes"
    return timed(
        name,
        "train",
        work,
        rate,
        units=units,
        workers=workers,
        device=device,
        error=corpus.error,
        out_bytes=(30.0 if adapter is None else 28.0) * trained,
        fixed_s=2 * shape.num_parameters / LOAD_BYTES_PER_S,
        floor_s=floor,
        waiting_s=waiting,
        needs=train_memory(config, shape, cluster, workers),
        note="; ".join(
            filter(
                None,
                [
                    f"{amount(steps, 'steps')} of {amount(step.batch_size, 'blocks')}{bound}",
                    waits if waiting > _TOLD_WAITING * computed_s else "",
                    _float32_note(config, cluster),
                ],
            )
        ),
        problem=f"a step has {busy} blocks for {workers} workers; {advice}" if busy < workers else "",
    )


def _merge(config: Any, name: str, setting: Setting) -> StageEstimate:
    size = setting.retriever.num_parameters * (4 if config.dtype == "float32" else 2)
    return timed(name, "merge", 3.0 * size, cpu_rate(setting, "merge"), out_bytes=size)


def _embed(config: Any, name: str, setting: Setting) -> StageEstimate:
    corpus, cluster, shape = setting.corpus, setting.cluster, setting.retriever
    workers = embed_workers(config, setting)
    is_16_bit = cluster.computes_in_16_bits(config.dtype)
    device, peak = device_of(cluster)
    rate = setting.rates.rate_of("embed", device, peak if is_16_bit else peak / 8, is_16_bit=is_16_bit)
    number_bytes, more_bytes = _VECTOR_BYTES[config.vector_dtype]
    units = _embed_units(config, setting, workers, rate, is_16_bit=is_16_bit)
    token_flops = shape.forward_flops(corpus.embed_tokens)
    tokenizing_s, waiting_note = _tokenizing(setting, units * rate.value / token_flops)
    return timed(
        name,
        "embed",
        corpus.num_passages * corpus.embed_tokens * token_flops,
        rate,
        units=units,
        floor_s=tokenizing_s,
        workers=workers,
        device=device,
        error=corpus.error,
        out_bytes=corpus.num_passages * (number_bytes * setting.dimension + more_bytes + 30.0),
        fixed_s=shape.num_parameters * (2 if is_16_bit else 4) / LOAD_BYTES_PER_S,
        needs=embed_memory(config, shape, cluster),
        note="; ".join(filter(None, [_float32_note(config, cluster), waiting_note])),
    )


def _tokenizing(setting: Setting, encoded: float) -> tuple[float, str]:
    """Return the seconds that the CPUs of a cluster with GPUs tokenise, and a note if the GPUs may wait for them.

    Args:
        setting: corpus, cluster and rates of the plan.
        encoded: tokens per second that all GPUs encode.
    """
    corpus, cluster = setting.corpus, setting.cluster
    if not (cluster.num_gpus and cluster.num_cpus):
        return 0.0, ""
    tokenized = cluster.num_cpus * cpu_rate(setting, "pack").value
    seconds = corpus.num_passages * corpus.embed_tokens / tokenized
    if tokenized > _TOLD_TOKENIZING * encoded:
        return seconds, ""
    figures = f"{cluster.num_cpus} CPUs tokenise {tokenized:.2g} tokens/s, the GPUs encode {encoded:.2g}"
    return seconds, f"{figures}; more CPUs make it faster" if tokenized < encoded else figures


def _embed_units(config: Any, setting: Setting, workers: int, rate: Rate, *, is_16_bit: bool) -> float:
    """Return the sum of all workers' speeds as a multiple of `rate`.

    Speeds of different GPUs add up, because an idle worker takes the next shard.
    """
    cluster = setting.cluster
    if not cluster.num_gpus:
        return float(min(cluster.num_cpus, workers * (config.num_cpus_per_worker or 1)))
    speeds = []
    for group in cluster.gpu_groups:
        peak = group.gpu_flops if is_16_bit else group.gpu_flops / 8
        speeds += [setting.rates.rate_of("embed", group.gpu, peak, is_16_bit=is_16_bit).value] * (
            group.count * group.gpus
        )
    return sum(sorted(speeds, reverse=True)[:workers]) / rate.value


def _float32_note(config: Any, cluster: Cluster) -> str:
    """Return a note if dtype `auto` was planned as float32, the slower type; else an empty text."""
    if config.dtype != "auto" or cluster.computes_in_16_bits("auto"):
        return ""
    return "in float32, as dtype auto is on CPUs without bfloat16 units"


def _evaluate(config: Any, name: str, setting: Setting) -> StageEstimate:
    work = float(setting.corpus.num_queries * len(config.runs))
    return timed(name, "evaluate", work, cpu_rate(setting, "evaluate"), out_bytes=500.0 * work)


_ESTIMATES: dict[str, Callable[[Any, str, Setting], StageEstimate]] = {
    "ingest": _ingest,
    "pack": _pack,
    "train": _train,
    "merge": _merge,
    "embed": _embed,
    "index": index_estimate,
    "search": search_estimate,
    "evaluate": _evaluate,
}
