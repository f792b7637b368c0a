"""The embed stage: encode the passages of a corpus into vectors, one data shard at a time.

In: a corpus and a retriever; optionally the vectors of an earlier state of the corpus. Out:
`vectors/part-00000.parquet` and so on. Shards are planned from the row counts of files. Ray Data reads and tokenises
them on idle cores. Actors encode them and write each shard as a whole, so a killed run resumes with the missing shards
and writes each passage once. Files of earlier vectors are shared: rows of passages that changed are marked dead in a
file beside them. Other texts that have an earlier vector are copied, and identical texts in a shard are encoded once.
Two CPU cores with AMX encode some 230 passages of 89 tokens per second with all-MiniLM-L6-v2. An actor holds the model
and two shards. The driver holds some 1.3 KB per shard; with earlier vectors also a byte for each, and 8 bytes per
changed passage.
"""

import logging
import os
from dataclasses import asdict, replace
from typing import Any, ClassVar, Literal

from pydantic import Field

from readapt_ray import artifacts
from readapt_ray.artifacts import Artifact, Workspace, fingerprint, open_artifact, produce, read_manifest
from readapt_ray.catalog.encoding import Encoding, EncodingOption
from readapt_ray.catalog.models import OpenModel
from readapt_ray.catalog.query_models import passages_model
from readapt_ray.catalog.retriever_options import RetrieverOptions
from readapt_ray.catalog.shapes import ModelShape, shape_of
from readapt_ray.cluster import connection, on_worker
from readapt_ray.cluster.earlier_plan import plan_on_earlier, sources_of
from readapt_ray.cluster.earlier_vectors import Changes
from readapt_ray.cluster.embed_job import EmbedJob
from readapt_ray.cluster.embed_sample import estimate_full_run, sample_rows
from readapt_ray.cluster.encoding_dtype import encoding_dtype
from readapt_ray.cluster.placement import Placement
from readapt_ray.cluster.shard_runner import encode_shards, shard_ledger
from readapt_ray.config import StageConfig
from readapt_ray.errors import CorpusError, FingerprintMismatchError
from readapt_ray.model_file_names import CONFIG_NAME
from readapt_ray.retrieval import truncation
from readapt_ray.retrieval.encoder_sizes import MIN_SHARD_ROWS, SHARDS, TextSize, encoders_per_gpu, shard_rows
from readapt_ray.retrieval.footers import listed_footers, open_passages
from readapt_ray.retrieval.parquet_rows import ParquetRows
from readapt_ray.retrieval.query_encoder import describe_encoder
from readapt_ray.retrieval.shard_ledger import ShardLedger, begun_rows_per_shard, open_vectors
from readapt_ray.retrieval.shard_plan import DataShard, plan_shards
from readapt_ray.sources.parts import DIGEST
from readapt_ray.storage import Location

logger = logging.getLogger("readapt_ray")

_BYTES_PER_TOKEN = 4


