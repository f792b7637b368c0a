"""The export stage: send vectors to a vector database.

In: vectors and their corpus; optionally an earlier export. Out: a collection in the target, and a record of the rows
sent per file of vectors, `rows/part-00000.parquet` and so on. A Ray task sends one file of vectors. A killed run
resumes and does not send rows twice. The collection stores the fingerprints of the encoder and of the export, so that
vectors of two models are never mixed. Memory is one file of vectors and its passages per task, and 16 bytes per passage
(40 for an update) in Ray's object store, once per node.
"""

import logging
from dataclasses import asdict
from typing import Any, ClassVar, Self

import pyarrow as pa
from pydantic import Field, model_validator

from readapt_ray import artifact_files
from readapt_ray.artifacts import Artifact, Workspace, open_artifact, produce
from readapt_ray.cluster import on_worker
from readapt_ray.cluster.export_check import TOP_K, compare
from readapt_ray.cluster.export_parts import is_small, send_all
from readapt_ray.config import OptionError, StageConfig
from readapt_ray.errors import ArtifactConflictError, CorpusError, FingerprintMismatchError, InputError, TargetError
from readapt_ray.retrieval.footers import listed_footers, named_footers, row_counts
from readapt_ray.retrieval.parquet_rows import ParquetRows
from readapt_ray.retrieval.shard_ledger import open_vectors
from readapt_ray.targets.opening import open_target, parse
from readapt_ray.targets.sending import DELETED, ROWS, Done, ExportJob
from readapt_ray.targets.target import Layout, Record, Target

logger = logging.getLogger("readapt_ray")

_NOT_SENT = ("doc_id", "content_hash", "vector")
"""Columns of passages that are not sent as payload."""


class ExportConfig(StageConfig):
    """The options of `readapt export`."""

    vectors: str
    """Vectors: the output of `readapt embed`."""
    to: str
    """Where the vectors go: qdrant://HOST:6333/COLLECTION, lancedb:FOLDER/TABLE,
    postgresql://USER@HOST/DATABASE?table=TABLE, opensearch://HOST:9200/INDEX, milvus://HOST:19530/COLLECTION or
    files:FOLDER. Credentials are read from the environment."""
    corpus: str | None = None
    """Passages: the output of `readapt ingest` that the vectors were made of. Needed unless with_text is off."""
    previous: str | None = None
    """Output of an earlier export to the same collection. Only rows that changed since are sent, and rows that left the
    corpus are deleted. If omitted, the collection must not exist."""
    with_text: bool = True
    """Also send title, text and the other columns of the passages."""
    check: int = Field(default=20, ge=0)
    """Number of vectors of the corpus with which the target is queried at the end, to compare its ten best with exact
    search; 0 for none."""
    batch_rows: int = Field(default=256, ge=1)
    """Rows per request. Lower it if the database refuses requests as too large."""

    overwrite: bool = False
    """Replace a collection that holds another export, and an artifact in the output that was made or begun with other
    options. Without this both are refused. Data that readapt did not write is always refused."""

    inputs: ClassVar[frozenset[str]] = frozenset({"vectors", "corpus", "previous"})
    operational: ClassVar[frozenset[str]] = frozenset({"check", "batch_rows"})

    @model_validator(mode="after")
    def _text_needs_a_corpus(self) -> Self:
        if self.with_text and self.corpus is None:
            raise OptionError("give {corpus}, whose texts are sent along, or turn {with_text} off")
        parse(self.to)
        return self


