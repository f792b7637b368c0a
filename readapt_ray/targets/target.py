"""Define the interface to a vector database, and the rows that an export sends to it.

A row has a `doc_id`, a float32 `vector`, and a payload: the columns of its passage. Writing the same rows again changes
nothing, so an interrupted file of vectors is simply sent again. Memory: one file of vectors and its passages.
"""

import datetime
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from readapt_ray.errors import InputError

SERVER_WRITERS = 16
"""Maximum number of tasks that write to a server at once, however large the cluster is: servers allow few connections
(PostgreSQL 100)."""

Record = Mapping[str, Any]
"""Metadata that is stored in or beside a collection: fingerprints of the encoder and the export, dimension, columns."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The columns of a collection's rows, and the dimension of their vectors."""

    dimension: int
    vector_dtype: str
    """Data type of the vectors in their files: float32, float16 or int8. All are sent as float32."""
    payload: pa.Schema
    """Columns other than `doc_id` and `vector`."""

    @property
    def schema(self) -> pa.Schema:
        """Return the schema of a row: `doc_id`, `vector` (D float32 numbers), then the payload."""
        vector = pa.list_(pa.float32(), self.dimension)
        return pa.schema([("doc_id", pa.string()), ("vector", vector), *self.payload])


class Target(Protocol):
    """A collection of a vector database, with an open connection."""

    @property
    def max_writers(self) -> int:
        """Return the maximum number of tasks that may write at once, each with its own connection."""

    def close(self) -> None:
        """Close the connection."""

    def check(self, layout: Layout) -> None:
        """Check dimension and column names against the limits of the database, before anything is sent.

        Raises:
            InputError: a limit is exceeded; the message names it, and says what to do.
        """

    def record(self) -> Record | None:
        """Return the record of the collection; None if there is no collection, {} if readapt did not create it."""

    def create(self, layout: Layout, record: Record) -> None:
        """Create the collection, and store its record. It must not exist: `record` returned None, or it was dropped."""

    def set_record(self, record: Record) -> None:
        """Replace the record of the collection, which must exist."""

    def drop(self) -> None:
        """Remove the collection with its rows. It must exist."""

    def write(self, part: str, batches: Iterable[pa.Table]) -> None:
        """Add rows; a row replaces the one with the same doc_id. Searches may miss them until `finish`.

        Args:
            part: name of the file of vectors that the rows come from, with 8 digits of the export's fingerprint.
            batches: rows with the columns of `Layout.schema`.
        """

    def delete(self, doc_ids: Sequence[str]) -> None:
        """Delete rows; doc_ids that do not exist are ignored."""

    def finish(self) -> None:
        """Make all written rows searchable; build the index if the database does not build it by itself."""

    def count(self) -> int:
        """Return the number of rows. Call `finish` first: some databases do not count rows before."""

    def search(self, vectors: NDArray[np.float32], top_k: int) -> list[list[str]]:
        """Return the doc_ids of the k rows with the largest inner product for each vector [Q, D], best first.

        Fewer than k if the collection has fewer rows. The result is approximate if the index of the database is. Call
        `finish` first.
        """


def matrix(rows: pa.Table) -> NDArray[np.float32]:
    """Return the vectors of rows as float32 [N, D]."""
    column = rows["vector"].combine_chunks()
    array = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    numbers = array.flatten().to_numpy(zero_copy_only=False)
    return np.asarray(numbers, np.float32).reshape(-1, array.type.list_size)


def payloads(rows: pa.Table) -> list[dict[str, Any]]:
    """Return doc_id and payload of each row as a dict of JSON values, without the vector.

    Columns that are null, NaN or infinite are left out of a row. Dates and times become ISO 8601 text, and other values
    that JSON lacks become `str(value)`.
    """
    plain = rows.drop_columns(["vector"]).to_pylist()
    found = ({name: _json(value) for name, value in row.items()} for row in plain)
    return [{name: value for name, value in row.items() if value is not None} for row in found]


def _json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, list):
        return [_json(each) for each in value]
    if isinstance(value, dict):
        return {name: _json(each) for name, each in value.items()}
    return value if isinstance(value, str | int | float | bool | type(None)) else str(value)


def check_dimension(layout: Layout, most: int, database: str) -> None:
    """Refuse vectors with more dimensions than a database can index.

    Args:
        layout: has the dimension.
        most: maximum number of dimensions.
        database: its name, for the message.

    Raises:
        InputError: the vectors have more than `most` dimensions.
    """
    if layout.dimension > most:
        raise InputError(
            f"{database} indexes vectors of at most {most:,} dimensions, and these have {layout.dimension:,}; embed with "
            f"--dimensions {most} or fewer if the model was trained for it, or export to another database"
        )


def check_columns(layout: Layout, refused: Callable[[str], bool], database: str) -> None:
    """Refuse columns of passages whose names a database does not allow.

    Args:
        layout: has the columns. `doc_id` and `vector` are not checked.
        refused: returns whether the database does not allow a name.
        database: its name, for the message.

    Raises:
        InputError: there is such a column; the message names the first.
    """
    for name in filter(refused, layout.payload.names):
        raise InputError(
            f"{database} takes no column {name!r}; ingest without it in --keep, or after giving it another name in the source, "
            f"or export with --no-with-text"
        )


def check_bytes(rows: Iterable[Mapping[str, Any]], column: str, most: int, database: str) -> None:
    """Refuse rows whose text in one column has more than `most` bytes of UTF-8; a row without the column passes.

    Args:
        rows: rows as `payloads` returns them.
        column: name of the column.
        most: maximum number of bytes.
        database: its name, for the message.

    Raises:
        InputError: there is such a row; the message names the doc_id of the first.
    """
    for row in rows:
        size = len(str(row.get(column, "")).encode())
        if size > most:
            advice = (
                "shorten it" if column == "doc_id" else "ingest with --max-passage-chars, or export with --no-with-text"
            )
            raise InputError(
                f"{column} of {str(row['doc_id'])[:80]!r} has {size:,} bytes, and {database} takes at most {most:,}; {advice}"
            )
