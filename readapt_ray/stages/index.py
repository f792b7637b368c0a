"""The index stage: build a FAISS index from vectors, in shards.

In: vectors; optionally an index of an earlier state of them. Out: `shards/00000.faiss`, `shards/00000.ids.parquet` and
so on. One Ray task builds each shard and writes it as a whole, so a killed run resumes with the missing shards.
Inverted lists and codebooks are trained once, on a sample of all vectors (`shards/trained.faiss`), so that shards can
be merged for search. The tasks measure the recall of approximate shards with queries, against exact search. All shards
get the smallest depth with which they reach the wanted recall together; if none does, the index is refused.

An update of an earlier index keeps its shards: vectors of deleted passages are masked, and new vectors go into new
shards. A shard that lost a fifth of its vectors is dropped, and its remaining vectors go into the new shards; so do
small shards once there are more than 16. A task holds its shard as FAISS stores it, and a second copy while it is
written. The driver holds a line per file of vectors.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from readapt_ray.artifacts import Artifact, Workspace, open_artifact, produce, read_manifest
from readapt_ray.cluster import on_worker
from readapt_ray.cluster.bm25_shards import build_word_shards
from readapt_ray.cluster.index_shards import (
    RECALL_SUFFIX,
    TRAINED_NAME,
    UNTRAINED,
    KeptShard,
    NewShard,
    ShardPlan,
    build_shards,
    cut_shards,
    measured_with_vectors,
    task_cpus,
    train_once,
    write_recall_queries,
)
from readapt_ray.cluster.recall_queries import corpus_of, recall_queries
from readapt_ray.config import OptionError, StageConfig, UsedWith
from readapt_ray.errors import FingerprintMismatchError
from readapt_ray.retrieval.bm25 import import_bm25s
from readapt_ray.retrieval.index_kinds import (
    IndexOptions,
    IndexSpec,
    choose,
    default_storage,
    index_spec,
    is_flat,
    same_codes,
    shard_rows,
)
from readapt_ray.retrieval.parquet_rows import ParquetRows
from readapt_ray.retrieval.shard_ledger import open_vectors
from readapt_ray.retrieval.shard_plan import scan_vectors
from readapt_ray.retrieval.vector_changes import changed_files
from readapt_ray.storage import Location

if TYPE_CHECKING:
    from readapt_ray.retrieval.index_files import ShardRecord

logger = logging.getLogger("readapt_ray")

_STALE_SHARE = 0.2
"""Share of deleted and added vectors above which a warning advises to build the index from scratch."""


class IndexConfig(StageConfig):
    """The options of `readapt index`."""

    vectors: str
    """Vectors: the output of `readapt embed`."""
    previous: str | None = None
    """Index of an earlier state of the corpus to update. If omitted, the index is built from scratch."""
    kind: Literal["auto", "flat", "ivf-flat", "ivf-pq", "hnsw", "rabitq"] = "flat"
    """Kind of index. flat searches exactly; the others trade recall for speed or memory; auto chooses by size,
    memory and recall."""
    storage: Literal["float32", "float16", "int8"] | None = None
    """How vectors are stored in flat, ivf-flat and hnsw, and in ivf-pq and rabitq for ranking candidates again. If
    omitted, float16 in a flat index of float16 vectors, which loses nothing, and float32 elsewhere."""
    refine: bool = True
    """Keep the vectors beside the codes of ivf-pq and rabitq, to rank the candidates again by exact scores."""
    code_bytes: int | None = Field(default=None, ge=1)
    """Bytes per code of ivf-pq. If omitted, a quarter of the dimension."""
    factory: str | None = None
    """FAISS factory string, used unchanged instead of kind."""
    depth: int | None = Field(default=None, ge=1)
    """nprobe (ivf) or efSearch (hnsw). If omitted, the smallest value that reaches min_recall."""
    min_recall: float = Field(default=0.95, gt=0, le=1)
    """Fraction of the exact top 10, and of the top 100, that an approximate index must find, else it is refused. It is
    measured with the queries of the corpus, or with pieces of its passages if it has none."""
    memory_gb: float | None = Field(default=None, gt=0)
    """Maximum memory of the loaded index in GB, used when kind is auto. If omitted, no limit."""
    bm25: bool = False
    """Also index the words of the passages, for `search --mode bm25` and `hybrid`. The corpus of the vectors is read."""
    rows_per_shard: int | None = Field(default=None, ge=1)
    """Vectors per index shard. If omitted, as many as take 512 MiB in a flat index, and 1 to 4 million in others."""

    inputs: ClassVar[frozenset[str]] = frozenset({"vectors", "previous"})
    safety: ClassVar[frozenset[str]] = StageConfig.safety | {"min_recall"}
    used_with: ClassVar[UsedWith] = {
        "code_bytes": ("kind", ("ivf-pq",)),
        "refine": ("kind", ("ivf-pq", "rabitq")),
        "memory_gb": ("kind", ("auto",)),
    }

    @model_validator(mode="after")
    def _refuse_replaced_options(self) -> Self:
        """Refuse options that a factory, the kind auto or the kind flat leaves without effect."""
        why, idle = "", list[str]()
        if self.factory is not None:
            why, idle = "{factory}, which is used unchanged", ["storage", "refine", "code_bytes", "memory_gb"]
        elif self.kind == "auto":
            why, idle = "{kind} = 'auto', which chooses it", ["storage", "depth"]
        elif self.kind == "flat":
            why, idle = "{kind} = 'flat', which compares every vector", ["depth"]
        for name in idle:
            if getattr(self, name) != type(self).model_fields[name].get_default():
                raise OptionError(f"{{{name}}} does nothing with {why}; leave one out")
        return self


def index(config: IndexConfig) -> Artifact:
    """Build a FAISS index from vectors, or update an earlier one.

    `previous` itself is not changed: its shards are shared or copied into the output. A killed run resumes with the
    missing shards. Does nothing if the output is complete and of the same options and inputs.

    Raises:
        ArtifactMissingError: the vectors are no output of `readapt embed`, or `previous` no output of `readapt index`.
        FingerprintMismatchError: `previous` is an index of another model's vectors, or of another kind.
        CorruptFileError: a file of vectors was cut short, altered, or made by another model.
        InputError: bm25s is not installed; or the kind does not fit the vectors or `memory_gb`, or does not reach
            `min_recall`. The message says which option to change.
        ArtifactConflictError: the output folder holds another index.
    """
    source = open_artifact(config.vectors, "embed")
    encoder = source.manifest.details["encoder"]
    dimension = int(encoder["dimension"])
    num_vectors = int(source.manifest.counts["num_vectors"])
    options = index_options(config, num_vectors, dimension, source.manifest.details.get("vector_dtype"))
    if config.kind == "auto" and config.factory is None:
        logger.info("index: auto is %s in %s for %s vectors", options.kind, options.storage, f"{num_vectors:,}")
    rows_per_shard = config.rows_per_shard or shard_rows(options, num_vectors, dimension)
    spec = index_spec(options, num_vectors, dimension)
    previous = _open_previous(config, encoder, options, spec)
    if config.bm25:
        import_bm25s()
    # If the index is finished, its manifest says so. Reading 244,000 footers on an object store would take minutes.
    opened = _open_vectors(source) if read_manifest(config.output) is None else None

    def work(workspace: Workspace) -> None:
        vectors = opened or _open_vectors(source)
        corpus = corpus_of(source) if config.bm25 else None
        shards = on_worker.absolute(workspace.location) / "shards"
        kept, rows = _split_rows(previous, source, vectors, shards)
        plan = ShardPlan(spec, options, dimension, encoder["fingerprint"], shards, num_cpus=1)
        if len(rows):
            plan = _prepared(plan, previous, NewShard(0, 0, vectors, rows, plan), rows_per_shard, source)
        new = cut_shards(
            plan, vectors, rows, rows_per_shard, first=1 + max((int(each.name) for each in kept), default=-1)
        )
        records = build_shards([*kept, *new], plan, workspace)
        _summarise(_settled(records, len(kept), plan, workspace), len(kept), encoder, options, workspace)
        workspace.details |= _details_of(source)
        if corpus is not None:
            workspace.details["bm25"] = build_word_shards(records, shards, corpus, workspace)

    return produce(
        "index",
        config,
        inputs={"vectors": source.fingerprint} | ({"previous": previous.fingerprint} if previous else {}),
        identity={"rows_per_shard": rows_per_shard},
        work=work,
    )


def _details_of(vectors: Artifact) -> dict[str, Any]:
    """Copy from the vectors' manifest what later stages must know: split documents and truncation."""
    details = vectors.manifest.details
    truncation = {name: details[name] for name in ("truncation",) if name in details}
    return {"is_split": bool(details.get("is_split")), **truncation}