class EmbedConfig(RetrieverOptions, StageConfig):
    """The options of `readapt embed`."""

    corpus: str
    """Passages: the output of `readapt ingest`."""
    previous: str | None = None
    """Vectors of an earlier state of the corpus by the same model. Only new and changed passages are encoded."""
    sample: str | None = None
    """Encode only this part, as a percentage (1%) or a number of passages, and estimate time and size of a full
    run. Written to OUTPUT-sample."""
    encoding: EncodingOption = None
    """JSON file with pooling, prompts and special tokens. If omitted, what the retriever's folder or the catalog
    says."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Data type that the model computes in; auto is bfloat16 on GPUs and on CPUs with AMX or
    AVX512_BF16, else float32."""
    vector_dtype: Literal["float32", "float16", "int8"] = "float32"
    """Data type of the stored vectors. float16 takes half the space; int8 takes a quarter and keeps one scale per
    vector."""
    dimensions: int | None = Field(default=None, ge=1)
    """Keep only the first dimensions of each vector and normalise it again (for Matryoshka models). If omitted, all
    of them, or what the encoding says."""
    rows_per_shard: int | None = Field(default=None, ge=1)
    """Passages per data shard, the unit of work. If omitted, some 45 seconds of a device's work, at least 256 and at
    most a 32nd of the corpus."""
    num_workers: int | None = Field(default=None, ge=1)
    """Number of encoding actors. If omitted, as many as the GPUs have room for; without GPUs one per
    num_cpus_per_worker CPUs."""
    num_cpus_per_worker: int | None = Field(default=None, ge=1)
    """CPUs, and so threads, per actor. If omitted, 1."""
    num_gpus_per_worker: float | None = Field(default=None, gt=0, le=1)
    """Part of a GPU per actor: with 0.5, two actors share one. If omitted, 1; or 0.5 for small models such as
    all-MiniLM-L6-v2, which leave a GPU waiting for its host, if there are four cores per actor. Not measured on a GPU
    yet."""
    batch_tokens: int | None = Field(default=None, ge=1)
    """Maximum tokens per batch, padding included. If omitted, 1,024 on a CPU, and on a GPU by the model's size and the
    free memory: 119,808 for all-MiniLM-L6-v2, 9,216 for a 7B. Lower it when memory is short. In float32 the vectors do
    not depend on it (to 1e-6). In bfloat16 they differ by .001, and 99.8% of the ten nearest passages stay the same
    (measured on all-MiniLM-L6-v2)."""
    max_left_out: int = Field(default=100, ge=0)
    """Maximum number of passages that are left out because their vector is NaN, infinite or zero, even in float32. The
    manifest names them. The run stops if there are more."""

    inputs: ClassVar[frozenset[str]] = RetrieverOptions.names_of_retriever | {"corpus", "encoding"}
    operational: ClassVar[frozenset[str]] = frozenset(
        {"num_workers", "num_cpus_per_worker", "num_gpus_per_worker", "batch_tokens", "previous", "max_left_out"}
    )


def embed(config: EmbedConfig) -> Artifact:
    """Encode the passages of a corpus into vectors, in numbered data shards.

    With `previous`, vectors of unchanged passages are copied from it, and only new or changed passages are encoded.
    With `sample`, only some passages are encoded, into OUTPUT-sample, to estimate the time of a full run. If `previous`
    cannot be copied from (another model or `vector_dtype`), a sample measures how many of the 10 nearest passages stay
    the same, and logs it. A stopped run resumes; does nothing if the output is complete and of the same options and
    inputs.

    Raises:
        ArtifactMissingError: the corpus is no output of `readapt ingest`, or `previous` no output of `readapt embed`.
        CorpusError: the corpus is empty, lacks a column, holds a file twice, or was altered during the run; or more
            passages than `max_left_out` have no usable vector.
        FingerprintMismatchError: `previous` was made by another model, or has another `vector_dtype`; not with
            `sample`.
        ModelError: the retriever is not a model, or cannot be used with its encoding.
        CorruptFileError: a file of the corpus was cut short or altered, or is missing.
        PlacementError: the cluster does not have the CPUs or GPUs that the actors need.
        ArtifactConflictError: the output folder holds vectors of another model or corpus.
    """
    corpus = open_artifact(config.corpus, "ingest")
    model, encoding = _open_retriever(config)
    config = _resolve(config, corpus.manifest.counts["num_passages"])
    folder = on_worker.absolute(corpus.location / "passages")
    # If the output is finished, its manifest says so: then no file of the corpus is opened and torch is not imported.
    opened = None
    if read_manifest(config.output) is None:
        opened = open_passages(folder, corpus, config.corpus)
        _check_retriever(model, encoding)
    job = _job(config, model, encoding)
    previous, other = _open_previous(config, job.encoder)
    job, rows_per_shard = replace(job, earlier=previous), _rows_per_shard(config, corpus, model, encoding)

    def work(workspace: Workspace) -> None:
        placement = Placement(
            config.num_workers, config.num_cpus_per_worker, config.num_gpus_per_worker, encoders_per_gpu(_shape(model))
        )
        if opened is None:
            _check_retriever(model, encoding)
        passages = opened or open_passages(folder, corpus, config.corpus)
        before = _state(job.passages)
        if config.sample is not None:
            estimate_full_run(config.sample, job, passages, placement, compared=other, workspace=workspace)
        else:
            _encode(replace(job, rows_per_shard=rows_per_shard), passages, config, placement, workspace)
        if _state(job.passages) != before:
            raise CorpusError(f"{config.corpus!r} was replaced while it was embedded; embed it with --overwrite")

    return produce(
        "embed" if config.sample is None else "embed-sample",
        config,
        inputs={
            "retriever": model.fingerprint,
            "encoding": fingerprint(encoding.model_dump(mode="json")),
            "corpus": corpus.fingerprint,
            **_sampled_against(config),
        },
        identity={"rows_per_shard": rows_per_shard, "encoder": job.encoder["fingerprint"]},
        work=work,
    )


