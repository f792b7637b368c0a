"""Build the shards of a FAISS index on Ray, one task per shard.

Inverted lists and codebooks are trained once. Then each shard is built from vectors, or reused from an earlier index.

In: files of vectors. Out: the files of `retrieval/index_files.py`; also `trained.faiss`, the trained index without
vectors that every shard starts from, and `queries.recall.npz`, the query vectors that measure the recall of all shards.
A task holds its shard in FAISS's format, and a second copy while it writes the file.
"""

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from readapt_ray.artifacts import Workspace
from readapt_ray.cluster import connection, on_worker
from readapt_ray.cluster.bounded_tasks import run_bounded
from readapt_ray.retrieval.footers import map_in_threads
from readapt_ray.retrieval.index_kinds import IndexOptions, IndexSpec, shard_cpus
from readapt_ray.retrieval.parquet_rows import ParquetRows
from readapt_ray.retrieval.shard_plan import packed_hashes
from readapt_ray.retrieval.vector_files import VECTOR_COLUMNS, matrix_of
from readapt_ray.storage import Location

if TYPE_CHECKING:
    from readapt_ray.retrieval.index_files import ShardRecord
    from readapt_ray.retrieval.index_recall import BestRows

_CHUNK_ROWS = 16384
TRAINED_NAME = "trained.faiss"
RECALL_SUFFIX = ".recall.npz"
_QUERIES_NAME = f"queries{RECALL_SUFFIX}"
_NO_ROW = np.iinfo(np.int64).min // 2
"""Row number that marks a query which is not itself a vector of the index."""
UNTRAINED = ("Flat", "SQfp16")
_SAMPLE_ROWS = 4096


@dataclass(frozen=True)
class ShardPlan:
    """The options that all new shards share."""

    spec: IndexSpec
    options: IndexOptions
    dimension: int
    encoder: str
    """Fingerprint of the encoder that made the vectors."""
    shards: Location
    """Folder of the shards."""
    num_cpus: int
    """CPUs per task."""


@dataclass(frozen=True)
class NewShard:
    """A shard to build: its number, and the rows of its vectors."""

    number: int
    first: int
    """Position of its first vector among all vectors that are added."""
    vectors: ParquetRows
    """Only the files that hold its vectors."""
    rows: NDArray[np.int64] | range
    """Row numbers of its vectors in these files."""
    plan: ShardPlan

    @property
    def name(self) -> str:
        """Return the name of its files without the suffix."""
        return f"{self.number:05d}"


@dataclass(frozen=True)
class KeptShard:
    """A shard of an earlier index that is reused, without its deleted vectors."""

    record: dict[str, Any]
    """Its `ShardRecord` in the earlier index, as a dict."""
    kept: NDArray[np.bool_]
    """For each vector of the shard, whether it is kept."""
    encoder: str
    source: Location
    """Folder of the shards of the earlier index."""
    shards: Location
    """Folder of the shards of the new index."""

    @property
    def name(self) -> str:
        """Return the name of its files without the suffix."""
        return str(self.record["name"])


def cut_shards(
    plan: ShardPlan, vectors: ParquetRows, rows: NDArray[np.int64] | range, rows_per_shard: int, *, first: int
) -> Iterator[NewShard]:
    """Cut rows of vectors into shards of `rows_per_shard` rows; the last one may be smaller. No rows give no shard.

    Args:
        plan: the options that all new shards share.
        vectors: files of vectors.
        rows: ascending row numbers of the vectors to add.
        rows_per_shard: vectors per shard.
        first: number of the first shard; the others follow.
    """
    ends = np.cumsum([0, *(count for _, count in vectors.counts)])
    for place, begin in enumerate(range(0, len(rows), rows_per_shard)):
        part = rows[begin : begin + rows_per_shard]
        low, high = np.searchsorted(ends, (part[0], part[-1]), side="right") - 1
        start = int(ends[low])
        own = range(part.start - start, part.stop - start) if isinstance(part, range) else part - start
        yield NewShard(first + place, begin, ParquetRows(vectors.folder, vectors.counts[low : high + 1]), own, plan)