def _open_previous(
    config: IndexConfig, encoder: dict[str, Any], options: IndexOptions, spec: IndexSpec
) -> Artifact | None:
    """Open the earlier index, if one is given. Refuse another encoder, or shards of another kind than the new ones."""
    if config.previous is None:
        return None
    previous = open_artifact(config.previous, "index")
    details, made_with = previous.manifest.details, previous.manifest.config
    if details["encoder"]["fingerprint"] != encoder["fingerprint"]:
        raise FingerprintMismatchError(
            f"previous = {config.previous!r} is an index of vectors of another encoder "
            f"({details['encoder']['model']!r}) than {config.vectors!r} ({encoder['model']!r}); "
            f"leave it out to build afresh"
        )
    there = (
        made_with.get("factory"),
        details.get("asked_kind", details["kind"]),
        details.get("storage", made_with["storage"]),
    )
    now = (options.factory, options.kind, options.storage)
    if there != now:
        raise FingerprintMismatchError(
            f"previous = {made_with['output']!r} is {_kind_in_words(*there)}, and this index would be "
            f"{_kind_in_words(*now)}; ask for what it is, or leave it out to build afresh"
        )
    factory = details["shards"][-1]["factory"]
    if options.factory is None and not (is_flat(factory) or is_flat(spec.factory) or same_codes(factory, spec.factory)):
        raise FingerprintMismatchError(
            f"previous = {made_with['output']!r} is {factory!r}, and this index would be {spec.factory!r}; ask for the same "
            f"code_bytes and refine, or leave it out to build afresh"
        )
    return previous


