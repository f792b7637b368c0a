"""Read Parquet parts without their dead rows: rows that were deleted or changed after the file was written.

A part of passages or vectors is written once and never modified. If some of its rows are later changed or deleted, the
next artifact shares the file under the name `part-00003-partly.parquet`. The row numbers of the dead rows are in a file
beside it, `_part-00003-partly.dead`. A part that is opened here shows only its live rows, numbered consecutively from 0.
A part without dead rows costs no extra request. Plain pyarrow sees all rows.
"""

import contextlib
import hashlib
import io
from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from readapt_ray.errors import CorruptFileError
from readapt_ray.shared_files import share
from readapt_ray.storage import Location

MAX_DEAD = 0.2
"""If more than this fraction of a part's rows is dead, its live rows are written to a new part."""
_MARK, _SUFFIX, _DEAD_SUFFIX = "-partly", ".parquet", ".dead"
_DIGEST_BYTES = 8

_Rows = TypeVar("_Rows", pa.Table, pa.RecordBatch)


def partly_name(name: str) -> str:
    """Return the name that a part has once some of its rows are dead: `part-3.parquet` -> `part-3-partly.parquet`."""
    return f"{name.removesuffix(_SUFFIX)}{_MARK}{_SUFFIX}"


def name_without_mark(name: str) -> str:
    """Return the name of a part without dead rows: `part-3-partly.parquet` -> `part-3.parquet`."""
    return f"{name.removesuffix(_SUFFIX).removesuffix(_MARK)}{_SUFFIX}"


def is_partly(name: str) -> bool:
    """Return whether the name of a part says that it has dead rows (it ends with `-partly.parquet`)."""
    return name.endswith(f"{_MARK}{_SUFFIX}")


def read_dead(file: Location) -> NDArray[np.int64]:
    """Return the row numbers of a part's dead rows as int64, ascending; empty if it has none.

    Raises:
        CorruptFileError: the file of dead rows is missing or was altered.
    """
    if not is_partly(file.name):
        return np.zeros(0, np.int64)
    return read_row_numbers(_dead_file(file))


def read_row_numbers(file: Location) -> NDArray[np.int64]:
    """Read the row numbers that `write_row_numbers` wrote, as int64.

    Raises:
        CorruptFileError: the file is missing or was altered.
    """
    try:
        content = file.read_bytes()
    except FileNotFoundError as error:
        raise CorruptFileError(f"{file} is gone; make it again with the stage that wrote it") from error
    if content[:_DIGEST_BYTES] != _digest(content[_DIGEST_BYTES:]):
        raise CorruptFileError(f"{file} was cut short or altered; make it again with the stage that wrote it")
    return np.frombuffer(content, "<i4", offset=_DIGEST_BYTES).astype(np.int64)


def write_row_numbers(file: Location, rows: NDArray[np.int64]) -> None:
    """Write ascending row numbers to a file: a checksum of 8 bytes, then 4 bytes per row."""
    content = rows.astype("<i4").tobytes()
    file.write_bytes(_digest(content) + content)


def share_part(source: Location, folder: Location, name: str, dead: NDArray[np.int64]) -> str:
    """Share a part with another artifact in which some of its live rows are dead, and return its name there.

    Args:
        source: the part.
        folder: the other artifact's folder of parts.
        name: the name to give it there, without the mark of dead rows.
        dead: which of the live rows to mark as dead, ascending, as positions among the live rows.
    """
    before = read_dead(source)
    if len(before) + len(dead):
        name = partly_name(name)
        write_row_numbers(_dead_file(folder / name), np.union1d(before, physical_rows(dead, before)))
    share(source, folder / name)  # last, so that a part never exists without its dead rows
    return name


def physical_rows(rows: NDArray[np.int64], dead: NDArray[np.int64]) -> NDArray[np.int64]:
    """Convert positions among the live rows to row numbers in the file.

    Example:
        physical_rows([0, 1, 2], dead=[1, 2]) == [0, 3, 4]
    """
    return rows + np.searchsorted(dead - np.arange(len(dead)), rows, side="right")


