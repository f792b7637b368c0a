"""Write, find, read and verify the files of an index shard.

A shard is two files that plain FAISS and plain pyarrow open: `shards/00000.faiss` and `shards/00000.ids.parquet`
(columns doc_id and content_hash, in the order of the index). They never change. Row numbers of vectors that were
deleted later are in `shards/00000.dead` (older releases removed their doc_ids instead). `shards/00000.json` is written
last: it is the record of the shard, so that a resumed run reads no vectors and no ids. An approximate shard also has
`shards/00000.recall.npz`, its measured recall. `shards/00000.bm25.npz` holds BM25 scores. The artifact's manifest has
the checksums. Reading a shard takes twice its memory, unless its file is mapped.
"""

import hashlib
import io
import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from readapt_ray.dead_rows import read_row_numbers, write_row_numbers
from readapt_ray.errors import CorruptFileError
from readapt_ray.retrieval.bm25 import WordIndex
from readapt_ray.retrieval.cached_files import local_copy
from readapt_ray.retrieval.faiss_build import faiss
from readapt_ray.retrieval.footers import map_in_threads
from readapt_ray.retrieval.index_recall import set_depth
from readapt_ray.retrieval.index_shard import DELETED, IndexShard
from readapt_ray.retrieval.shard_plan import packed_hashes
from readapt_ray.retrieval.whole_files import check_whole
from readapt_ray.shared_files import share
from readapt_ray.storage import Location

_METADATA_KEY = b"readapt"


@dataclass(frozen=True)
class ShardRecord:
    """The entry of a shard in the manifest: sizes, checksums, recall."""

    name: str
    num_vectors: int
    num_bytes: int
    """Bytes of the `.faiss` and the `.ids.parquet` file together."""
    index_sha256: str
    ids_sha256: str
    num_deleted: int = 0
    """Vectors that searches no longer find."""
    factory: str = "Flat"
    """FAISS factory string."""
    measured: dict[str, float] | None = None
    """Recall and milliseconds per query; None for an exact shard."""
    trained: str | None = None
    """Id of the training of its lists and codes. Shards with equal ids can be merged. None for graphs and older
    indexes."""
    depth: int | None = None
    """nprobe or efSearch to search it with; None for the value in its file."""
    num_dead: int = 0
    """Vectors that its `.dead` file lists."""


def write_shard(
    folder: Location,
    name: str,
    shard: IndexShard,
    *,
    encoder: str,
    factory: str = "Flat",
    measured: dict[str, float] | None = None,
) -> ShardRecord:
    """Write the files of a shard. The record comes last: if it exists, the shard is complete.

    Args:
        folder: the `shards` folder of the artifact.
        name: 00000, 00001, ...
        encoder: fingerprint of the encoder that made the vectors; stored beside the ids.
        factory: FAISS factory string of the index.
        measured: recall and milliseconds per query; None for an exact shard.
    """
    content = faiss.serialize_index(shard.index).tobytes()
    (folder / f"{name}.faiss").write_bytes(content)
    record = ShardRecord(
        name=name,
        num_vectors=len(shard.doc_ids),
        num_bytes=len(content),
        index_sha256=hashlib.sha256(content).hexdigest(),
        ids_sha256="",
        factory=factory,
        measured=measured,
        trained=shard.trained,
    )
    return _write_ids(folder, record, shard.doc_ids, shard.hashes, encoder)


def _write_ids(
    folder: Location, record: ShardRecord, doc_ids: NDArray[np.object_], hashes: bytes, encoder: str
) -> ShardRecord:
    """Write the ids, then the record. `record.num_bytes` counts the FAISS file, which is already written."""
    digests: list[bytes | None] = [hashes[start : start + 16] for start in range(0, len(hashes), 16)]
    schema = pa.schema(
        [("doc_id", pa.string()), ("content_hash", pa.binary(16))],
        metadata={_METADATA_KEY: json.dumps({"encoder": encoder})},
    )
    columns = [
        pa.array([doc_id or None for doc_id in doc_ids], pa.string()),
        pa.array(digests or [None] * len(doc_ids), pa.binary(16)),
    ]
    sink = io.BytesIO()
    pq.write_table(pa.table(columns, schema=schema), sink, use_dictionary=False)
    content = sink.getvalue()
    (folder / f"{record.name}.ids.parquet").write_bytes(content)
    whole = replace(
        record,
        num_bytes=record.num_bytes + len(content),
        ids_sha256=hashlib.sha256(content).hexdigest(),
        num_deleted=columns[0].null_count,
    )
    return _write_record(folder, whole, len(content), encoder)