def index_options(config: IndexConfig, num_vectors: int, dimension: int, vector_dtype: str | None) -> IndexOptions:
    """Resolve the options of an index: choose kind and storage if `kind` is auto, and fill in the storage otherwise.

    Args:
        config: the options. A `factory` is used as it is, also if `kind` is auto.
        num_vectors: number of vectors to index.
        dimension: dimension of the vectors.
        vector_dtype: type that the vectors are stored in; None if unknown.

    Raises:
        InputError: no kind fits into `memory_gb`.
    """
    if config.kind == "auto" and config.factory is None:
        memory_bytes = None if config.memory_gb is None else config.memory_gb * 1e9
        return choose(num_vectors, dimension, memory_bytes=memory_bytes, min_recall=config.min_recall)
    storage = config.storage or default_storage(config.kind, vector_dtype)
    names = ("kind", "refine", "code_bytes", "factory", "depth", "min_recall")
    values = {name: getattr(config, name) for name in names}
    return IndexOptions(storage=storage, is_lossless=vector_dtype == storage == "float16", **values)


def _kind_in_words(factory: str | None, kind: str, storage: str) -> str:
    return repr(factory) if factory is not None else f"{kind} in {storage}"


def _open_vectors(source: Artifact) -> ParquetRows:
    vectors = open_vectors(source)
    return ParquetRows(on_worker.absolute(vectors.folder), vectors.counts)


def _split_rows(
    previous: Artifact | None, source: Artifact, vectors: ParquetRows, shards: Location
) -> tuple[list[KeptShard], NDArray[np.int64] | range]:
    """Return the shards of an earlier index to keep, with their valid vectors; and the rows of vectors to add."""
    if previous is None:
        return [], range(vectors.num_rows)
    from readapt_ray.retrieval.index_changes import kept_and_added, kept_and_added_by_changes
    from readapt_ray.retrieval.index_files import ShardRecord

    folder = on_worker.absolute(previous.location / "shards")
    records = [ShardRecord(**record) for record in previous.manifest.details["shards"]]
    changed, found = changed_files(source, vectors, previous.manifest.inputs["vectors"]), None
    if changed is not None:
        before, now = (scan_vectors(each.folder, each.counts) for each in (changed.before, changed.now))
        found = kept_and_added_by_changes(before, now, vectors.num_rows, folder, records)
    if changed is not None and found is not None:
        stay, rows = found[0], changed.rows[found[1]]
    else:
        stay, rows = kept_and_added(scan_vectors(vectors.folder, vectors.counts), folder, records)
    encoder = source.manifest.details["encoder"]["fingerprint"]
    return [KeptShard(asdict(record), mask, encoder, folder, shards) for record, mask in stay], rows