def _job(config: EmbedConfig, model: OpenModel, encoding: Encoding) -> EmbedJob:
    """Describe the work to the actors: model, encoding, types, places of input and output."""
    return EmbedJob(
        model_name=on_worker.model_name(model),
        base_name=on_worker.base_name(model),
        tokenizer=model.tokenizer_fingerprint,
        encoder=describe_encoder(model, encoding, config.dtype),
        encoding=encoding,
        dtype=config.dtype,
        vector_dtype=config.vector_dtype,
        batch_tokens=config.batch_tokens,
        passages=on_worker.absolute(Location(config.corpus)) / "passages",
        output=on_worker.absolute(Location(config.output)),
        max_left_out=config.max_left_out,
    )


def _state(passages: Location) -> str:
    """Return a fingerprint of names, sizes and times of a corpus's files, to detect that they were replaced."""
    return fingerprint([(name, info.size, info.mtime_ns) for name, info in passages.listing(".parquet")])


def _shape(model: OpenModel) -> ModelShape:
    return shape_of((model.base if model.is_adapter else model).read_json(CONFIG_NAME), model.name)


def _rows_per_shard(config: EmbedConfig, corpus: Artifact, model: OpenModel, encoding: Encoding) -> int:
    """Return the passages per shard: the option, or what a begun output already uses, or what suits the devices."""
    if config.rows_per_shard is not None:
        return config.rows_per_shard
    num_passages, output = corpus.manifest.counts["num_passages"], Location(config.output)
    if not config.overwrite:
        begun = begun_rows_per_shard(output)
        if begun:
            return begun
        if read_manifest(output):  # written by an older version without a ledger: the rule that it used
            return min(4096, max(MIN_SHARD_ROWS, num_passages // SHARDS))
    shape = _shape(model)
    num_bytes = corpus.manifest.counts["num_bytes"] / num_passages
    text = TextSize(min(num_bytes / _BYTES_PER_TOKEN + 1, float(encoding.max_passage_tokens)), num_bytes)
    return shard_rows(num_passages, text, shape, encoding.dimensions or shape.hidden, on_gpus=_on_gpus())


def _on_gpus() -> bool:
    """Return whether encoders compute on GPUs."""
    import ray

    if ray.is_initialized() or os.environ.get("RAY_ADDRESS"):
        return bool(connection.connect().num_gpus)
    import torch

    return torch.cuda.is_available()


def _resolve(config: EmbedConfig, num_passages: int) -> EmbedConfig:
    """Return the options with the folder of a sample, and with the dtype that auto chooses."""
    if config.sample is not None:
        sample_rows(config.sample, num_passages)
        config = config.model_copy(update={"output": Location(config.output).beside("-sample").uri})
    return config.model_copy(update={"dtype": encoding_dtype(config, config.dtype)})


def _open_retriever(config: EmbedConfig) -> tuple[OpenModel, Encoding]:
    """Find the model that encodes passages, and its encoding."""
    model = config.open_retriever()
    encoding = config.encoding or model.encoding
    if (passages := passages_model(model)) is not None:
        logger.info("embed: %s is only for queries; passages are encoded by %s", model.name, passages.name)
        model, encoding = passages.open(), config.encoding or passages.encoding
    if config.dimensions is not None:
        encoding = encoding.model_copy(update={"dimensions": config.dimensions})
    return model, encoding


def _check_retriever(model: OpenModel, encoding: Encoding) -> None:
    """Open weights and tokenizer here, so that an error is raised in seconds instead of in every actor."""
    from readapt_ray.retrieval.tokenization import TextTokenizer
    from readapt_ray.weights.loading import open_weights

    open_weights(model)
    TextTokenizer(model.tokenizer, encoding)


def _sampled_against(config: EmbedConfig) -> dict[str, str]:
    """Return `previous` as an input if it decides the result: it decides the report of a sample, but not vectors."""
    if config.sample is None or config.previous is None:
        return {}
    return {"previous": open_artifact(config.previous, "embed").fingerprint}


def _open_previous(config: EmbedConfig, encoder: dict[str, Any]) -> tuple[ParquetRows | None, ParquetRows | None]:
    """Open the earlier vectors. Return them first if they may be copied; second if a sample may only compare with them.

    Raises:
        FingerprintMismatchError: another encoder or `vector_dtype` made them, and this run is not a sample.
    """
    if config.previous is None:
        return None, None
    artifact = open_artifact(config.previous, "embed")
    there, vector_dtype = artifact.manifest.details["encoder"], artifact.manifest.details["vector_dtype"]
    folder = on_worker.absolute(artifact.location / "vectors")
    rows = ParquetRows(folder, open_vectors(artifact).counts)
    same_encoder = there["fingerprint"] == encoder["fingerprint"]
    if same_encoder and vector_dtype == config.vector_dtype:
        return rows, None
    if config.sample is not None:
        return None, rows
    if not same_encoder:
        raise FingerprintMismatchError(
            f"previous = {config.previous!r} was made by another encoder ({there['model']!r} in {there['dtype']}, "
            f"{there['fingerprint']}) than {encoder['model']!r} in {config.dtype} ({encoder['fingerprint']}); "
            f"leave it out to encode the whole corpus"
        )
    raise FingerprintMismatchError(
        f"previous = {config.previous!r} stores its vectors in {vector_dtype}; give --vector-dtype {vector_dtype}, "
        f"or leave it out to encode the whole corpus"
    )


def _encode(
    job: EmbedJob, passages: ParquetRows, config: EmbedConfig, placement: Placement, workspace: Workspace
) -> None:
    """Plan the shards, encode those that are missing, and put counts and details into the manifest."""
    shards, job, changes = _planned(job, passages, config)
    ledger = encode_shards(
        shards,
        job,
        placement,
        lambda done, total: workspace.progress(done, total, unit="passages"),
    )
    figures = ledger.figures
    workspace.counts |= {
        "num_vectors": ledger.num_vectors,
        "num_tokens": int(figures["num_tokens"].sum()),
        "num_bytes": int(figures["num_bytes"].sum()),
    }
    workspace.details |= {
        "encoder": {**job.encoder, "dimension": int(figures["dimension"][0])},
        "vector_dtype": job.vector_dtype,
        "num_dead": int(figures["num_dead"].sum()),
        "is_split": "split" in open_artifact(config.corpus, "ingest").manifest.details,
        **_tell_work(ledger, job),
        "left_out": _tell_left_out(ledger, config.max_left_out),
    }
    if changes is not None and job.matches is not None:
        workspace.details["changes"] = _tell_changes(changes, str(config.previous))
        workspace.details["previous"] = open_artifact(str(config.previous), "embed").fingerprint
        job.matches.remove()


def _planned(
    job: EmbedJob, passages: ParquetRows, config: EmbedConfig
) -> tuple[list[DataShard], EmbedJob, Changes | None]:
    """Plan the shards, on earlier vectors if they are given; refuse an output that was begun by another plan."""
    digests = {
        name: each.metadata.get(DIGEST) or ""
        for name, each in listed_footers(Location(config.corpus), "passages").items()
    }
    changes = None
    if job.earlier is None:
        shards = [
            replace(each, sources=sources_of(each, digests))
            for each in plan_shards(passages.counts, job.rows_per_shard)
        ]
    else:
        earlier = open_artifact(str(config.previous), "embed")
        shards, job, changes = plan_on_earlier(job, passages, digests, earlier)
    shard_ledger(shards, job).begin(config.previous, may_clear=config.overwrite)
    return shards, job, changes


def _tell_work(ledger: ShardLedger, job: EmbedJob) -> dict[str, Any]:
    """Return how the encoders spent their time and what truncation cut, summed over all runs that made these files."""
    total = {name: float(ledger.figures[name].sum()) for name in ledger.figures.dtype.names or ()}
    busy_s, waited_s = total["encode_s"], total["wait_s"]
    tokens, positions = total["num_tokens"], total["num_positions"]
    work = {
        "num_encoded": int(total["num_encoded"]),
        "num_copied": int(total["num_copied"]),
        "num_encoded_again": int(total["num_again"]),
        "encoder_seconds": round(busy_s, 3),
        "waiting_share": round(waited_s / max(busy_s + waited_s, 1e-9), 4),
        "padding_share": round(1 - tokens / positions, 4) if positions else 0.0,
    }
    lost = truncation.truncation(
        num_texts=int(work["num_encoded"]),
        num_truncated=int(total["num_truncated"]),
        num_tokens=int(tokens),
        num_lost=int(total["num_lost"]),
        max_tokens=job.encoding.max_passage_tokens,
        num_copied=int(work["num_copied"]),
    )
    if not positions:
        logger.info("embed: nothing was left to encode; %s vectors copied", f"{work['num_copied']:,}")
    else:
        logger.info(
            "embed: encoded %s; input wait %.1f%%, padding %.1f%%; %s",
            artifacts.counted({"num_texts": int(work["num_encoded"])}),
            100 * work["waiting_share"],
            100 * work["padding_share"],
            truncation.sentence(lost),
        )
    truncation.warn_of_loss(
        "embed", lost, "raise max_passage_tokens of the encoding, or split long passages with ingest's split_tokens"
    )
    return {"work": work, "truncation": lost}


def _tell_left_out(ledger: ShardLedger, max_left_out: int) -> list[str]:
    """Return the doc_ids of passages without a usable vector, and warn about them.

    Raises:
        CorpusError: there are more than `max_left_out`, or no passage has a usable vector.
    """
    doc_ids = ledger.left_out()
    if not doc_ids:
        return []
    named = ", ".join(map(repr, doc_ids[:10])) + " ..." * (len(doc_ids) > 10)
    if len(doc_ids) > max_left_out or not ledger.num_vectors:
        raise CorpusError(
            f"{len(doc_ids)} passages have vectors that are NaN, infinite or zero, also in float32 ({named}), and "
            f"max_left_out = {max_left_out}; look at them and at the model, or allow more with --max-left-out"
        )
    logger.warning("embed: left out, since their vectors are NaN, infinite or zero, also in float32: %s", named)
    return doc_ids


def _tell_changes(found: Changes, previous: str) -> dict[str, int]:
    changes = asdict(found)
    counted = ", ".join(f"{count:,} {name.removeprefix('num_')}" for name, count in changes.items())
    logger.info("embed: passages against %s: %s", previous, counted)
    return changes
