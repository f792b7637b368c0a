"""The files of an index shard: write them, find what an earlier run wrote, read and verify them.

A shard is two files that plain FAISS and plain pyarrow open: `shards/00000.faiss` and `shards/00000.ids.parquet`
(columns doc_id and content_hash, in the order of the index; no doc_id where a passage was deleted). Their checksums
stand in the artifact's manifest. A shard takes its memory twice while it is read.
"""

import hashlib
import io
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from readapt_ray.errors import CorruptFileError
from readapt_ray.retrieval.faiss_build import faiss
from readapt_ray.retrieval.index_shard import DELETED, IndexShard
from readapt_ray.retrieval.shard_plan import packed_hashes
from readapt_ray.storage import Location

_METADATA_KEY = b"readapt"


@dataclass(frozen=True)
class ShardRecord:
    """What the manifest says of a shard."""

    name: str
    num_vectors: int
    num_bytes: int
    index_sha256: str
    ids_sha256: str
    num_deleted: int = 0
    """Vectors that are no longer found."""
    factory: str = "Flat"
    """FAISS factory string."""
    measured: dict[str, float] | None = None
    """Recall and time of a query; None for an exact shard."""


def write_shard(
    folder: Location,
    name: str,
    shard: IndexShard,
    *,
    encoder: str,
    factory: str = "Flat",
    measured: dict[str, float] | None = None,
) -> ShardRecord:
    """Write a shard, the ids last: where they are, the shard is whole.

    Args:
        folder: the `shards` folder of the artifact.
        name: 00000, 00001, ...
        encoder: fingerprint of what made the vectors, kept beside the ids.
        factory: how FAISS made it.
        measured: what was measured of it.
    """
    content = faiss.serialize_index(shard.index).tobytes()
    (folder / f"{name}.faiss").write_bytes(content)
    metadata = {
        "index_sha256": hashlib.sha256(content).hexdigest(),
        "index_bytes": len(content),
        "encoder": encoder,
        "factory": factory,
        "measured": measured,
    }
    return _write_ids(folder, name, shard.doc_ids, shard.hashes, metadata)


def _write_ids(
    folder: Location, name: str, doc_ids: NDArray[np.object_], hashes: bytes, metadata: dict[str, Any]
) -> ShardRecord:
    digests: list[bytes | None] = [hashes[start : start + 16] for start in range(0, len(hashes), 16)]
    schema = pa.schema(
        [("doc_id", pa.string()), ("content_hash", pa.binary(16))], metadata={_METADATA_KEY: json.dumps(metadata)}
    )
    columns = [
        pa.array([doc_id or None for doc_id in doc_ids], pa.string()),
        pa.array(digests or [None] * len(doc_ids), pa.binary(16)),
    ]
    sink = io.BytesIO()
    pq.write_table(pa.table(columns, schema=schema), sink, use_dictionary=False)
    (folder / f"{name}.ids.parquet").write_bytes(sink.getvalue())
    return _record(name, columns[0], metadata, sink.getvalue())


def carry_over(
    source: Location, record: ShardRecord, kept: NDArray[np.bool_], target: Location, *, encoder: str
) -> ShardRecord:
    """Copy a shard into another index, without the vectors that are no longer kept; FAISS's file stays as it is.

    Args:
        source: the `shards` folder that the shard lies in.
        record: what its manifest says of it.
        kept: [N], whether a vector is still found.
        target: the `shards` folder that it goes to, under the same name.
        encoder: fingerprint of what made the vectors.

    Raises:
        CorruptFileError: a file of it is gone, or is not the one that was written.
    """
    doc_ids, hashes = read_ids(source, record)
    content = _verified(source / f"{record.name}.faiss", record.index_sha256)
    (target / f"{record.name}.faiss").write_bytes(content)
    metadata = {
        "index_sha256": record.index_sha256,
        "index_bytes": len(content),
        "encoder": encoder,
        "factory": record.factory,
        "measured": record.measured,
    }
    return _write_ids(target, record.name, np.where(kept, doc_ids, DELETED), hashes, metadata)


def find_shard(folder: Location, name: str, *, encoder: str) -> ShardRecord | None:
    """The record of a shard that was written whole for this encoder; None where there is none."""
    ids, index = folder / f"{name}.ids.parquet", folder / f"{name}.faiss"
    if not ids.is_file() or not index.is_file():
        return None
    content = ids.read_bytes()
    try:
        with pq.ParquetFile(io.BytesIO(content)) as file:
            metadata = json.loads((file.schema_arrow.metadata or {}).get(_METADATA_KEY, b"{}"))
            doc_ids = file.read(columns=["doc_id"])["doc_id"]
    except (pa.ArrowInvalid, OSError):
        return None
    if metadata.get("encoder") != encoder or metadata.get("index_bytes") != index.size_bytes():
        return None
    return _record(name, doc_ids, metadata, content)


def _record(name: str, doc_ids: Any, metadata: dict[str, Any], ids: bytes) -> ShardRecord:
    return ShardRecord(
        name=name,
        num_vectors=len(doc_ids),
        num_bytes=metadata["index_bytes"] + len(ids),
        index_sha256=metadata["index_sha256"],
        ids_sha256=hashlib.sha256(ids).hexdigest(),
        num_deleted=doc_ids.null_count,
        factory=metadata["factory"],
        measured=metadata["measured"],
    )


def read_ids(folder: Location, record: ShardRecord) -> tuple[NDArray[np.object_], bytes]:
    """The doc_id of each vector of a shard, empty where it was deleted, and 16 bytes each of their contents.

    Raises:
        CorruptFileError: the file is gone, or is not the one that was written.
    """
    content = _verified(folder / f"{record.name}.ids.parquet", record.ids_sha256)
    table = pq.read_table(io.BytesIO(content))
    doc_ids = np.array([doc_id or DELETED for doc_id in table["doc_id"].to_pylist()], dtype=object)
    return doc_ids, packed_hashes(table["content_hash"].to_pylist())


def read_shard(folder: Location, record: ShardRecord) -> IndexShard:
    """Load a shard.

    Raises:
        CorruptFileError: a file of it is gone, or is not the one that was written.
    """
    content = _verified(folder / f"{record.name}.faiss", record.index_sha256)
    index = faiss.deserialize_index(np.frombuffer(content, np.uint8))
    doc_ids, hashes = read_ids(folder, record)
    if not index.ntotal == len(doc_ids) == record.num_vectors:
        raise CorruptFileError(
            f"{folder / record.name}: {index.ntotal} vectors, {len(doc_ids)} ids, {record.num_vectors} in the manifest; "
            f"run `readapt index` again"
        )
    return IndexShard(index, doc_ids, hashes)


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
