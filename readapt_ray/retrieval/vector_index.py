"""FAISS indexes in shards: build one, write and verify it, search many as if they were one.

A shard is two files that plain FAISS and plain pyarrow open: `shards/00000.faiss` and
`shards/00000.ids.parquet` (columns doc_id and content_hash, in the order of the index; no doc_id where a
passage was deleted). Their checksums stand in the artifact's manifest. Memory is a shard; for `flat` that is
4 bytes a number, twice while it is read.
"""

import contextlib
import functools
import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from readapt_ray.artifacts import Artifact, open_artifact
from readapt_ray.errors import CorruptFileError
from readapt_ray.retrieval.exact import Hits, TopK, check_queries
from readapt_ray.retrieval.faiss_build import faiss, train
from readapt_ray.retrieval.shard_plan import packed_hashes
from readapt_ray.storage import Location

DELETED = ""
"""Stands for the doc_id of a vector that is no longer found."""
_METADATA_KEY = b"readapt"
_TRAINING_ROWS = 65_536
_TRAINING_ROWS_PER_LIST = 64


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


@dataclass(frozen=True)
class IndexShard:
    """A shard in memory: a FAISS index, and the doc_id of each of its vectors."""

    index: Any
    doc_ids: NDArray[np.object_]
    """[N]; empty where a passage was deleted."""
    hashes: bytes = b""
    """16 bytes a vector, of the content of its passage; empty where nothing is known of any."""

    @functools.cached_property
    def _deleted(self) -> NDArray[np.bool_]:
        return np.asarray(self.doc_ids == DELETED)

    def search(self, queries: NDArray[np.float32], top_k: int) -> Hits:
        """The k best of this shard, ties by doc_id.

        A query that finds less than k, because it looked at too little of the index or deleted vectors took
        places, is asked again and looks further, until it has k or all that there are.

        Raises:
            InputError: the dimensions differ, or top_k is under 1.
        """
        check_queries(queries, self.index.d)
        hits = self._best(self.index, None, queries, top_k)
        num_due = min(top_k, len(self.doc_ids) - np.count_nonzero(self._deleted))
        for index, parameters in _ever_further(self.index):
            lacking = np.flatnonzero(np.count_nonzero(hits.scores > -np.inf, axis=1) < num_due)
            if not len(lacking):
                break
            found = self._best(index, parameters, queries[lacking], top_k)
            hits.scores[lacking], hits.doc_ids[lacking] = found.scores, found.doc_ids
        return hits

    def _best(self, index: Any, parameters: Any, queries: NDArray[np.float32], top_k: int) -> Hits:
        """The k best of what one search looks at.

        FAISS breaks ties as it likes, so one more than k is asked for, and where the last place may be
        tied with the one after it, or deleted vectors took places, more, until k have an end.
        """
        best = TopK(len(queries), top_k)
        pending = np.arange(len(queries))
        wanted = top_k + 1
        scores = np.full((len(queries), 0), -np.inf, np.float32)
        doc_ids = np.empty((len(queries), 0), object)
        while len(pending):
            depth = min(wanted, self.index.ntotal)
            asked = np.ascontiguousarray(queries[pending], np.float32)
            found, rows = index.search(asked, depth, params=parameters)
            kept = np.where((rows < 0) | self._deleted[rows], -np.inf, found).astype(np.float32)
            scores, doc_ids = _widened(scores, doc_ids, depth)
            scores[pending], doc_ids[pending] = kept, self.doc_ids[rows]
            if depth == self.index.ntotal:
                break
            kth = -np.partition(-kept, top_k - 1, axis=1)[:, top_k - 1]
            pending = pending[(rows[:, -1] >= 0) & (kth <= found[:, -1])]
            wanted *= 2
        best.add(scores, doc_ids)
        return best.hits()


def _ever_further(index: Any) -> Iterator[tuple[Any, Any]]:
    """What to search and with which parameters, to look at more of an index than it is set to, and ever more.

    Inverted lists are probed twice as many, up to all. A graph takes efSearch = k at least by itself, but may
    have parts that no link leads to: its vectors are scanned.
    """
    lists = faiss.try_extract_index_ivf(index)
    if lists is not None:
        num_probed = lists.nprobe
        while num_probed < lists.nlist:
            num_probed = min(2 * num_probed, lists.nlist)
            yield index, _probing(index, num_probed)
    elif isinstance(index, faiss.IndexHNSW):
        yield index.storage, None


def _probing(index: Any, num_lists: int) -> Any:
    """Parameters of one search that probes so many lists; the index itself, which others search too, stays as it is."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexRefine):
        below = _probing(index.base_index, num_lists)
        return faiss.IndexRefineSearchParameters(k_factor=index.k_factor, base_index_params=below)  # type: ignore[call-arg]
    if isinstance(index, faiss.IndexPreTransform):
        return faiss.SearchParametersPreTransform(index_params=_probing(index.index, num_lists))  # type: ignore[call-arg]
    return faiss.SearchParametersIVF(nprobe=num_lists)  # type: ignore[call-arg]


def _widened(
    scores: NDArray[np.float32], doc_ids: NDArray[np.object_], width: int
) -> tuple[NDArray[np.float32], NDArray[np.object_]]:
    shape = (len(scores), width - scores.shape[1])
    return (
        np.concatenate([scores, np.full(shape, -np.inf, np.float32)], axis=1),
        np.concatenate([doc_ids, np.empty(shape, object)], axis=1),
    )


def build_shard(factory: str, dimension: int, chunks: Iterable[tuple[list[str], NDArray[np.float32]]]) -> IndexShard:
    """An index of the vectors [N, D] that come in chunks with their doc_ids; one that must be trained holds them all.

    Args:
        factory: FAISS factory string.
        dimension: D.
        chunks: doc_ids and vectors.
    """
    index = new_index(factory, dimension)
    doc_ids: list[str] = []
    parts: list[NDArray[np.float32]] = []
    for names, vectors in chunks:
        parts.append(np.ascontiguousarray(vectors, np.float32))
        doc_ids.extend(names)
        if index.is_trained:
            index.add(parts.pop())
    if parts:
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        train(index, training_sample(whole, index))
        index.add(whole)
    return IndexShard(index, np.array(doc_ids, dtype=object))


def new_index(factory: str, dimension: int) -> Any:
    """Return the untrained FAISS index of a factory string, for inner products.

    FAISS would also order the codes of product quantization for filtering by Hamming distance (polysemous codes). That is
    most of the training, 1.6 seconds of a core per code byte, and no search here filters so.
    """
    index = faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
    with contextlib.suppress(RuntimeError):  # not an IVF index
        inverted_lists: Any = faiss.downcast_index(faiss.extract_index_ivf(index))
        is_quantized = isinstance(inverted_lists, faiss.IndexIVFPQ)
        if is_quantized:
            inverted_lists.do_polysemous_training = False
    return index


def training_sample(vectors: NDArray[np.float32], index: Any) -> NDArray[np.float32]:
    """What an index is trained on: 64 vectors a list, and 65,536 at least, where there are so many."""
    try:
        num_lists = faiss.extract_index_ivf(index).nlist
    except RuntimeError:
        num_lists = 0
    size = max(_TRAINING_ROWS, _TRAINING_ROWS_PER_LIST * num_lists)
    if len(vectors) <= size:
        return vectors
    return vectors[np.sort(np.random.default_rng(0).choice(len(vectors), size, replace=False))]


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
        """Vectors in all shards that are found."""
        return sum(record.num_vectors - record.num_deleted for record in self.records)

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