def _prepared(
    plan: ShardPlan, previous: Artifact | None, everything: NewShard, rows_per_shard: int, source: Artifact
) -> ShardPlan:
    """Train inverted lists and codebooks, or copy the earlier index's; store the queries for measuring recall."""
    num_rows = len(everything.rows)
    earlier = previous.location / "shards" / TRAINED_NAME if previous else None
    if previous is not None and earlier is not None and earlier.is_file():
        earlier.copy_to(plan.shards / TRAINED_NAME)
        factory = previous.manifest.details["shards"][-1]["factory"]
        plan = replace(plan, spec=replace(plan.spec, factory=factory))
    elif previous is not None:
        plan = replace(plan, spec=index_spec(plan.options, num_rows, plan.dimension))
    if plan.spec.is_exact and plan.spec.factory in UNTRAINED:
        return plan
    plan = replace(plan, num_cpus=task_cpus(plan, min(num_rows, rows_per_shard)))
    if not plan.spec.is_exact:
        write_recall_queries(plan, lambda: recall_queries(source))
    train_once(replace(everything, plan=plan))
    return plan


def _settled(
    records: Sequence["ShardRecord"], num_kept: int, plan: ShardPlan, workspace: Workspace
) -> list[dict[str, Any]]:
    """Give all new shards the smallest depth at which they reach the wanted recall together."""
    from readapt_ray.retrieval.index_recall import ShardRecall, choose_depth

    made = [asdict(record) for record in records]
    if plan.spec.is_exact or len(made) == num_kept:
        return made
    files = (plan.shards / f"{each['name']}{RECALL_SUFFIX}" for each in made[num_kept:])
    measured = choose_depth((ShardRecall.from_bytes(file.read_bytes()) for file in files), plan.spec, plan.options)
    for each in made[num_kept:]:
        each |= {"measured": asdict(measured), "depth": measured.depth}
    workspace.details["measured"] = {
        "recall_at_10": round(measured.recall_at_10, 4),
        "recall_at_100": round(measured.recall_at_100, 4),
        "query_ms": round(measured.query_ms, 4),
        "with_queries": not measured_with_vectors(plan),
    }
    return made


def _summarise(
    records: list[dict[str, Any]], num_kept: int, encoder: dict[str, Any], options: IndexOptions, workspace: Workspace
) -> None:
    num_vectors = sum(record["num_vectors"] for record in records)
    num_deleted = sum(record["num_deleted"] for record in records)
    num_bytes = sum(record["num_bytes"] for record in records)
    workspace.counts |= {
        "num_vectors": num_vectors - num_deleted,
        "num_shards": len(records),
        "num_bytes": num_bytes,
    }
    built = options.kind
    if built != "flat" and options.factory is None and all(is_flat(record["factory"]) for record in records):
        built = f"flat (too few vectors for {options.kind})"
        logger.info("index: %s vectors are too few for %s, so the index is flat", f"{num_vectors:,}", options.kind)
    workspace.details |= {"encoder": encoder, "kind": built, "asked_kind": options.kind}
    workspace.details |= {"storage": options.storage, "shards": records}
    if "measured" in workspace.details:
        measured = workspace.details["measured"] | {"bytes_per_vector": round(num_bytes / max(1, num_vectors), 1)}
        workspace.details["measured"] = measured
        logger.info(
            "index: %.1f%% of the 10 best are found and %.1f%% of the 100 best, %.2f ms a query, %.0f bytes a vector",
            100 * measured["recall_at_10"],
            100 * measured["recall_at_100"],
            measured["query_ms"],
            measured["bytes_per_vector"],
        )
    if num_kept:
        num_added = sum(record["num_vectors"] for record in records[num_kept:])
        workspace.details["changes"] = {"num_deleted": num_deleted, "num_added": num_added}
        logger.info("index: %s vectors added, %s deleted ones left in place", f"{num_added:,}", f"{num_deleted:,}")
        if num_added + num_deleted > _STALE_SHARE * num_vectors:
            logger.warning("index: much of it is deleted or added; build it without --previous to compact it")