def _write_record(folder: Location, record: ShardRecord, ids_bytes: int, encoder: str) -> ShardRecord:
    state = {"encoder": encoder, "ids_bytes": ids_bytes, "record": asdict(record)}
    (folder / f"{record.name}.json").write_text(json.dumps(state))
    return record


def carry_over(
    source: Location, record: ShardRecord, kept: NDArray[np.bool_], target: Location, *, encoder: str
) -> ShardRecord:
    """Share the files of a shard with a newer index, and list the vectors that it must not find in a `.dead` file.

    Args:
        source: the `shards` folder of the earlier index.
        record: entry of the shard in the earlier manifest.
        kept: [N], whether a vector may still be found.
        target: the `shards` folder of the newer index; the name stays the same.
        encoder: fingerprint of the encoder that made the vectors.

    Returns:
        The record of the shard in the newer index.

    Raises:
        CorruptFileError: a file of the shard is gone, or does not have the size that was written.
    """
    names = [f"{record.name}.faiss", f"{record.name}.ids.parquet"]
    sizes = [(source / name).info().size or 0 for name in names]
    if sum(sizes) != record.num_bytes:
        raise CorruptFileError(
            f"{' and '.join(names)} in {source} have {sum(sizes)} bytes, and {record.num_bytes} in the manifest; run "
            f"`readapt index` without --previous"
        )
    dead = np.flatnonzero(~kept)
    if len(dead):
        write_row_numbers(_dead_file(target, record.name), dead)
    for name in names:
        share(source / name, target / name)
    carried = replace(record, num_deleted=len(dead), num_dead=len(dead))
    return _write_record(target, carried, sizes[1], encoder)


def find_shards(folder: Location, names: Collection[str], *, encoder: str) -> dict[str, ShardRecord]:
    """Return the records of complete shards of this encoder, by name. Reads one listing and a small file per shard.

    A shard is left out if its record is missing or damaged, a file has another size, or another encoder made it.

    Args:
        folder: the `shards` folder; it need not exist.
        names: the shards to look for.
        encoder: fingerprint of the encoder.
    """
    sizes = {name: info.size for name, info in folder.listing()}
    written = [name for name in names if f"{name}.json" in sizes]
    states = map_in_threads(lambda name: (folder / f"{name}.json").read_bytes(), written)
    found = {}
    for name, content in zip(written, states, strict=True):
        try:
            state = json.loads(content)
            record, ids_bytes = ShardRecord(**state["record"]), int(state["ids_bytes"])
        except (ValueError, KeyError, TypeError):
            continue
        due = (record.num_bytes - ids_bytes, ids_bytes)
        there = (sizes.get(f"{name}.faiss"), sizes.get(f"{name}.ids.parquet"))
        if there == due and state["encoder"] == encoder:
            found[name] = record
    return found


def read_id_table(folder: Location, record: ShardRecord, *, use_cache: bool = False) -> pa.Table:
    """Read a table with the doc_id and content_hash of each vector of a shard, in the order of the vectors.

    Deleted vectors have rows too. Their doc_id is null if an older release deleted them; otherwise find them by
    `deleted_rows`.

    Args:
        folder: the `shards` folder.
        record: entry of the shard in the manifest.
        use_cache: copy the file from an object store to this node's cache first, for other processes and the next
            start.

    Raises:
        CorruptFileError: the file is gone, or its checksum is wrong.
    """
    content = _verified(folder / f"{record.name}.ids.parquet", record.ids_sha256, use_cache=use_cache)
    return pq.read_table(io.BytesIO(content))


