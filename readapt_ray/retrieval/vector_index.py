"""FAISS indexes in shards: build one, write and verify it, search many as if they were one.

A shard is two files that plain FAISS and plain pyarrow open: `shards/00000.faiss` and
`shards/00000.ids.parquet` (column doc_id, in the order of the index). Their checksums stand in the
artifact's manifest. Memory is a shard; for `flat` that is 4 bytes a number, twice while it is read.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from readapt_ray.artifacts import Artifact, open_artifact
from readapt_ray.errors import CorruptFileError, InputError
from readapt_ray.retrieval.exact import Hits, TopK, check_dimension
from readapt_ray.storage import Location

_METADATA_KEY = b"readapt"


@dataclass(frozen=True, kw_only=True)
class IndexKind:
    """One kind of index that can be asked for."""

    name: str
    factory: str
    """FAISS factory string; the metric is always the inner product."""
    is_exact: bool
    """Whether it finds what exact search finds."""


KINDS: tuple[IndexKind, ...] = (IndexKind(name="flat", factory="Flat", is_exact=True),)


def index_kind(name: str) -> IndexKind:
    """The row of a kind.

    Raises:
        InputError: there is none of that name.
    """
    for kind in KINDS:
        if kind.name == name:
            return kind
    raise InputError(f"kind = {name!r}; it must be one of {', '.join(kind.name for kind in KINDS)}")


@dataclass(frozen=True)
class ShardRecord:
    """What the manifest says of a shard."""

    name: str
    num_vectors: int
    num_bytes: int
    index_sha256: str
    ids_sha256: str


@dataclass(frozen=True)
class IndexShard:
    """A shard in memory: a FAISS index, and the doc_id of each of its vectors."""

    index: Any
    doc_ids: NDArray[np.object_]

    def search(self, queries: NDArray[np.float32], top_k: int) -> Hits:
        """The k best of this shard, ties by doc_id.

        FAISS breaks ties as it likes, so one more than k is asked for, and where the last place is
        tied with the one after it, more, until the tie has an end.

        Raises:
            InputError: the dimensions differ, or top_k is under 1.
        """
        check_dimension(queries, self.index.d)
        best = TopK(len(queries), top_k)
        pending = np.arange(len(queries))
        wanted = top_k + 1
        scores = np.full((len(queries), 0), -np.inf, np.float32)
        doc_ids = np.empty((len(queries), 0), object)
        while len(pending):
            depth = min(wanted, self.index.ntotal)
            found, rows = self.index.search(np.ascontiguousarray(queries[pending], np.float32), depth)
            found = np.where(rows >= 0, found, -np.inf).astype(np.float32)
            scores, doc_ids = _widened(scores, doc_ids, depth)
            scores[pending], doc_ids[pending] = found, self.doc_ids[rows]
            if depth == self.index.ntotal:
                break
            tied = (found[:, top_k - 1] == found[:, -1]) & np.isfinite(found[:, -1])
            pending = pending[tied]
            wanted *= 2
        best.add(scores, doc_ids)
        return best.hits()


def _widened(
    scores: NDArray[np.float32], doc_ids: NDArray[np.object_], width: int
) -> tuple[NDArray[np.float32], NDArray[np.object_]]:
    shape = (len(scores), width - scores.shape[1])
    return (
        np.concatenate([scores, np.full(shape, -np.inf, np.float32)], axis=1),
        np.concatenate([doc_ids, np.empty(shape, object)], axis=1),
    )


def build_shard(kind: IndexKind, dimension: int, chunks: Iterable[tuple[list[str], NDArray[np.float32]]]) -> IndexShard:
    """An index of the vectors [N, D] that come in chunks with their doc_ids."""
    index = faiss.index_factory(dimension, kind.factory, faiss.METRIC_INNER_PRODUCT)
    doc_ids: list[str] = []
    for names, vectors in chunks:
        index.add(np.ascontiguousarray(vectors, np.float32))
        doc_ids.extend(names)
    return IndexShard(index, np.array(doc_ids, dtype=object))


def write_shard(folder: Location, name: str, shard: IndexShard, *, encoder: str) -> ShardRecord:
    """Write a shard, the ids last: where they are, the shard is whole.

    Args:
        folder: the `shards` folder of the artifact.
        name: 00000, 00001, ...
        encoder: fingerprint of what made the vectors, kept beside the ids.
    """
    content = faiss.serialize_index(shard.index).tobytes()
    (folder / f"{name}.faiss").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    metadata = {"index_sha256": digest, "index_bytes": len(content), "encoder": encoder}
    schema = pa.schema([("doc_id", pa.string())], metadata={_METADATA_KEY: json.dumps(metadata)})
    sink = io.BytesIO()
    pq.write_table(pa.table([pa.array(shard.doc_ids, pa.string())], schema=schema), sink, use_dictionary=False)
    (folder / f"{name}.ids.parquet").write_bytes(sink.getvalue())
    return _record(name, len(shard.doc_ids), metadata, sink.getvalue())


def find_shard(folder: Location, name: str, *, encoder: str) -> ShardRecord | None:
    """The record of a shard that was written whole for this encoder; None where there is none."""
    ids, index = folder / f"{name}.ids.parquet", folder / f"{name}.faiss"
    if not ids.is_file() or not index.is_file():
        return None
    content = ids.read_bytes()
    try:
        with pq.ParquetFile(io.BytesIO(content)) as file:
            metadata = json.loads((file.schema_arrow.metadata or {}).get(_METADATA_KEY, b"{}"))
            num_vectors = file.metadata.num_rows
    except (pa.ArrowInvalid, OSError):
        return None
    if metadata.get("encoder") != encoder or metadata.get("index_bytes") != index.size_bytes():
        return None
    return _record(name, num_vectors, metadata, content)


def _record(name: str, num_vectors: int, metadata: dict[str, Any], ids: bytes) -> ShardRecord:
    return ShardRecord(
        name=name,
        num_vectors=num_vectors,
        num_bytes=metadata["index_bytes"] + len(ids),
        index_sha256=metadata["index_sha256"],
        ids_sha256=hashlib.sha256(ids).hexdigest(),
    )


def read_shard(folder: Location, record: ShardRecord) -> IndexShard:
    """Load a shard.

    Raises:
        CorruptFileError: a file of it is gone, or is not the one that was written.
    """
    content = _verified(folder / f"{record.name}.faiss", record.index_sha256)
    index = faiss.deserialize_index(np.frombuffer(content, np.uint8))
    ids = _verified(folder / f"{record.name}.ids.parquet", record.ids_sha256)
    doc_ids = np.array(pq.read_table(io.BytesIO(ids))["doc_id"].to_pylist(), dtype=object)
    if not index.ntotal == len(doc_ids) == record.num_vectors:
        raise CorruptFileError(
            f"{folder / record.name}: {index.ntotal} vectors, {len(doc_ids)} ids, {record.num_vectors} in the manifest; "
            f"run `readapt index` again"
        )
    return IndexShard(index, doc_ids)


def _verified(location: Location, sha256: str) -> bytes:
    try:
        content = location.read_bytes()
    except FileNotFoundError as error:
        raise CorruptFileError(f"{location} is gone; run `readapt index` again") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise CorruptFileError(
            f"{location} was cut short or altered: its checksum is not the one in the manifest; run `readapt index` again"
        )
    return content


def search_shards(shards: Iterable[IndexShard], queries: NDArray[np.float32], top_k: int) -> Hits:
    """The k best over all shards: the same as from one index that holds all their vectors.

    Each shard may be let go before the next is loaded. k over the number of vectors gives all of them.
    """
    best = TopK(len(queries), top_k)
    for shard in shards:
        found = shard.search(queries, top_k)
        best.merge(found.scores, found.doc_ids)
    return best.hits()


@dataclass(frozen=True)
class VectorIndex:
    """The index of an artifact, its shards still on disk."""

    artifact: Artifact

    @classmethod
    def open(cls, uri: str) -> "VectorIndex":
        """The complete index in a folder.

        Raises:
            ArtifactMissingError: there is none.
        """
        return cls(open_artifact(uri, "index"))

    @property
    def records(self) -> list[ShardRecord]:
        """What the manifest says of each shard."""
        return [ShardRecord(**each) for each in self.artifact.manifest.details["shards"]]

    @property
    def encoder(self) -> dict[str, Any]:
        """What made the vectors: fingerprint, model, dimension, dtype, encoding."""
        return dict(self.artifact.manifest.details["encoder"])

    @property
    def num_vectors(self) -> int:
        """Vectors in all shards."""
        return sum(record.num_vectors for record in self.records)

    @property
    def folder(self) -> Location:
        """Where the shards lie."""
        return self.artifact.location / "shards"

    def shards(self) -> Iterator[IndexShard]:
        """The shards, loaded and verified one at a time."""
        for record in self.records:
            yield read_shard(self.folder, record)

    def search(self, queries: NDArray[np.float32], top_k: int) -> Hits:
        """The k best of each query [Q, D], a shard in memory at a time."""
        return search_shards(self.shards(), queries, top_k)


def described(record: ShardRecord) -> dict[str, Any]:
    """A record as JSON values for the manifest."""
    return asdict(record)