def task_cpus(plan: ShardPlan, num_rows: int) -> int:
    """Return the CPUs of a task that builds a shard (see `shard_cpus`), at most the CPUs of the largest node."""
    import ray

    connection.connect()
    largest = max(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
    return max(1, min(largest, shard_cpus(plan.options, plan.dimension, num_rows)))


def write_recall_queries(plan: ShardPlan, find: Callable[[], NDArray[np.float32] | None]) -> None:
    """Write the query vectors that measure recall into the folder of the shards, unless an earlier run did.

    Args:
        plan: the options of the shards.
        find: returns query vectors, float32 [Q, D]; None if queries cannot be encoded. Then `train_once` uses vectors
            of the index as queries.
    """
    vectors = None if (plan.shards / _QUERIES_NAME).is_file() else find()
    if vectors is not None:
        _write_queries(plan, np.full(len(vectors), _NO_ROW), vectors)


def _write_queries(plan: ShardPlan, rows: NDArray[np.int64], vectors: NDArray[np.float32]) -> None:
    sink = io.BytesIO()
    np.savez(sink, rows=rows, vectors=vectors)
    (plan.shards / _QUERIES_NAME).write_bytes(sink.getvalue())


def measured_with_vectors(plan: ShardPlan) -> bool:
    """Return whether recall is measured with vectors of the index, and not with queries.

    Call it after `train_once`, which writes the recall queries if there are none.
    """
    rows = _queries(plan)[1]
    return bool((rows != _NO_ROW).any())


def train_once(everything: NewShard) -> None:
    """Train inverted lists and codebooks on a sample of all vectors, in one task, unless an earlier run did.

    It writes `trained.faiss`, and if there are no recall queries, some vectors as such. An index that needs no training
    is written as it is.

    Args:
        everything: a shard with all vectors that are added.
    """
    import ray

    shards, num_cpus = everything.plan.shards, everything.plan.num_cpus
    if (shards / TRAINED_NAME).is_file() and (shards / _QUERIES_NAME).is_file():
        return
    connection.check_seen_by_all(shards)
    list(run_bounded(ray.remote(num_cpus=num_cpus)(_train).remote, [everything], 1))


def _train(everything: NewShard) -> None:
    """Train an index on a sample and write it without vectors; use vectors as recall queries if there are none."""
    plan = everything.plan
    faiss = on_worker.faiss_on_threads(plan.num_cpus)
    from readapt_ray.retrieval.faiss_build import train
    from readapt_ray.retrieval.index_recall import query_rows
    from readapt_ray.retrieval.index_shard import new_index, training_rows

    location = plan.shards / TRAINED_NAME
    if not location.is_file():
        index = new_index(plan.spec.factory, plan.dimension)
        if not index.is_trained:
            train(index, _sampled(everything, training_rows(index, len(everything.rows))))
        location.write_bytes(faiss.serialize_index(index).tobytes())
    if not (plan.shards / _QUERIES_NAME).is_file():
        rows = np.sort(query_rows(len(everything.rows)))
        _write_queries(plan, rows, _sampled(everything, rows))


def _sampled(shard: NewShard, places: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the vectors at ascending positions among a shard's rows; read their files in parallel."""
    rows = places + shard.rows.start if isinstance(shard.rows, range) else shard.rows[places]
    parts = np.array_split(rows, max(1, len(rows) // _SAMPLE_ROWS))

    def read(part: NDArray[np.int64]) -> NDArray[np.float32]:
        return matrix_of(shard.vectors.take(part, VECTOR_COLUMNS), shard.vectors.folder)[1]

    return np.concatenate(map_in_threads(read, parts))


def build_shards(shards: Sequence[NewShard | KeptShard], plan: ShardPlan, workspace: Workspace) -> list["ShardRecord"]:
    """Build or reuse the shards that have no files yet; return the records of all shards, in order."""
    from readapt_ray.retrieval.index_files import find_shards

    there = find_shards(plan.shards, [shard.name for shard in shards], encoder=plan.encoder)
    records = {shard.name: there[shard.name] for shard in shards if _is_whole(shard, there.get(shard.name))}
    total = sum(map(_size, shards))
    done = sum(record.num_vectors for record in records.values())
    workspace.progress(done, total, unit="vectors")
    pending = [shard for shard in shards if shard.name not in records]
    for built in _results(pending, plan) if pending else ():
        records[built.name] = built
        done += built.num_vectors
        workspace.progress(done, total, unit="vectors")
    return [records[shard.name] for shard in shards]


def _is_whole(shard: NewShard | KeptShard, record: "ShardRecord | None") -> bool:
    return record is not None and record.num_vectors == _size(shard)


def _size(shard: NewShard | KeptShard) -> int:
    return len(shard.rows if isinstance(shard, NewShard) else shard.kept)


def _results(pending: Sequence[NewShard | KeptShard], plan: ShardPlan) -> Iterator["ShardRecord"]:
    """Make the shards, as many at a time as the CPUs allow; yield each record when its shard is written."""
    import ray

    num_at_once = max(1, connection.connect().num_cpus // plan.num_cpus)
    connection.check_seen_by_all(plan.shards)
    return run_bounded(ray.remote(num_cpus=plan.num_cpus)(_make).remote, pending, num_at_once)


def _make(shard: NewShard | KeptShard) -> "ShardRecord":
    """Build one shard, or reuse it from an earlier index, in a Ray task."""
    if isinstance(shard, NewShard):
        return _build_shard(shard)
    from readapt_ray.retrieval.index_files import ShardRecord, carry_over

    return carry_over(shard.source, ShardRecord(**shard.record), shard.kept, shard.shards, encoder=shard.encoder)


def _build_shard(shard: NewShard) -> "ShardRecord":
    """Build and write a shard, chunk by chunk; unless it is exact, also write its recall for the shared queries."""
    plan = shard.plan
    on_worker.faiss_on_threads(plan.num_cpus)
    from readapt_ray.retrieval.faiss_build import adder
    from readapt_ray.retrieval.index_files import write_shard
    from readapt_ray.retrieval.index_recall import measure_shard
    from readapt_ray.retrieval.index_shard import IndexShard

    index, trained = _empty_index(plan)
    add = adder(index)
    best = None if plan.spec.is_exact else _best_rows(shard)
    doc_ids: list[str] = []
    hashes = bytearray()
    for names, vectors, digests in _read(shard):
        add(vectors)
        doc_ids.extend(names)
        hashes.extend(digests)
        if best is not None:
            best.add(vectors)
    if best is not None:
        recall = measure_shard(index, best, plan.spec, plan.options)
        (plan.shards / f"{shard.name}{RECALL_SUFFIX}").write_bytes(recall.to_bytes())
    built = IndexShard(index, np.array(doc_ids, dtype=object), bytes(hashes), trained)
    return write_shard(plan.shards, shard.name, built, encoder=plan.encoder, factory=plan.spec.factory)


def _empty_index(plan: ShardPlan) -> tuple[Any, str]:
    """Return the trained index without vectors, and the SHA-256 of its file (the factory string if it has none)."""
    from readapt_ray.retrieval.faiss_build import faiss
    from readapt_ray.retrieval.index_shard import new_index

    if plan.spec.is_exact and plan.spec.factory in UNTRAINED:
        return new_index(plan.spec.factory, plan.dimension), plan.spec.factory
    content = (plan.shards / TRAINED_NAME).read_bytes()
    return faiss.deserialize_index(np.frombuffer(content, np.uint8)), hashlib.sha256(content).hexdigest()


def _best_rows(shard: NewShard) -> "BestRows":
    """Return the queries of all shards, with the row of each in this shard."""
    from readapt_ray.retrieval.index_recall import BestRows

    vectors, rows = _queries(shard.plan)
    return BestRows(vectors, rows - shard.first)


def _queries(plan: ShardPlan) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the vectors [Q, D] of the queries, and the row of each among all vectors, [Q] (or `_NO_ROW`)."""
    with np.load(io.BytesIO((plan.shards / _QUERIES_NAME).read_bytes()), allow_pickle=False) as arrays:
        return arrays["vectors"], arrays["rows"]


def _read(shard: NewShard) -> Iterator[tuple[list[str], NDArray[np.float32], bytes]]:
    """Yield doc_ids, vectors and content hashes of a shard's rows, in chunks of 16,384 rows."""
    for start in range(0, len(shard.rows), _CHUNK_ROWS):
        rows = np.asarray(shard.rows[start : start + _CHUNK_ROWS])
        table = shard.vectors.take(rows, (*VECTOR_COLUMNS, "content_hash"))
        doc_ids, vectors = matrix_of(table, shard.vectors.folder)
        digests = table["content_hash"].to_pylist() if "content_hash" in table.column_names else [None] * len(doc_ids)
        yield doc_ids, np.ascontiguousarray(vectors, np.float32), packed_hashes(digests)