def deleted_rows(folder: Location, record: ShardRecord, table: pa.Table) -> NDArray[np.bool_]:
    """Return which vectors of a shard were deleted, bool [N], given its table from `read_id_table`."""
    deleted = table["doc_id"].is_null().to_numpy()
    if record.num_dead:
        deleted = deleted.copy()
        deleted[read_row_numbers(_dead_file(folder, record.name))] = True
    return np.asarray(deleted, bool)


def read_ids(folder: Location, record: ShardRecord, *, use_cache: bool = False) -> tuple[NDArray[np.object_], bytes]:
    """Read the doc_id of each vector of a shard (DELETED for deleted ones), and its content hash, 16 bytes per vector.

    An unknown hash is 16 zeros.

    Args:
        folder, record, use_cache: as in `read_shard`.

    Raises:
        CorruptFileError: the file is gone, or its checksum is wrong.
    """
    table = read_id_table(folder, record, use_cache=use_cache)
    doc_ids = np.array([doc_id or DELETED for doc_id in table["doc_id"].to_pylist()], dtype=object)
    if record.num_dead:
        doc_ids[read_row_numbers(_dead_file(folder, record.name))] = DELETED
    return doc_ids, packed_hashes(table["content_hash"].to_pylist())


def read_shard(
    folder: Location, record: ShardRecord, *, is_mapped: bool = False, use_cache: bool = False
) -> IndexShard:
    """Load a shard without its BM25 scores (see `read_words`), set to the search depth of its record.

    Args:
        folder: the `shards` folder.
        record: entry of the shard in the manifest.
        is_mapped: map the vectors of a local file into memory, so that all processes of a node share its pages, and
            compute its checksum once per node. Such a shard cannot be merged with others.
        use_cache: copy files of an object store to this node's cache first, for other processes and the next start.

    Raises:
        CorruptFileError: a file is gone, or its checksum is wrong.
    """
    file = folder / f"{record.name}.faiss"
    if use_cache:
        file = local_copy(file, record.index_sha256)
    if is_mapped and file.is_local:
        check_whole(file.local_path, record.index_sha256)
        index = faiss.read_index(str(file.local_path), faiss.IO_FLAG_MMAP_IFC)
    else:
        index = faiss.deserialize_index(np.frombuffer(_verified(file, record.index_sha256), np.uint8))
    doc_ids, hashes = read_ids(folder, record, use_cache=use_cache)
    if not index.ntotal == len(doc_ids) == record.num_vectors:
        raise CorruptFileError(
            f"{folder / record.name}: {index.ntotal} vectors, {len(doc_ids)} ids, {record.num_vectors} in the manifest; "
            f"run `readapt index` again"
        )
    set_depth(index, record.depth)
    return IndexShard(index, doc_ids, hashes, record.trained)


def _dead_file(folder: Location, name: str) -> Location:
    return folder / f"{name}.dead"


def words_file(folder: Location, name: str) -> Location:
    """Return the path of the file with the BM25 scores of a shard; an index without BM25 does not have it."""
    return folder / f"{name}.bm25.npz"


def read_words(folder: Location, name: str, sha256: str, *, use_cache: bool = False) -> WordIndex:
    """Load the BM25 scores of a shard.

    Args:
        folder: the `shards` folder.
        name: name of the shard.
        sha256: of its BM25 file, from the manifest.
        use_cache: read a file of an object store through a copy in this node's cache.

    Raises:
        CorruptFileError: the file is gone, or its checksum is wrong.
    """
    return WordIndex.from_bytes(_verified(words_file(folder, name), sha256, use_cache=use_cache))


def _verified(location: Location, sha256: str, *, use_cache: bool = False) -> bytes:
    try:
        content = (
            _content(local_copy(location, sha256, is_mapped=False), location) if use_cache else location.read_bytes()
        )
    except FileNotFoundError as error:
        raise CorruptFileError(f"{location} is gone; run `readapt index` again") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise CorruptFileError(
            f"{location} was cut short or altered: its checksum is not the one in the manifest; run `readapt index` again"
        )
    return content


def _content(copy: Location, location: Location) -> bytes:
    try:
        return copy.read_bytes()
    except FileNotFoundError:  # the cache removed it to make room for another file
        return location.read_bytes()
