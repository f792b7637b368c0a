"""Write vectors to Parquet files, and read them back, a range of rows at a time.

Columns: `doc_id` string, `vector` fixed_size_list (int8 with a `scale`) and `content_hash`; plain pyarrow reads them.
The metadata of each file says what made it. Rows are sorted by doc_id, so that the statistics of row groups lead to a
doc_id. Memory: the rows that are read. One core reads some 400 MB of vectors per second.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from readapt_ray import dead_rows
from readapt_ray.errors import CorpusError, CorruptFileError
from readapt_ray.records import vector_schema
from readapt_ray.retrieval.parquet_rows import explain_damage, read_rows
from readapt_ray.storage import Location

METADATA_KEY = b"readapt"
SHARD_BYTES = 512 << 20
"""Bytes of float32 vectors that one task holds, unless the options say otherwise."""
VECTOR_COLUMNS = ("doc_id", "vector", "scale")
_ROW_GROUP_ROWS = 1024
_CHUNK_ROWS = 16384


@dataclass(frozen=True)
class RowRange:
    """Consecutive rows of one file: `name` is relative to the folder that holds it."""

    name: str
    start: int
    num_rows: int


@dataclass(frozen=True)
class Footer:
    """The footer of a Parquet file: live rows, schema, size, and our own metadata (empty for a file of others)."""

    num_rows: int
    schema: pa.Schema
    num_bytes: int
    metadata: dict[str, Any]
    digest: str
    """Hash of the sizes and statistics of its first row group. Copies of a file have equal digests."""
    num_dead: int = 0
    """Dead rows, which `num_rows` does not count."""

    @property
    def dimension(self) -> int:
        """Return the number of dimensions of a vector; only for a file of vectors."""
        return int(self.schema.field("vector").type.list_size)

    @property
    def left_out(self) -> list[str]:
        """Return the doc_ids that have no row, since their vector cannot be searched (NaN, infinite or zero)."""
        return list(self.metadata.get("left_out", []))


def cut_into_shards(counts: Sequence[tuple[str, int]], rows_per_shard: int) -> list[list[RowRange]]:
    """Cut the rows of files into shards of `rows_per_shard` rows; only the last one may be smaller.

    A shard may span files. Files a (5 rows) and b (3 rows) at 4 rows per shard: [a 0-4], [a 4-5, b 0-3]; ends are
    exclusive.

    Args:
        counts: each file's name and number of rows, in order.
        rows_per_shard: at least 1.
    """
    shards: list[list[RowRange]] = []
    room = 0
    for name, num_rows in counts:
        start = 0
        while start < num_rows:
            if room == 0:
                shards.append([])
                room = rows_per_shard
            taken = min(room, num_rows - start)
            shards[-1].append(RowRange(name, start, taken))
            start += taken
            room -= taken
    return shards


def read_footer(location: Location) -> Footer:
    """Read the footer of a Parquet file, and nothing else of it.

    Raises:
        CorruptFileError: the file was cut short or altered, or is gone.
    """
    with explain_damage(location), dead_rows.opened(location) as file:
        stored = (file.schema.metadata or {}).get(METADATA_KEY, b"{}")
        metadata = file.parquet.metadata
        first_group = str(metadata.row_group(0).to_dict()) if metadata.num_rows else ""
        digest = hashlib.blake2b(first_group.encode(), digest_size=16).hexdigest()
        said = dict(json.loads(stored))
        return Footer(file.num_rows, file.schema, file.num_bytes, said, digest, metadata.num_rows - file.num_rows)


def to_stored_columns(
    doc_ids: Sequence[str], vectors: NDArray[np.floating[Any]], dtype: str, *, max_left_out: int = 0
) -> pa.Table:
    """Convert vectors to the columns that are stored: `vector`, and for int8 also `scale`.

    int8 is symmetric: the number of largest magnitude in a vector becomes 127 or -127.

    Args:
        doc_ids: of the N vectors; used in the error only.
        vectors: [N, D].
        dtype: float32, float16 or int8.
        max_left_out: how many vectors may be unusable: not finite in `dtype`, or zero. They become null, and
            `write_stored` leaves their rows out.

    Raises:
        CorpusError: more vectors than that are unusable; the message names the first doc_id.
    """
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(vectors, dtype="float32" if dtype == "int8" else dtype)
    unusable = ~is_usable(cast)
    if unusable.sum() > max_left_out:
        raise CorpusError(
            f"{describe_fault(doc_ids, cast)}, so it cannot be searched; {unusable.sum()} of {len(cast)} passages are like it, and "
            f"max_left_out = {max_left_out}: look at that passage and at the model"
        )
    mask = pa.array(unusable)
    columns = {}
    if dtype == "int8":
        cast[unusable] = 1
        scales = np.abs(cast).max(axis=1) / np.float32(127)
        cast = np.rint(cast / scales[:, None]).astype(np.int8)
        columns["scale"] = pa.array(scales)
    numbers = pa.FixedSizeListArray.from_arrays(pa.array(cast.reshape(-1)), cast.shape[1], mask=mask)
    return pa.table({"vector": numbers, **columns})


def write_vectors(
    location: Location,
    doc_ids: Sequence[str],
    vectors: NDArray[np.floating[Any]],
    *,
    dtype: str,
    metadata: Mapping[str, Any],
) -> None:
    """Write a file of vectors, sorted by doc_id and without content hashes; it appears complete or not at all.

    Args:
        location: the file; an existing one is replaced.
        doc_ids: of the N vectors.
        vectors: [N, D]; converted by `to_stored_columns`.
        dtype: float32, float16 or int8.
        metadata: JSON values, kept under the key `readapt` of the Parquet metadata.

    Raises:
        CorpusError: a vector is not finite in `dtype`, or zero; the message names its doc_id.
    """
    hashes = pa.nulls(len(doc_ids), pa.binary(16))
    write_stored(location, doc_ids, to_stored_columns(doc_ids, vectors, dtype), hashes, metadata=metadata)


def write_stored(
    location: Location, doc_ids: Sequence[str], stored: pa.Table, hashes: pa.Array, *, metadata: Mapping[str, Any]
) -> int:
    """Write vectors that `to_stored_columns` converted. Rows with a null vector are left out; the footer names them.

    The rows are written in the order of their doc_ids.

    Args:
        doc_ids: of the N rows.
        stored: the columns `vector` and, for int8, `scale`.
        hashes: 16 bytes per passage, the hash of its content.
        metadata: as in `write_vectors`.

    Returns:
        Bytes of the file.
    """
    table = stored.add_column(0, "doc_id", pa.array(doc_ids, pa.string())).append_column("content_hash", hashes)
    element = table.schema.field("vector").type
    is_null = table["vector"].is_null()
    if left_out := table.filter(is_null)["doc_id"].to_pylist():
        table = table.filter(pc.invert(is_null))
        metadata = {**metadata, "left_out": sorted(left_out)}
    names = {pa.float32(): "float32", pa.float16(): "float16", pa.int8(): "int8"}
    schema = vector_schema(element.list_size, names[element.value_type])
    table = table.select(schema.names).cast(schema).take(pc.sort_indices(table["doc_id"]))
    table = table.replace_schema_metadata({METADATA_KEY: json.dumps(dict(metadata))})
    return _write(location, table)


def write_live(source: Location, target: Location) -> None:
    """Copy a file of vectors without its dead rows; an existing target is replaced. All rows are in memory."""
    _write(target, dead_rows.read_table(source))


def _write(location: Location, table: pa.Table) -> int:
    with location.open_output() as stream:
        pq.write_table(
            table,
            stream,
            row_group_size=_ROW_GROUP_ROWS,
            compression="none",
            use_dictionary=False,
            write_statistics=["doc_id"],
        )
        return stream.tell()


def is_usable(vectors: NDArray[np.floating[Any]]) -> NDArray[np.bool_]:
    """Return which vectors can be searched, bool [N]: finite, and not all zeros."""
    usable: NDArray[np.bool_] = np.isfinite(vectors).all(axis=1) & vectors.any(axis=1)
    return usable


def describe_fault(doc_ids: Sequence[str], vectors: NDArray[np.floating[Any]]) -> str:
    """Describe what is wrong with the first vector that cannot be searched, with its doc_id; empty if all can be."""
    usable = is_usable(vectors)
    if usable.all():
        return ""
    index = int(np.flatnonzero(~usable)[0])
    state = "is zero" if np.isfinite(vectors[index]).all() else "holds NaN or infinity"
    return f"the vector of {doc_ids[index]!r} {state}"


def matrix_of(table: pa.Table, where: object) -> tuple[list[str], NDArray[np.float32]]:
    """Return doc_ids and vectors (float32 [N, D]) of a table that was read from a file of vectors.

    int8 vectors are multiplied by their scale.

    Args:
        table: the columns VECTOR_COLUMNS, as far as the file has them.
        where: the file, for errors.

    Raises:
        CorruptFileError: a vector is missing, not finite, or zero; `where` and the doc_id are named.
    """
    doc_ids = table["doc_id"].to_pylist()
    column = table["vector"].combine_chunks()
    array = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    if array.null_count or None in doc_ids:
        raise CorruptFileError(f"{where} has a row without doc_id or vector; run `readapt embed` again")
    dimension = array.type.list_size
    vectors = array.flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False).reshape(-1, dimension)
    if "scale" in table.column_names:
        vectors *= table["scale"].to_numpy()[:, None]
    fault = describe_fault(doc_ids, vectors)
    if fault:
        raise CorruptFileError(f"{where}: {fault}; run `readapt embed` again")
    return doc_ids, vectors


def iterate_vectors(
    folder: Location, ranges: Sequence[RowRange], *, chunk_rows: int = _CHUNK_ROWS
) -> Iterator[tuple[list[str], NDArray[np.float32]]]:
    """Read doc_ids and vectors (float32) of row ranges, in their order, in chunks of at most `chunk_rows` rows.

    A chunk holds rows of one range only.

    Raises:
        CorruptFileError: as in `read_rows` and `matrix_of`.
    """
    for each in ranges:
        location = folder / each.name
        for start in range(each.start, each.start + each.num_rows, chunk_rows):
            num_rows = min(chunk_rows, each.start + each.num_rows - start)
            yield matrix_of(read_rows(location, start, num_rows, VECTOR_COLUMNS), location)
