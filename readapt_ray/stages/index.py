"""The index stage: vectors become FAISS shards.

In: vectors. Out: `shards/00000.faiss` and `shards/00000.ids.parquet` and so on, each built by one
Ray task and committed whole, so what was built before a kill is not built again. Memory is about
three times a shard's vectors a task.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import Field

from readapt_ray.artifacts import Artifact, Workspace, open_artifact, produce
from readapt_ray.config import StageConfig
from readapt_ray.errors import CorruptFileError
from readapt_ray.retrieval.vector_files import RowRange, cut, iterate_vectors, read_footer
from readapt_ray.stages import cluster, elsewhere
from readapt_ray.storage import Location

_SHARD_BYTES = 512 << 20


class IndexConfig(StageConfig):
    """The options of `readapt index`."""

    vectors: str
    """The output folder of `readapt embed`."""
    kind: str = "flat"
    """Kind of index; `flat` finds exactly what exact search finds."""
    rows_per_shard: int | None = Field(default=None, ge=1)
    """Vectors in an index shard; by default as many as take 512 MiB in float32."""

    inputs: ClassVar[frozenset[str]] = frozenset({"vectors"})


@dataclass(frozen=True)
class _Shard:
    """A numbered piece of the vectors, and what it becomes."""

    number: int
    ranges: tuple[RowRange, ...]
    kind: str
    dimension: int
    encoder: str
    vectors: Location
    shards: Location

    @property
    def name(self) -> str:
        return f"{self.number:05d}"

    @property
    def num_rows(self) -> int:
        return sum(each.num_rows for each in self.ranges)


def index(config: IndexConfig) -> Artifact:
    """Build an index.

    Raises:
        ArtifactMissingError: the vectors are not the output of `readapt embed`.
        CorruptFileError: a file of vectors was cut short, altered, or made by another model.
        InputError: the kind is unknown.
        ArtifactConflictError: the output holds another index.
    """
    from readapt_ray.retrieval.vector_index import index_kind

    index_kind(config.kind)
    source = open_artifact(config.vectors, "embed")
    encoder = source.manifest.details["encoder"]
    folder = source.location / "vectors"
    counts = _count_rows(folder, encoder, source.manifest.counts["num_vectors"])
    rows_per_shard = config.rows_per_shard or max(1, _SHARD_BYTES // (4 * int(encoder["dimension"])))

    def work(workspace: Workspace) -> None:
        shards = [
            _Shard(
                number=number,
                ranges=tuple(ranges),
                kind=config.kind,
                dimension=int(encoder["dimension"]),
                encoder=encoder["fingerprint"],
                vectors=elsewhere.absolute(folder),
                shards=elsewhere.absolute(workspace.location) / "shards",
            )
            for number, ranges in enumerate(cut(counts, rows_per_shard))
        ]
        records = _build(shards, workspace)
        workspace.counts |= {
            "num_vectors": sum(record["num_vectors"] for record in records),
            "num_shards": len(records),
            "num_bytes": sum(record["num_bytes"] for record in records),
        }
        workspace.details |= {"encoder": encoder, "kind": config.kind, "shards": records}

    return produce(
        "index",
        config,
        inputs={"vectors": source.fingerprint},
        identity={"rows_per_shard": rows_per_shard},
        work=work,
    )


def _count_rows(folder: Location, encoder: dict[str, Any], num_vectors: int) -> list[tuple[str, int]]:
    """Name and rows of each file of vectors, seen to be by one encoder and as many as the manifest says."""
    counts = []
    for name, _ in folder.listing(".parquet"):
        footer = read_footer(folder / name)
        made_by = footer.metadata.get("encoder", {}).get("fingerprint")
        if made_by != encoder["fingerprint"] or footer.dimension != encoder["dimension"]:
            raise CorruptFileError(
                f"{folder / name} was made by another encoder ({made_by}) than its manifest says "
                f"({encoder['fingerprint']}); remove that folder and run `readapt embed` again"
            )
        counts.append((name, footer.num_rows))
    total = sum(count for _, count in counts)
    if total != num_vectors:
        raise CorruptFileError(
            f"{folder} holds {total} vectors, and its manifest says {num_vectors}; "
            f"remove that folder and run `readapt embed` again"
        )
    return counts


def _build(shards: Sequence[_Shard], workspace: Workspace) -> list[dict[str, Any]]:
    """Build the shards that are not there; the records of all, in order."""
    from readapt_ray.retrieval.vector_index import described, find_shard

    records = {}
    for shard in shards:
        record = find_shard(shard.shards, shard.name, encoder=shard.encoder)
        if record is not None and record.num_vectors == shard.num_rows:
            records[shard.number] = described(record)
    total = sum(shard.num_rows for shard in shards)
    done = sum(record["num_vectors"] for record in records.values())
    workspace.progress(done, total, unit="vectors")
    pending = [shard for shard in shards if shard.number not in records]
    for number, built in _results(pending) if pending else ():
        records[number] = built
        done += built["num_vectors"]
        workspace.progress(done, total, unit="vectors")
    return [records[shard.number] for shard in shards]


def _results(pending: Sequence[_Shard]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and record of each shard as it is built, one a CPU at a time."""
    import ray
    from ray.exceptions import RayError

    room = max(1, cluster.connect().num_cpus)
    task = ray.remote(num_cpus=1)(_build_shard)
    waiting = list(pending)
    running: list[Any] = []
    try:
        while waiting or running:
            while waiting and len(running) < room:
                running.append(task.remote(waiting.pop(0)))
            ready, running = ray.wait(running)
            yield from ray.get(ready)
    except RayError as error:
        raise cluster.cause_of(error) from None
    finally:
        for each in running:
            ray.cancel(each)


def _build_shard(shard: _Shard) -> tuple[int, dict[str, Any]]:
    from readapt_ray.retrieval.vector_index import build_shard, described, index_kind, write_shard

    chunks = iterate_vectors(shard.vectors, shard.ranges)
    built = build_shard(index_kind(shard.kind), shard.dimension, chunks)
    return shard.number, described(write_shard(shard.shards, shard.name, built, encoder=shard.encoder))
