"""The files of an index shard: write them, find what an earlier run wrote, read and verify them.

A shard is two files that plain FAISS and plain pyarrow open: `shards/00000.faiss` and `shards/00000.ids.parquet` (columns
doc_id and content_hash, in the order of the index). They never change; the numbers of vectors that were deleted since are
in `shards/00000.dead` (older releases left out their doc_ids instead). Beside them, written last, `shards/00000.json` says
what they are, so that a resumed run reads no vectors and no ids; an approximate shard has `shards/00000.recall.npz`, what
it finds, and `shards/00000.bm25.npz` holds its BM25 scores. The artifact's manifest has the checksums. A shard that is not
mapped takes its memory twice while it is read.
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

from readapt_ray.dead_rows import read_rows, write_rows
from readapt_ray.errors import CorruptFileError
from readapt_ray.retrieval.bm25 import WordIndex
from readapt_ray.retrieval.cached_files import near
from readapt_ray.retrieval.faiss_build import faiss
from readapt_ray.retrieval.footers import at_once
from readapt_ray.retrieval.index_recall import set_depth
from readapt_ray.retrieval.index_shard import DELETED, IndexShard
from readapt_ray.retrieval.shard_plan import packed_hashes
from readapt_ray.retrieval.whole_files import check_whole
from readapt_ray.shared_files import share
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
    trained: str | None = None
    """What its lists and codes were trained as: shards that share it can be merged. None for graphs and older indexes."""
    depth: int | None = None
    """nprobe or efSearch that it is searched with; None for the value in its file."""
    num_dead: int = 0
    """Vectors whose numbers are in its file of dead rows."""


def write_shard(
    folder: Location,
    name: str,
    shard: IndexShard,
    *,
    encoder: str,
    factory: str = "Flat",
    measured: dict[str, float] | None = None,
) -> ShardRecord:
    """Write a shard, its record last: where that is, the shard is whole.

    Args:
        folder: the `shards` folder of the artifact.
        name: 00000, 00001, ...
        encoder: fingerprint of what made the vectors, kept beside the ids.
        factory: how FAISS made it.
        measured: what was measured of it.
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
    """Write the ids and then the record, of whose `num_bytes` the vectors are written."""
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
    """Take a shard into another index, without the vectors that are no longer kept; its files are shared as they are.

    Args:
        source: the `shards` folder of the shard.
        record: what its manifest says of it.
        kept: [N], whether a vector is still found.
        target: the `shards` folder that it goes to, under the same name.
        encoder: fingerprint of what made the vectors.

    Raises:
        CorruptFileError: a file of it is gone, or has another size than was written.
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
        write_rows(_dead_file(target, record.name), dead)
    for name in names:
        share(source / name, target / name)
    carried = replace(record, num_deleted=len(dead), num_dead=len(dead))
    return _write_record(target, carried, sizes[1], encoder)


def find_shards(folder: Location, names: Collection[str], *, encoder: str) -> dict[str, ShardRecord]:
    """Return the records of shards that were written whole for this encoder: one listing, and a small file per shard."""
    sizes = {name: info.size for name, info in folder.listing()}
    written = [name for name in names if f"{name}.json" in sizes]
    states = at_once(lambda name: (folder / f"{name}.json").read_bytes(), written)
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


def read_id_table(folder: Location, record: ShardRecord, *, is_kept: bool = False) -> pa.Table:
    """Return doc_id and content hash of each vector of a shard, deleted ones too; arguments and errors as for `read_ids`."""
    content = _verified(folder / f"{record.name}.ids.parquet", record.ids_sha256, is_kept=is_kept)
    return pq.read_table(io.BytesIO(content))


def deleted_rows(folder: Location, record: ShardRecord, table: pa.Table) -> NDArray[np.bool_]:
    """Return which vectors of a shard were deleted, [N], given its table of ids."""
    deleted = table["doc_id"].is_null().to_numpy()
    if record.num_dead:
        deleted = deleted.copy()
        deleted[read_rows(_dead_file(folder, record.name))] = True
    return np.asarray(deleted, bool)


def read_ids(folder: Location, record: ShardRecord, *, is_kept: bool = False) -> tuple[NDArray[np.object_], bytes]:
    """Return the doc_id of each vector of a shard, empty where it was deleted, and 16 bytes each of their contents.

    Args:
        folder, record, is_kept: as for `read_shard`.

    Raises:
        CorruptFileError: the file is gone, or is not the one that was written.
    """
    table = read_id_table(folder, record, is_kept=is_kept)
    doc_ids = np.array([doc_id or DELETED for doc_id in table["doc_id"].to_pylist()], dtype=object)
    if record.num_dead:
        doc_ids[read_rows(_dead_file(folder, record.name))] = DELETED
    return doc_ids, packed_hashes(table["content_hash"].to_pylist())


def read_shard(folder: Location, record: ShardRecord, *, is_mapped: bool = False, is_kept: bool = False) -> IndexShard:
    """Load a shard.

    Args:
        folder: the `shards` folder.
        record: what the manifest says of it.
        is_mapped: leave the vectors of a local file where they are, in pages that all processes of a node share, and
            compute its checksum once per node. Such a shard cannot be merged with others.
        is_kept: copy the files of an object store to this node first, for other processes and the next start, too.

    Raises:
        CorruptFileError: a file of it is gone, or is not the one that was written.
    """
    file = folder / f"{record.name}.faiss"
    if is_kept:
        file = near(file, record.index_sha256)
    if is_mapped and file.is_local:
        check_whole(file.local_path, record.index_sha256)
        index = faiss.read_index(str(file.local_path), faiss.IO_FLAG_MMAP_IFC)
    else:
        index = faiss.deserialize_index(np.frombuffer(_verified(file, record.index_sha256), np.uint8))
    doc_ids, hashes = read_ids(folder, record, is_kept=is_kept)
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
    """Return the file with the BM25 scores of a shard."""
    return folder / f"{name}.bm25.npz"


def read_words(folder: Location, name: str, sha256: str, *, is_kept: bool = False) -> WordIndex:
    """Load the BM25 scores of a shard; with `is_kept`, through a copy on this node.

    Raises:
        CorruptFileError: the file is gone, or is not the one that was written.
    """
    return WordIndex.from_bytes(_verified(words_file(folder, name), sha256, is_kept=is_kept))


def _verified(location: Location, sha256: str, *, is_kept: bool = False) -> bytes:
    try:
        content = _content(near(location, sha256, is_mapped=False), location) if is_kept else location.read_bytes()
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
    except FileNotFoundError:  # it made room for another
        return location.read_bytes()