def export(config: ExportConfig) -> Artifact:
    """Send vectors, with the texts of their passages, to a vector database.

    With `previous`, only changed rows are sent and removed ones deleted. A stopped run resumes, and does not send a
    complete file of vectors again. If the output says that this export is complete, nothing is done, and the collection
    is not checked.

    Raises:
        ArtifactMissingError: an input is not the output of its stage.
        FingerprintMismatchError: the collection, the corpus or `previous` belong to other vectors.
        ArtifactConflictError: the collection or the output folder holds something else.
        InputError: the target cannot index these vectors, its client is not installed, or `previous` does not match.
        CorpusError: the passages have other columns than those sent by `previous`.
        TargetError: the database cannot be reached or refuses a request, or rows are missing at the end.
    """
    source = open_artifact(config.vectors, "embed")
    corpus = _open_corpus(config, source)
    previous = _open_previous(config, source)
    inputs = {"vectors": source.fingerprint}
    inputs |= {name: each.fingerprint for name, each in (("corpus", corpus), ("previous", previous)) if each}

    def work(workspace: Workspace) -> None:
        job = _plan(config, source, corpus, previous, workspace)
        record = _record(source, job)
        with open_target(job.address) as target:
            target.check(job.layout)
            _claim(target, config, job, record, previous)
            max_writers = target.max_writers
        total = job.vectors.num_rows
        workspace.progress(0, total, unit="vectors")
        done = send_all(
            job, max_writers=max_writers, report=lambda number: workspace.progress(number, total, unit="vectors")
        )
        with open_target(job.address) as target:
            target.finish()
            _check_collection(target, job)
            _summarise(done, job, record, workspace)
            if config.check and total:
                _compare(target, config, source, job, workspace)
        _forget_deletions(job)

    return produce("export", config, inputs=inputs, work=work)


def _open_corpus(config: ExportConfig, source: Artifact) -> Artifact | None:
    if not config.with_text or config.corpus is None:
        return None
    corpus = open_artifact(config.corpus, "ingest")
    if corpus.fingerprint != source.manifest.inputs.get("corpus"):
        raise FingerprintMismatchError(
            f"{config.vectors!r} are not vectors of the corpus {config.corpus!r} as it is now; give the corpus that they were "
            f"made of, or embed this one"
        )
    return corpus


def _open_previous(config: ExportConfig, source: Artifact) -> Artifact | None:
    """Open the earlier export, if one is given. Refuse another encoder, another collection or another `with_text`."""
    if config.previous is None:
        return None
    previous = open_artifact(config.previous, "export")
    encoder = source.manifest.details["encoder"]
    there, now = previous.manifest.details, parse(config.to).uri
    if there["record"]["encoder"] != encoder["fingerprint"]:
        raise FingerprintMismatchError(
            f"previous = {config.previous!r} sent vectors of another encoder ({there['record']['model']!r}) than "
            f"{config.vectors!r} ({encoder['model']!r}); export these to another collection, without --previous"
        )
    if there["target"] != now:
        raise InputError(
            f"previous = {config.previous!r} was sent to {there['target']}, and this goes to {now}; give the same"
        )
    if previous.manifest.config["with_text"] != config.with_text:
        raise InputError(
            f"previous = {config.previous!r} was sent with with_text = {previous.manifest.config['with_text']}; give the same"
        )
    return previous


def _plan(
    config: ExportConfig, source: Artifact, corpus: Artifact | None, previous: Artifact | None, workspace: Workspace
) -> ExportJob:
    """Read the footers of all input files, and describe the work to the tasks."""
    vectors = open_vectors(source)
    vectors = ParquetRows(on_worker.absolute(vectors.folder), vectors.counts)
    passages, payload = None, pa.schema([])
    if corpus is not None:
        folder = on_worker.absolute(corpus.location / "passages")
        footers = listed_footers(corpus.location, "passages")
        passages = ParquetRows(folder, row_counts(footers))
        payload = next(iter(footers.values())).schema.remove_metadata()
        payload = pa.schema([each for each in payload if each.name not in _NOT_SENT])
        if previous is not None and payload.names != previous.manifest.details["record"]["columns"]:
            raise CorpusError(
                f"the passages have the columns {payload.names}, and the passages of previous = {config.previous!r} had "
                f"{previous.manifest.details['record']['columns']}; export to another collection, without --previous"
            )
    return ExportJob(
        address=parse(config.to),
        fingerprint=workspace.fingerprint,
        layout=Layout(
            dimension=int(source.manifest.details["encoder"]["dimension"]),
            vector_dtype=source.manifest.details.get("vector_dtype", "float32"),
            payload=payload,
        ),
        vectors=vectors,
        passages=passages,
        previous=_open_rows(previous, ROWS) if previous else None,
        output=on_worker.absolute(workspace.location),
        batch_rows=config.batch_rows,
    )


def _open_rows(artifact: Artifact, name: str) -> ParquetRows:
    folder = on_worker.absolute(artifact.location / name)
    return ParquetRows(folder, row_counts(named_footers(folder)))


