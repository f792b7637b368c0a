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
from readapt_ray.cluster.shard_encoder import Rows
from readapt_ray.config import StageConfig
from readapt_ray.errors import CorruptFileError, FingerprintMismatchError
from readapt_ray.retrieval.footers import RowCounts, check_complete, named_footers, row_counts
from readapt_ray.retrieval.index_kinds import Recipe, Wanted, choose, recipe
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
class _Shard:
    """A numbered piece of the vectors, and what it becomes."""

    number: int
    rows: NDArray[np.int64]
    recipe: Recipe
    wanted: Wanted
    dimension: int
    encoder: str
    vectors: Rows
    shards: Location

    @property
    def name(self) -> str:
        return f"{self.number:05d}"


@dataclass(frozen=True)
class _Carried:
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
    previous = open_artifact(config.previous, "index") if config.previous else None
    if previous is not None and previous.manifest.details["encoder"]["fingerprint"] != encoder["fingerprint"]:
        raise FingerprintMismatchError(
            f"previous = {config.previous!r} is an index of vectors of another encoder "
            f"({previous.manifest.details['encoder']['model']!r}) than {config.vectors!r} ({encoder['model']!r}); "
            f"leave it out to build afresh"
        )
    folder = on_worker.absolute(source.location / "vectors")
    vectors = Rows(folder, _count_rows(folder, encoder))
    check_complete(source, sum(count for _, count in vectors.counts), "vectors")
    num_vectors = source.manifest.counts["num_vectors"]
    rows_per_shard = config.rows_per_shard or max(1, SHARD_BYTES // (4 * int(encoder["dimension"])))
    wanted = _wanted(config, num_vectors, int(encoder["dimension"]))
    recipe(wanted, min(rows_per_shard, num_vectors), int(encoder["dimension"]))
    if previous is not None:
        _check_kind(previous, wanted)

    def work(workspace: Workspace) -> None:
        shards = on_worker.absolute(workspace.location) / "shards"
        carried, rows = _carried(previous, vectors, encoder["fingerprint"], shards)
        cuts = np.split(rows, np.arange(rows_per_shard, len(rows), rows_per_shard)) if len(rows) else []
        first = 1 + max((int(each.name) for each in carried), default=-1)
        built = [
            _Shard(
                number=first + place,
                rows=part,
                recipe=recipe(wanted, len(part), int(encoder["dimension"])),
                wanted=wanted,
                dimension=int(encoder["dimension"]),
                encoder=encoder["fingerprint"],
                vectors=vectors,
                shards=shards,
            )
            for place, part in enumerate(cuts)
        ]
        records = _build([*carried, *built], workspace)
        _summarise(records, len(carried), encoder, wanted, workspace)

    return produce(
        "index",
        config,
        inputs={"vectors": source.fingerprint} | ({"previous": previous.fingerprint} if previous else {}),
        identity={"rows_per_shard": rows_per_shard},
        work=work,
    )


def _wanted(config: IndexConfig, num_vectors: int, dimension: int) -> Wanted:
    if config.kind == "auto" and config.factory is None:
        memory_bytes = None if config.memory_gb is None else config.memory_gb * 1e9
        chosen = choose(num_vectors, dimension, memory_bytes=memory_bytes, min_recall=config.min_recall)
        logger.info("index: auto is %s in %s for %s vectors", chosen.kind, chosen.storage, f"{num_vectors:,}")
        return chosen
    names = ("kind", "storage", "refine", "code_bytes", "factory", "depth", "min_recall")
    return Wanted(**{name: getattr(config, name) for name in names})


def _check_kind(previous: Artifact, wanted: Wanted) -> None:
    """Refuse an earlier index whose shards are not what new ones would be."""
    details, options = previous.manifest.details, previous.manifest.config
    there = (options.get("factory"), details["kind"], details.get("storage", options["storage"]))
    now = (wanted.factory, wanted.kind, wanted.storage)
    if there != now:
        raise FingerprintMismatchError(
            f"previous = {options['output']!r} is {_described(*there)}, and this index would be {_described(*now)}; "
            f"ask for what it is, or leave it out to build afresh"
        )


def _described(factory: str | None, kind: str, storage: str) -> str:
    return repr(factory) if factory is not None else f"{kind} in {storage}"


def _count_rows(folder: Location, encoder: dict[str, Any]) -> RowCounts:
    """Name and rows of each file of vectors, seen to be by one encoder."""
    footers = named_footers(folder)
    for name, footer in footers.items():
        made_by = footer.metadata.get("encoder", {}).get("fingerprint")
        if made_by != encoder["fingerprint"] or footer.dimension != encoder["dimension"]:
            raise CorruptFileError(
                f"{folder / name} was made by another encoder ({made_by}) than its manifest says "
                f"({encoder['fingerprint']}); remove that folder and run `readapt embed` again"
            )
    return row_counts(footers)


def _carried(
    previous: Artifact | None, vectors: Rows, encoder: str, shards: Location
) -> tuple[list[_Carried], NDArray[np.int64]]:
    """The shards of an earlier index with what is still found in each, and the rows that none of them has."""
    num_rows = sum(count for _, count in vectors.counts)
    if previous is None:
        return [], np.arange(num_rows)
    from readapt_ray.retrieval.index_changes import kept_and_added
    from readapt_ray.retrieval.vector_index import ShardRecord

    source = on_worker.absolute(previous.location / "shards")
    records = previous.manifest.details["shards"]
    now = scan_vectors(vectors.folder, vectors.counts)
    masks, rows = kept_and_added(now, source, [ShardRecord(**record) for record in records])
    carried = [_Carried(record, kept, encoder, source, shards) for record, kept in zip(records, masks, strict=True)]
    return carried, rows


def _build(shards: Sequence[_Shard | _Carried], workspace: Workspace) -> list[dict[str, Any]]:
    """Make the shards that are not there; the records of all, in order."""
    from readapt_ray.retrieval.vector_index import described, find_shard

    records = {}
    for shard in shards:
        record = find_shard(shard.shards, shard.name, encoder=shard.encoder)
        if record is not None and record.num_vectors == _size(shard):
            records[shard.name] = described(record)
    total = sum(map(_size, shards))
    done = sum(record["num_vectors"] for record in records.values())
    workspace.progress(done, total, unit="vectors")
    pending = [shard for shard in shards if shard.name not in records]
    for built in _results(pending) if pending else ():
        records[built["name"]] = built
        done += built["num_vectors"]
        workspace.progress(done, total, unit="vectors")
    return [records[shard.name] for shard in shards]


def _size(shard: _Shard | _Carried) -> int:
    return len(shard.rows if isinstance(shard, _Shard) else shard.kept)


def _results(pending: Sequence[_Shard | _Carried]) -> Iterator[dict[str, Any]]:
    """The record of each shard as it is made, one a CPU at a time."""
    import ray
    from ray.exceptions import RayError

    room = max(1, connection.connect().num_cpus)
    connection.check_seen_by_all(pending[0].shards)
    task = ray.remote(num_cpus=1)(_make)
    waiting = list(pending)
    running: list[Any] = []
    try:
        while waiting or running:
            while waiting and len(running) < room:
                running.append(task.remote(waiting.pop(0)))
            ready, running = ray.wait(running)
            yield from ray.get(ready)
    except RayError as error:
        raise connection.cause_of(error) from None
    finally:
        for each in running:
            ray.cancel(each)


def _make(shard: _Shard | _Carried) -> dict[str, Any]:
    """On a worker: one shard, on one thread."""
    on_worker.faiss_on_one_thread()
    from readapt_ray.retrieval.vector_index import ShardRecord, carry_over, described

    if isinstance(shard, _Carried):
        record = ShardRecord(**shard.record)
        return described(carry_over(shard.source, record, shard.kept, shard.shards, encoder=shard.encoder))
    return _build_shard(shard)


def _build_shard(shard: _Shard) -> dict[str, Any]:
    """An exact shard grows chunk by chunk; any other is trained, filled and measured with its vectors in memory."""
    from readapt_ray.retrieval.index_recall import tune
    from readapt_ray.retrieval.vector_index import build_shard, described, write_shard

    hashes = bytearray()

    def chunks() -> Iterator[tuple[list[str], NDArray[np.float32]]]:
        for doc_ids, vectors, digests in _read(shard):
            hashes.extend(digests)
            yield doc_ids, vectors

    measured = None
    if shard.recipe.is_exact:
        built = build_shard(shard.recipe.factory, shard.dimension, chunks())
    else:
        doc_ids, vectors = _gathered(chunks(), len(shard.rows), shard.dimension)
        built = build_shard(shard.recipe.factory, shard.dimension, [(doc_ids, vectors)])
        measured = asdict(tune(built.index, vectors, shard.recipe, shard.wanted))
    record = write_shard(
        shard.shards,
        shard.name,
        replace(built, hashes=bytes(hashes)),
        encoder=shard.encoder,
        factory=shard.recipe.factory,
        measured=measured,
    )
    return described(record)


def _gathered(
    chunks: Iterator[tuple[list[str], NDArray[np.float32]]], num_rows: int, dimension: int
) -> tuple[list[str], NDArray[np.float32]]:
    doc_ids: list[str] = []
    vectors = np.empty((num_rows, dimension), np.float32)
    for names, part in chunks:
        vectors[len(doc_ids) : len(doc_ids) + len(names)] = part
        doc_ids.extend(names)
    return doc_ids, vectors


def _read(shard: _Shard) -> Iterator[tuple[list[str], NDArray[np.float32], bytes]]:
    """doc_ids, vectors and content hashes of a shard's rows, a chunk at a time."""
    reader = shard.vectors.reader()
    for start in range(0, len(shard.rows), _CHUNK_ROWS):
        table = reader.take(shard.rows[start : start + _CHUNK_ROWS], (*VECTOR_COLUMNS, "content_hash"))
        doc_ids, vectors = matrix_of(table, shard.vectors.folder)
        digests = table["content_hash"].to_pylist() if "content_hash" in table.column_names else [None] * len(doc_ids)
        yield doc_ids, vectors, packed_hashes(digests)


def _summarise(
    records: list[dict[str, Any]], num_carried: int, encoder: dict[str, Any], wanted: Wanted, workspace: Workspace
) -> None:
    num_vectors = sum(record["num_vectors"] for record in records)
    num_deleted = sum(record["num_deleted"] for record in records)
    num_bytes = sum(record["num_bytes"] for record in records)
    workspace.counts |= {
        "num_vectors": num_vectors - num_deleted,
        "num_shards": len(records),
        "num_bytes": num_bytes,
    }
    workspace.details |= {"encoder": encoder, "kind": wanted.kind, "storage": wanted.storage, "shards": records}
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
    if num_carried:
        num_added = sum(record["num_vectors"] for record in records[num_carried:])
        workspace.details["changes"] = {"num_deleted": num_deleted, "num_added": num_added}
        logger.info("index: %s vectors added, %s deleted ones left in place", f"{num_added:,}", f"{num_deleted:,}")
        if num_added + num_deleted > _STALE_SHARE * num_vectors:
            logger.warning("index: much of it is deleted or added; build it without --previous to compact it")
