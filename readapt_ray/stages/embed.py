"""The embed stage: passages become vectors, a numbered data shard at a time.

In: a corpus and a retriever. Out: `vectors/part-00000.parquet` and so on. A shard is read, encoded
and written whole by one actor, so what was committed before a kill is not computed again, and every
passage stands once. Two CPU cores encode some 120 passages of 85 tokens a second with
all-MiniLM-L6-v2; memory is a shard and the model an actor.
"""

import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from readapt_ray import errors
from readapt_ray.artifacts import Artifact, Workspace, fingerprint, open_artifact, produce
from readapt_ray.catalog.models import Model, encoding_of, find_model
from readapt_ray.catalog.retrievers import Encoding
from readapt_ray.config import StageConfig
from readapt_ray.errors import CorpusError, CorruptFileError
from readapt_ray.retrieval.templates import EncodingOption
from readapt_ray.retrieval.vector_files import Footer, cut, read_footer, read_rows
from readapt_ray.stages import cluster, elsewhere
from readapt_ray.stages.shard_encoder import PASSAGE_COLUMNS, DataShard, EmbedJob, ShardEncoder
from readapt_ray.storage import Location

logger = logging.getLogger("readapt_ray")

_MIN_SHARD_ROWS = 256
_MAX_SHARD_ROWS = 4096
_FOOTER_THREADS = 16
_MAX_VAIN_STARTS = 3


class EmbedConfig(StageConfig):
    """The options of `readapt embed`."""

    retriever: str
    """The model that makes the vectors: catalog name, folder, URI or hub id."""
    corpus: str
    """The output folder of `readapt ingest`."""
    encoding: EncodingOption = None
    """How the retriever wants its text, as a JSON file; by default what its folder or the catalog says."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Type that the model computes in."""
    vector_dtype: Literal["float32", "float16"] = "float32"
    """Type that the vectors are stored in."""
    rows_per_shard: int | None = Field(default=None, ge=1)
    """Passages in a data shard, the unit of work; by default a sixteenth of the corpus, from 256 to 4,096."""
    num_workers: int | None = Field(default=None, ge=1)
    """Actors that encode; by default one a GPU, and on a cluster without GPUs one for each `num_cpus_per_worker`."""
    num_cpus_per_worker: int | None = Field(default=None, ge=1)
    """CPUs, and so threads, of an actor; by default 1."""
    batch_tokens: int | None = Field(default=None, ge=1)
    """Tokens in a batch at most, padding included; by default 1,024 on a CPU and 16,384 on a GPU."""

    inputs: ClassVar[frozenset[str]] = frozenset({"retriever", "corpus", "encoding"})
    operational: ClassVar[frozenset[str]] = frozenset({"num_workers", "num_cpus_per_worker", "batch_tokens"})


