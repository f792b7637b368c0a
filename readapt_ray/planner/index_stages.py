"""Estimate the stages index and search: bytes of each kind of index, memory per shard, and GPUs that encode queries."""

import math
from dataclasses import replace
from typing import Any, Final

from readapt_ray.cluster.index_shards import UNTRAINED
from readapt_ray.cluster.query_vectors import QUERIES_A_PIECE
from readapt_ray.errors import InputError
from readapt_ray.planner.estimates import LOAD_BYTES_PER_S, Setting, StageEstimate, cpu_rate, device_of, timed
from readapt_ray.planner.rates import CPU
from readapt_ray.planner.worker_memory import index_memory
from readapt_ray.retrieval.index_kinds import (
    KINDS,
    IndexOptions,
    default_storage,
    index_spec,
    shard_bytes,
    shard_cpus,
    shard_rows,
    vector_bytes,
)
from readapt_ray.retrieval.vector_files import SHARD_BYTES
from readapt_ray.stages.index import index_options

_QUERY_TOKENS: Final = 32.0
"""Tokens of a query with its prompt."""


def index_bytes(config: Any, setting: Setting) -> dict[str, float]:
    """Return the bytes that an index of the whole corpus takes in memory, by kind of index; without doc_ids.

    Args:
        config: options of index (storage, refine and so on); its own kind is not used.
        setting: corpus and dimension of the vectors.
    """
    found = {}
    for kind in KINDS:
        storage = config.storage or default_storage(kind.name, setting.vector_dtype)
        options = IndexOptions(kind=kind.name, storage=storage, refine=config.refine, code_bytes=config.code_bytes)
        found[kind.name] = setting.corpus.num_passages * vector_bytes(options, setting.dimension)
    return found


def index_estimate(config: Any, name: str, setting: Setting) -> StageEstimate:
    """Estimate the stage index. Its tasks run on nodes that are up without GPU work; larger shards get more CPUs.

    If no index fits the options (such as `memory_gb`), `problem` says why, and the rest is for default options.

    Args:
        config: options of index.
        name: folder of its artifact under the root.
        setting: corpus, cluster and rates of the plan.
    """
    corpus, group, dimension = setting.corpus, setting.cluster.largest_always_up, setting.dimension
    problem = ""
    try:
        options = index_options(config, corpus.num_passages, dimension, setting.vector_dtype)
        spec = index_spec(options, corpus.num_passages, dimension)
    except InputError as error:  # such as: nothing fits memory_gb
        problem, options = str(error), IndexOptions()
        spec = index_spec(options, corpus.num_passages, dimension)
    rows = min(corpus.num_passages, config.rows_per_shard or shard_rows(options, corpus.num_passages, dimension))
    cpus = 1
    if not (spec.is_exact and spec.factory in UNTRAINED):
        cpus = max(1, min(group.cpus, shard_cpus(options, dimension, rows)))
    size = 4.0 * corpus.num_passages * dimension
    workers = max(1, min(setting.cluster.num_always_up_cpus // cpus, math.ceil(corpus.num_passages / rows)))
    taken = "time and bytes" if options.factory else "time"
    return timed(
        name,
        "index",
        size,
        cpu_rate(setting, "index"),
        units=workers * cpus,
        workers=workers * cpus,
        out_bytes=shard_bytes(options, dimension, corpus.num_passages),
        needs=index_memory(shard_bytes(options, dimension, rows), cpus, group),
        note="" if spec.factory in UNTRAINED else f"{taken} of a flat index; see the bytes of each kind below",
        problem=problem,
    )


def search_estimate(config: Any, name: str, setting: Setting) -> StageEstimate:
    """Estimate the stage search: encode the queries, then search vectors exactly or an index.

    Queries are encoded on GPUs if there are any; else their encoding is part of the rate of search. Exact search over
    vectors (the option `vectors`) also uses GPUs; an index is searched on CPUs.

    Args:
        config: options of search.
        name: folder of its artifact under the root.
        setting: corpus, cluster, models and rates of the plan.
    """
    corpus, cluster, shape = setting.corpus, setting.cluster, setting.retriever
    work = 2.0 * corpus.num_queries * corpus.num_passages * setting.dimension
    load_s = 2 * shape.num_parameters / LOAD_BYTES_PER_S
    encoders, encode_s = _query_encoders(setting)
    device, peak = device_of(cluster)
    if config.vectors and cluster.num_gpus:  # vectors are compared on GPUs, an index is searched on CPUs
        workers, rate = cluster.num_gpus, setting.rates.rate_of("search", device, peak, is_16_bit=True)
    else:
        pieces = math.ceil(4.0 * corpus.num_passages * setting.dimension / SHARD_BYTES)
        workers, rate = max(1, min(cluster.num_always_up_cpus, pieces)), cpu_rate(setting, "search")
        device = CPU
    found = timed(
        name,
        "search",
        work,
        rate,
        units=workers,
        workers=workers,
        device=device,
        error=corpus.error,
        out_bytes=45.0 * corpus.num_queries * min(config.top_k, corpus.num_passages),
        fixed_s=load_s + encode_s,
        note=f"{corpus.num_queries:,} queries",
    )
    return replace(found, first_gpus=encoders, first_gpus_s=load_s + encode_s if encoders else 0.0)


def _query_encoders(setting: Setting) -> tuple[int, float]:
    """Return how many GPUs encode the queries of a search, and their seconds without loading the model.

    Both are 0 without GPUs: then the rate of search includes encoding.
    """
    cluster, num_queries = setting.cluster, setting.corpus.num_queries
    if not cluster.num_gpus:
        return 0, 0.0
    device, peak = device_of(cluster)
    rate = setting.rates.rate_of("embed", device, peak, is_16_bit=True)
    encoders = max(1, min(cluster.num_gpus, math.ceil(num_queries / QUERIES_A_PIECE)))
    work = num_queries * _QUERY_TOKENS * setting.retriever.forward_flops(_QUERY_TOKENS)
    return encoders, work / (encoders * rate.value)