class LiveRows:
    """An open Parquet file that shows only its live rows.

    Args:
        parquet: the file.
        dead: row numbers of its dead rows, ascending.
        num_bytes: the size of the file.
    """

    def __init__(self, parquet: pq.ParquetFile, dead: NDArray[np.int64], num_bytes: int) -> None:
        self.parquet, self._dead, self.num_bytes = parquet, dead, num_bytes
        self.schema: pa.Schema = parquet.schema_arrow

    @property
    def num_rows(self) -> int:
        """The number of live rows."""
        return int(self.parquet.metadata.num_rows) - len(self._dead)

    def read(self, rows: range | NDArray[np.int64], columns: Sequence[str]) -> pa.Table:
        """Read some of the live rows.

        Args:
            rows: ascending positions among the live rows. The row groups of a range are read in one call, others one by
                one.
            columns: the columns to read. Columns that the file lacks are ignored.
        """
        there = [name for name in columns if name in self.schema.names]
        if not len(rows):
            return self.parquet.read_row_groups([], columns=there)
        places = physical_rows(np.asarray(rows), self._dead)
        sizes = (self.parquet.metadata.row_group(group).num_rows for group in range(self.parquet.num_row_groups))
        ends = np.cumsum([0, *sizes])
        groups = np.searchsorted(ends, places, side="right") - 1
        if isinstance(rows, range):
            table = self.parquet.read_row_groups(list(range(groups[0], groups[-1] + 1)), columns=there)
            inside = places - ends[groups[0]]
            table = table.slice(inside[0], inside[-1] + 1 - inside[0])
            return self._living(table, int(places[0]))
        tables = []
        for group in np.unique(groups).tolist():
            part = self.parquet.read_row_group(group, columns=there)
            tables.append(part.take(pa.array(places[groups == group] - ends[group])))
        return pa.concat_tables(tables)

    def batches(self, num_rows: int, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Yield all live rows in batches of at most `num_rows`; a batch may be empty. `columns` None means all."""
        first = 0
        for batch in self.parquet.iter_batches(num_rows, columns=None if columns is None else list(columns)):
            yield self._living(batch, first)
            first += batch.num_rows

    def _living(self, rows: _Rows, first: int) -> _Rows:
        """Remove the dead rows from consecutive rows of the file that start at row number `first`."""
        dead = self._dead[slice(*np.searchsorted(self._dead, (first, first + rows.num_rows)))]
        if not len(dead):
            return rows
        lives = np.ones(rows.num_rows, bool)
        lives[dead - first] = False
        return rows.filter(pa.array(lives))


@contextlib.contextmanager
def opened(file: Location, *, max_bytes: int = 0) -> Iterator[LiveRows]:
    """Open a part to read its live rows.

    Args:
        file: the part.
        max_bytes: fetch an object of up to this size at once; see `Location.open_input`.

    Raises:
        CorruptFileError: the file of dead rows is missing or was altered.
    """
    dead = read_dead(file)
    with file.open_input(max_bytes=max_bytes) as stream, pq.ParquetFile(stream) as parquet:
        num_bytes = stream.seek(0, io.SEEK_END)  # known already: no request
        yield LiveRows(parquet, dead, num_bytes)


def read_table(file: Location, columns: Sequence[str] | None = None) -> pa.Table:
    """Read all live rows of a part. `columns` None means all columns."""
    with opened(file) as part:
        return part.read(range(part.num_rows), part.schema.names if columns is None else columns)


def _dead_file(file: Location) -> Location:
    """Return the file of a part's dead rows. Its name starts with `_`, so pyarrow and Spark ignore it in a folder."""
    return file.sibling(f"_{file.name.removesuffix(_SUFFIX)}{_DEAD_SUFFIX}")


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest()
