"""The index stage: vectors become FAISS shards.

In: vectors, and an earlier index of them where there is one. Out: `shards/00000.faiss` and
`shards/00000.ids.parquet` and so on, each built by one Ray task and committed whole, so what was built before
a kill is not built again. A shard that is not exact is measured against exact search by the task that builds
it, and refused where it finds too little. On an earlier index nothing is built again: what left the corpus is
no longer found, and what came is a shard of its own. Memory is about three times a shard's vectors a task.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from readapt_ray.artifacts import Artifact, Workspace, open_artifact, produce
from readapt_ray.cluster import connection, on_worker
from readapt_ray.cluster.bounded_tasks import run_bounded
from readapt_ray.config import StageConfig
from readapt_ray.errors import CorruptFileError, FingerprintMismatchError
from readapt_ray.retrieval.footers import check_complete, named_footers, row_counts
from readapt_ray.retrieval.index_kinds import IndexOptions, IndexSpec, choose, index_spec
from readapt_ray.retrieval.parquet_rows import ParquetRows
from readapt_ray.retrieval.shard_plan import packed_hashes, scan_vectors
from readapt_ray.retrieval.vector_files import SHARD_BYTES, VECTOR_COLUMNS, matrix_of
from readapt_ray.storage import Location

logger = logging.getLogger("readapt_ray")

_CHUNK_ROWS = 16384
_STALE_SHARE = 0.2
"""Share of deleted and added vectors above which a fresh build is advised."""


class IndexConfig(StageConfig):
    """The options of `readapt index`."""

    vectors: str
    """Vectors: the output of `readapt embed`."""
    previous: str | None = None
    """Index of an earlier state of the corpus to update. If omitted, the index is built from scratch."""
    kind: Literal["auto", "flat", "ivf-flat", "ivf-pq", "hnsw", "rabitq"] = "flat"
    """Kind of index. flat searches exactly; the others trade recall for speed or memory; auto chooses by size,
    memory and recall."""
    storage: Literal["float32", "float16", "int8"] = "float32"
    """How vectors are stored in flat, ivf-flat and hnsw, and in ivf-pq and rabitq for the second ranking."""
    refine: bool = True
    """Keep the vectors beside the codes of ivf-pq and rabitq, to rank the candidates again."""
    code_bytes: int | None = Field(default=None, ge=1)
    """Bytes per code of ivf-pq. If omitted, a quarter of the dimension."""
    factory: str | None = None
    """FAISS factory string to use as it is, instead of kind."""
    depth: int | None = Field(default=None, ge=1)
    """nprobe (ivf) or efSearch (hnsw). If omitted, the smallest value that reaches min_recall."""
    min_recall: float = Field(default=0.95, gt=0, le=1)
    """Fraction of the exact top 10, and of the top 100, that an approximate index must find; below it the index is
    refused."""
    memory_gb: float | None = Field(default=None, gt=0)
    """Maximum memory of the loaded index in GB, used when kind is auto. If omitted, no limit."""
    rows_per_shard: int | None = Field(default=None, ge=1)
    """Vectors per index shard. If omitted, as many as take 512 MiB in float32."""

    inputs: ClassVar[frozenset[str]] = frozenset({"vectors", "previous"})
    safety: ClassVar[frozenset[str]] = StageConfig.safety | {"min_recall"}


@dataclass(frozen=True)
class _NewShard:
    """A numbered piece of the vectors, and what it becomes."""

    number: int
    rows: NDArray[np.int64]
    spec: IndexSpec
    options: IndexOptions
    dimension: int
    encoder: str
    vectors: ParquetRows
    shards: Location

    @property
    def name(self) -> str:
        return f"{self.number:05d}"


@dataclass(frozen=True)
class _KeptShard:
    """A shard of an earlier index, and which of its vectors are still found."""

    record: dict[str, Any]
    kept: NDArray[np.bool_]
    encoder: str
    source: Location
    shards: Location

    @property
    def name(self) -> str:
        return str(self.record["name"])


def index(config: IndexConfig) -> Artifact:
    """Build an index.

    Raises:
        ArtifactMissingError: the vectors are not the output of `readapt embed`, or `previous` not that of `readapt index`.
        FingerprintMismatchError: `previous` is an index of vectors of another model, or of another kind.
        CorruptFileError: a file of vectors was cut short, altered, or made by another model.
        InputError: the kind does not fit, or finds less than `min_recall`; the message says what to raise.
        ArtifactConflictError: the output holds another index.
    """
    source = open_artifact(config.vectors, "embed")
    encoder = source.manifest.details["encoder"]
    dimension = int(encoder["dimension"])
    vectors = _open_vectors(source)
    rows_per_shard = config.rows_per_shard or max(1, SHARD_BYTES // (4 * dimension))
    options = _index_options(config, vectors.num_rows, dimension)
    index_spec(options, min(rows_per_shard, vectors.num_rows), dimension)
    previous = _open_previous(config, encoder, options)

    def work(workspace: Workspace) -> None:
        shards = on_worker.absolute(workspace.location) / "shards"
        kept, rows = _split_rows(previous, vectors, encoder["fingerprint"], shards)
        first = 1 + max((int(each.name) for each in kept), default=-1)
        built = [
            _NewShard(
                number=first + place,
                rows=part,
                spec=index_spec(options, len(part), dimension),
                options=options,
                dimension=dimension,
                encoder=encoder["fingerprint"],
                vectors=vectors,
                shards=shards,
            )
            for place, part in enumerate(np.split(rows, np.arange(rows_per_shard, len(rows), rows_per_shard)))
            if len(part)
        ]
        records = _build([*kept, *built], workspace)
        _summarise(records, len(kept), encoder, options, workspace)

    return produce(
        "index",
        config,
        inputs={"vectors": source.fingerprint} | ({"previous": previous.fingerprint} if previous else {}),
        identity={"rows_per_shard": rows_per_shard},
        work=work,
    )


def _open_previous(config: IndexConfig, encoder: dict[str, Any], options: IndexOptions) -> Artifact | None:
    """Open the earlier index, if one is given. Refuse one of another encoder, or of other shards than new ones would be."""
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
    there = (made_with.get("factory"), details["kind"], details.get("storage", made_with["storage"]))
    now = (options.factory, options.kind, options.storage)
    if there != now:
        raise FingerprintMismatchError(
            f"previous = {made_with['output']!r} is {_kind_in_words(*there)}, and this index would be "
            f"{_kind_in_words(*now)}; ask for what it is, or leave it out to build afresh"
        )
    return previous


def _index_options(config: IndexConfig, num_vectors: int, dimension: int) -> IndexOptions:
    if config.kind == "auto" and config.factory is None:
        memory_bytes = None if config.memory_gb is None else config.memory_gb * 1e9
        chosen = choose(num_vectors, dimension, memory_bytes=memory_bytes, min_recall=config.min_recall)
        logger.info("index: auto is %s in %s for %s vectors", chosen.kind, chosen.storage, f"{num_vectors:,}")
        return chosen
    names = ("kind", "storage", "refine", "code_bytes", "factory", "depth", "min_recall")
    return IndexOptions(**{name: getattr(config, name) for name in names})


def _kind_in_words(factory: str | None, kind: str, storage: str) -> str:
    return repr(factory) if factory is not None else f"{kind} in {storage}"


def _open_vectors(source: Artifact) -> ParquetRows:
    """Open the files of vectors, and check that one encoder made them all and that none is missing."""
    encoder, folder = source.manifest.details["encoder"], on_worker.absolute(source.location / "vectors")
    footers = named_footers(folder)
    for name, footer in footers.items():
        made_by = footer.metadata.get("encoder", {}).get("fingerprint")
        if made_by != encoder["fingerprint"] or footer.dimension != encoder["dimension"]:
            raise CorruptFileError(
                f"{folder / name} was made by another encoder ({made_by}) than its manifest says "
                f"({encoder['fingerprint']}); remove that folder and run `readapt embed` again"
            )
    vectors = ParquetRows(folder, row_counts(footers))
    check_complete(source, vectors.num_rows, "vectors")
    return vectors


def _split_rows(
    previous: Artifact | None, vectors: ParquetRows, encoder: str, shards: Location
) -> tuple[list[_KeptShard], NDArray[np.int64]]:
    """The shards of an earlier index with what is still found in each, and the rows that none of them has."""
    if previous is None:
        return [], np.arange(vectors.num_rows)
    from readapt_ray.retrieval.index_changes import kept_and_added
    from readapt_ray.retrieval.index_files import ShardRecord

    source = on_worker.absolute(previous.location / "shards")
    records = previous.manifest.details["shards"]
    now = scan_vectors(vectors.folder, vectors.counts)
    masks, rows = kept_and_added(now, source, [ShardRecord(**record) for record in records])
    kept = [_KeptShard(record, mask, encoder, source, shards) for record, mask in zip(records, masks, strict=True)]
    return kept, rows


def _build(shards: Sequence[_NewShard | _KeptShard], workspace: Workspace) -> list[dict[str, Any]]:
    """Make the shards that are not there; the records of all, in order."""
    from readapt_ray.retrieval.index_files import find_shard

    records = {}
    for shard in shards:
        record = find_shard(shard.shards, shard.name, encoder=shard.encoder)
        if record is not None and record.num_vectors == _size(shard):
            records[shard.name] = asdict(record)
    total = sum(map(_size, shards))
    done = sum(record["num_vectors"] for record in records.values())
    workspace.progress(done, total, unit="vectors")
    pending = [shard for shard in shards if shard.name not in records]
    for built in _results(pending) if pending else ():
        records[built["name"]] = built
        done += built["num_vectors"]
        workspace.progress(done, total, unit="vectors")
    return [records[shard.name] for shard in shards]


def _size(shard: _NewShard | _KeptShard) -> int:
    return len(shard.rows if isinstance(shard, _NewShard) else shard.kept)


def _results(pending: Sequence[_NewShard | _KeptShard]) -> Iterator[dict[str, Any]]:
    """Make the shards, one per CPU at a time; yield the record of each as it is made."""
    import ray

    num_cpus = max(1, connection.connect().num_cpus)
    connection.check_seen_by_all(pending[0].shards)
    return run_bounded(ray.remote(num_cpus=1)(_make).remote, pending, num_cpus)


def _make(shard: _NewShard | _KeptShard) -> dict[str, Any]:
    """On a worker: one shard, on one thread."""
    on_worker.faiss_on_one_thread()
    from readapt_ray.retrieval.index_files import ShardRecord, carry_over

    if isinstance(shard, _KeptShard):
        record = ShardRecord(**shard.record)
        return asdict(carry_over(shard.source, record, shard.kept, shard.shards, encoder=shard.encoder))
    return _build_shard(shard)


def _build_shard(shard: _NewShard) -> dict[str, Any]:
    """An exact shard grows chunk by chunk; any other is trained, filled and measured with its vectors in memory."""
    from readapt_ray.retrieval.index_files import write_shard
    from readapt_ray.retrieval.index_recall import calibrate
    from readapt_ray.retrieval.index_shard import build_shard

    hashes = bytearray()

    def chunks() -> Iterator[tuple[list[str], NDArray[np.float32]]]:
        for doc_ids, vectors, digests in _read(shard):
            hashes.extend(digests)
            yield doc_ids, vectors

    measured = None
    if shard.spec.is_exact:
        built = build_shard(shard.spec.factory, shard.dimension, chunks())
    else:
        doc_ids, vectors = _gathered(chunks(), len(shard.rows), shard.dimension)
        built = build_shard(shard.spec.factory, shard.dimension, [(doc_ids, vectors)])
        measured = asdict(calibrate(built.index, vectors, shard.spec, shard.options))
    record = write_shard(
        shard.shards,
        shard.name,
        replace(built, hashes=bytes(hashes)),
        encoder=shard.encoder,
        factory=shard.spec.factory,
        measured=measured,
    )
    return asdict(record)


def _gathered(
    chunks: Iterator[tuple[list[str], NDArray[np.float32]]], num_rows: int, dimension: int
) -> tuple[list[str], NDArray[np.float32]]:
    doc_ids: list[str] = []
    vectors = np.empty((num_rows, dimension), np.float32)
    for names, part in chunks:
        vectors[len(doc_ids) : len(doc_ids) + len(names)] = part
        doc_ids.extend(names)
    return doc_ids, vectors


def _read(shard: _NewShard) -> Iterator[tuple[list[str], NDArray[np.float32], bytes]]:
    """doc_ids, vectors and content hashes of a shard's rows, a chunk at a time."""
    for start in range(0, len(shard.rows), _CHUNK_ROWS):
        table = shard.vectors.take(shard.rows[start : start + _CHUNK_ROWS], (*VECTOR_COLUMNS, "content_hash"))
        doc_ids, vectors = matrix_of(table, shard.vectors.folder)
        digests = table["content_hash"].to_pylist() if "content_hash" in table.column_names else [None] * len(doc_ids)
        yield doc_ids, vectors, packed_hashes(digests)


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
    workspace.details |= {"encoder": encoder, "kind": options.kind, "storage": options.storage, "shards": records}
    measured = [(record["num_vectors"], record["measured"]) for record in records if record["measured"]]
    if measured:
        weight = sum(count for count, _ in measured)
        names = ("recall_at_10", "recall_at_100", "query_ms")
        means = {name: round(sum(count * each[name] for count, each in measured) / weight, 4) for name in names}
        workspace.details["measured"] = means | {"bytes_per_vector": round(num_bytes / max(1, num_vectors), 1)}
        logger.info(
            "index: %.1f%% of the 10 best are found and %.1f%% of the 100 best, %.2f ms a query and shard, %.0f bytes a vector",
            100 * means["recall_at_10"],
            100 * means["recall_at_100"],
            means["query_ms"],
            num_bytes / max(1, num_vectors),
        )
    if num_kept:
        num_added = sum(record["num_vectors"] for record in records[num_kept:])
        workspace.details["changes"] = {"num_deleted": num_deleted, "num_added": num_added}
        logger.info("index: %s vectors added, %s deleted ones left in place", f"{num_added:,}", f"{num_deleted:,}")
        if num_added + num_deleted > _STALE_SHARE * num_vectors:
            logger.warning("index: much of it is deleted or added; build it without --previous to compact it")