def _record(source: Artifact, job: ExportJob) -> Record:
    encoder = source.manifest.details["encoder"]
    return {
        "encoder": encoder["fingerprint"],
        "model": encoder["model"],
        "dimension": job.layout.dimension,
        "columns": job.layout.payload.names,
        "export": job.fingerprint,
    }


def _claim(target: Target, config: ExportConfig, job: ExportJob, record: Record, previous: Artifact | None) -> None:
    """Create the collection, or continue with an existing one of this or the previous export; refuse any other.

    Raises:
        FingerprintMismatchError: the collection holds vectors of another model.
        ArtifactConflictError: the collection holds another export, or data that readapt did not write.
        InputError: the collection was removed or changed since `previous`.
    """
    there = target.record()
    if there is not None and there.get("export") == job.fingerprint:
        return
    if there is not None and not there:
        raise ArtifactConflictError(
            f"{job.address.uri} is there, and readapt did not write it; give the name of a new collection"
        )
    if previous is not None:
        if there is None or there["export"] != previous.fingerprint:
            raise InputError(
                f"{job.address.uri} {'is gone' if there is None else 'was written by another export since'}, so previous = "
                f"{config.previous!r} does not say what it holds; export to a new collection, without --previous"
            )
        target.set_record(record)
        return
    if there is not None:
        _refuse_what_is_there(config, job, record, there)
        target.drop()
    # Records in the output describe a collection that no longer exists.
    artifact_files.clear(job.output, artifact_files.STAGE_FILES["export"])
    target.create(job.layout, record)


def _refuse_what_is_there(config: ExportConfig, job: ExportJob, record: Record, there: Record) -> None:
    if config.overwrite:
        return
    if there["encoder"] != record["encoder"]:
        raise FingerprintMismatchError(
            f"{job.address.uri} holds vectors of another encoder ({there['model']!r}, {there['encoder']}) than these "
            f"({record['model']!r}, {record['encoder']}); export to another collection, or --overwrite to replace it"
        )
    raise ArtifactConflictError(
        f"{job.address.uri} holds another export of the same encoder; give the output of that export as --previous to send "
        f"what changed, or another collection, or --overwrite to replace it"
    )


def _check_collection(target: Target, job: ExportJob) -> None:
    if (target.record() or {}).get("export") != job.fingerprint:
        raise TargetError(
            f"{job.address.uri} was taken by another export in between; remove the collection and run one of them again"
        )
    found, due = target.count(), job.vectors.num_rows
    if found < due:
        raise TargetError(
            f"{job.address.uri} holds {found:,} rows, and {due:,} were sent: rows were deleted in between; remove the collection "
            f"and run the same command again"
        )
    if found > due:
        logger.warning("export: %s holds %s rows that are not of this corpus", job.address.uri, f"{found - due:,}")


def _summarise(done: Done, job: ExportJob, record: Record, workspace: Workspace) -> None:
    workspace.counts |= {
        "num_vectors": done.num_rows,
        "num_sent": done.num_sent,
        "num_deleted": done.num_deleted,
    }
    workspace.details |= {"target": job.address.uri, "record": dict(record)}
    if job.previous is not None:
        changes = {
            "num_unchanged": done.num_rows - done.num_sent,
            "num_changed": done.num_sent - done.num_new,
            "num_new": done.num_new,
            "num_deleted": done.num_deleted,
        }
        workspace.details["changes"] = changes
        counted = ", ".join(f"{count:,} {name.removeprefix('num_')}" for name, count in changes.items())
        logger.info("export: rows against the previous export: %s", counted)


def _forget_deletions(job: ExportJob) -> None:
    """Remove the lists of deleted ids. Only a resumed export needs them, and the corpus no longer has these ids."""
    artifact_files.clear(job.output, (f"{DELETED}/part-#.parquet",))


def _compare(target: Target, config: ExportConfig, source: Artifact, job: ExportJob, workspace: Workspace) -> None:
    found: dict[str, Any] = asdict(compare(target, source, job.vectors, config.check, is_small=is_small(job)))
    workspace.details["check"] = found
    logger.info(
        "export: %.1f%% of the %d best of exact search are found by the target, %.0f%% for the worst of %d queries",
        100 * found["overlap_at_10"],
        TOP_K,
        100 * found["lowest"],
        found["num_queries"],
    )