def embed(config: EmbedConfig) -> Artifact:
    """Encode a corpus.

    Raises:
        ArtifactMissingError: the corpus is not the output of `readapt ingest`.
        CorpusError: it is empty, lacks a column, or a doc_id stands in it twice; or a passage gives no vector.
        ModelError: the retriever is not a model, or cannot be used with its encoding.
        CorruptFileError: a file of the corpus was cut short or altered.
        PlacementError: the cluster does not have what the actors ask for.
        ArtifactConflictError: the output holds vectors of another model or corpus.
    """
    corpus = open_artifact(config.corpus, "ingest")
    model = find_model(config.retriever)
    encoding = config.encoding or encoding_of(model)
    _check_model(model, encoding)
    passages = corpus.location / "passages"
    counts = _count_rows(passages)
    num_passages = sum(count for _, count in counts)
    if num_passages == 0:
        raise CorpusError(f"{config.corpus!r} has no passages; ingest a corpus that has some")
    rows_per_shard = config.rows_per_shard or min(_MAX_SHARD_ROWS, max(_MIN_SHARD_ROWS, num_passages // 16))
    encoder = describe_encoder(model, encoding, config.dtype)

    def work(workspace: Workspace) -> None:
        ranges = cut(counts, rows_per_shard)
        shards = [DataShard(number, tuple(each)) for number, each in enumerate(ranges)]
        _check_unique_ids(passages, counts)
        job = EmbedJob(
            model_name=elsewhere.model_name(model),
            weights=model.fingerprint(),
            node_id="",
            encoder=encoder,
            encoding=encoding,
            dtype=config.dtype,
            vector_dtype=config.vector_dtype,
            batch_tokens=config.batch_tokens,
            num_threads=1,
            passages=elsewhere.absolute(passages),
            vectors=elsewhere.absolute(workspace.location) / "vectors",
        )
        _encode_shards(shards, job, config, workspace)
        _summarise(shards, job, workspace)

    return produce(
        "embed",
        config,
        inputs={
            "retriever": model.fingerprint(),
            "encoding": fingerprint(encoding.model_dump(mode="json")),
            "corpus": corpus.fingerprint,
        },
        identity={"rows_per_shard": rows_per_shard, "encoder": encoder["fingerprint"]},
        work=work,
    )


def describe_encoder(model: Model, encoding: Encoding, dtype: str) -> dict[str, Any]:
    """What a vector file and a manifest say of the model that made them."""
    from readapt_ray.retrieval.encoder import encoder_fingerprint

    return {
        "fingerprint": encoder_fingerprint(model, encoding, dtype),
        "model": model.name,
        "dtype": dtype,
        "encoding": encoding.model_dump(mode="json"),
    }


def _check_model(model: Model, encoding: Encoding) -> None:
    """Find out in the driver, in seconds, what would otherwise stop every actor."""
    from readapt_ray.catalog.models import load_tokenizer
    from readapt_ray.retrieval.templates import TextTokenizer
    from readapt_ray.weights.checkpoint import Checkpoint

    holder = model.base() if model.is_adapter else model
    Checkpoint(holder.folder, name=holder.name)
    TextTokenizer(load_tokenizer(model), encoding)


def _count_rows(passages: Location) -> list[tuple[str, int]]:
    """Name and number of rows of each passages file; their ends are read, so a truncated one is found here."""
    names = [name for name, _ in passages.listing(".parquet")]
    with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
        footers = list(pool.map(lambda name: read_footer(passages / name), names))
    for name, footer in zip(names, footers, strict=True):
        missing = [column for column in PASSAGE_COLUMNS if column not in footer.schema.names]
        if missing:
            raise CorpusError(
                f"{passages / name} lacks the columns {missing}; it has {footer.schema.names}: ingest the corpus again"
            )
    return [(name, footer.num_rows) for name, footer in zip(names, footers, strict=True)]


def _check_unique_ids(passages: Location, counts: Sequence[tuple[str, int]]) -> None:
    """Refuse a corpus where a doc_id stands twice: 8 bytes a passage, some seconds for ten million."""
    hashes = np.concatenate([_id_hashes(_ids(passages, name, count)) for name, count in counts if count])
    ordered = np.sort(hashes)
    suspects = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    if not suspects:
        return
    seen: dict[str, str] = {}
    for name, count in counts:
        for doc_id in _ids(passages, name, count):
            if doc_id is None or hash(doc_id) in suspects:
                if doc_id is None or doc_id in seen:
                    first = f"stands in {seen.get(str(doc_id), name)} and again in {name}" if doc_id else "is missing"
                    raise CorpusError(f"doc_id {doc_id!r} {first} of {passages}; ingest the corpus again")
                seen[doc_id] = name


def _ids(passages: Location, name: str, count: int) -> list[str | None]:
    return list(read_rows(passages / name, 0, count, ("doc_id",))["doc_id"].to_pylist())


def _id_hashes(doc_ids: Sequence[str | None]) -> np.ndarray:
    return np.fromiter(map(hash, doc_ids), np.int64, len(doc_ids))


def _encode_shards(shards: Sequence[DataShard], job: EmbedJob, config: EmbedConfig, workspace: Workspace) -> None:
    """Encode what has no file yet, showing progress as shards come in; go on with what is left when an actor dies."""
    total = sum(shard.num_rows for shard in shards)
    vain = 0
    while pending := _pending(shards, job):
        done = total - sum(shard.num_rows for shard in pending)
        workspace.progress(done, total, unit="passages")
        vain += 1
        try:
            for num_rows in _results(pending, job, config):
                vain = 0
                done += num_rows
                workspace.progress(done, total, unit="passages")
        except errors.WorkerError as error:
            if vain >= _MAX_VAIN_STARTS:
                raise
            logger.warning("%s; the actors are started again for what is left", error)
        else:
            _check_written(shards, job)


def _check_written(shards: Sequence[DataShard], job: EmbedJob) -> None:
    lost = [shard.name for shard in _pending(shards, job)]
    if lost:
        raise CorruptFileError(
            f"{len(lost)} files were written to {job.vectors} and are not there, {lost[0]} first; see what removes them, "
            f"and run `readapt embed` again"
        )


def _pending(shards: Sequence[DataShard], job: EmbedJob) -> list[DataShard]:
    """The shards whose file is not there, or is not one that this job would have written."""
    there = {name for name, _ in job.vectors.listing(".parquet")}
    found = [shard for shard in shards if shard.name in there]
    with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
        whole = dict(zip(found, pool.map(lambda shard: _is_whole(shard, job), found), strict=True))
    return [shard for shard in shards if not whole.get(shard, False)]


def _is_whole(shard: DataShard, job: EmbedJob) -> bool:
    try:
        footer = read_footer(job.vectors / shard.name)
    except CorruptFileError as error:
        logger.warning("%s; it is computed again", error)
        return False
    return footer.num_rows == shard.num_rows and _made_by(footer) == job.encoder["fingerprint"]


def _made_by(footer: Footer) -> str:
    return str(footer.metadata.get("encoder", {}).get("fingerprint", ""))


def _results(pending: Sequence[DataShard], job: EmbedJob, config: EmbedConfig) -> Iterator[int]:
    """The number of passages of each shard, as it is written."""
    num_nodes = cluster.connect().num_nodes
    num_workers, num_cpus, num_gpus = _placement(config, len(pending))
    import ray
    from ray.data import ActorPoolStrategy
    from ray.exceptions import RayError
    from ray.util.annotations import RayDeprecationWarning

    node_id = ray.get_runtime_context().get_node_id()
    placed = EmbedJob(**{**vars(job), "num_threads": num_cpus, "node_id": node_id})
    items = [
        {"number": shard.number, "ranges": json.dumps([asdict(each) for each in shard.ranges])} for shard in pending
    ]
    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    dataset.context.execution_no_progress_timeout_s = -1
    # With restarts, Ray prints a line of its own on the user's terminal. On one machine we do without, and
    # `_encode_shards` starts again; on several, one lost node must not stop the actors of the others.
    restarts = {} if num_nodes > 1 else {"max_restarts": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RayDeprecationWarning)  # Ray 2.64 will need another way to say it
        written = dataset.map_batches(
            ShardEncoder,
            fn_constructor_args=(placed,),
            batch_size=1,
            compute=ActorPoolStrategy(size=num_workers),
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            **restarts,
        )
    try:
        for batch in written.iter_batches(batch_size=None, prefetch_batches=0):
            for kind, message in zip(batch["error"].tolist(), batch["message"].tolist(), strict=True):
                if kind:
                    raise getattr(errors, kind)(message)
            yield int(batch["num_rows"].sum())
    except RayError as error:
        raise cluster.cause_of(error) from None


def _placement(config: EmbedConfig, num_pending: int) -> tuple[int, int, int]:
    """Actors, CPUs of each and GPUs of each.

    Raises:
        PlacementError: the cluster does not have that much.
    """
    total = cluster.connect()
    num_cpus = config.num_cpus_per_worker or 1
    most = total.num_gpus or total.num_cpus // num_cpus
    num_workers = config.num_workers or max(1, min(most, num_pending))
    num_gpus = 1 if total.num_gpus else 0
    cluster.check_placement(num_workers, {"CPU": num_cpus, "GPU": num_gpus}, who="actors")
    return num_workers, num_cpus, num_gpus


def _summarise(shards: Sequence[DataShard], job: EmbedJob, workspace: Workspace) -> None:
    """Verify what lies there, and put its counts into the manifest."""
    with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
        footers = list(pool.map(lambda shard: read_footer(job.vectors / shard.name), shards))
    workspace.counts |= {
        "num_vectors": sum(footer.num_rows for footer in footers),
        "num_tokens": sum(int(footer.metadata["num_tokens"]) for footer in footers),
        "num_bytes": sum(footer.num_bytes for footer in footers),
    }
    workspace.details |= {
        "encoder": {**job.encoder, "dimension": footers[0].dimension},
        "vector_dtype": job.vector_dtype,
    }
