"""Leave out the dead rows of Parquet files that are never changed.

A part of passages or vectors is written once. Where some of its rows were changed or deleted since, the next artifact
shares the file under a name that says so, `part-00003-partly.parquet`, with the numbers of its dead rows beside it in
`_part-00003-partly.dead`. What reads parts opens them here, and sees the live rows alone, numbered through; a part that is
whole costs no request more. Plain pyarrow sees all rows.
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
"""Share of the rows of a part above which its live rows are written again, without the dead ones."""
_MARK, _SUFFIX, _DEAD_SUFFIX = "-partly", ".parquet", ".dead"
_DIGEST_BYTES = 8

_Rows = TypeVar("_Rows", pa.Table, pa.RecordBatch)


def partly_name(name: str) -> str:
    """Return the name of a part some of whose rows are dead, by that of a whole one."""
    return f"{name.removesuffix(_SUFFIX)}{_MARK}{_SUFFIX}"


def whole_name(name: str) -> str:
    """Return the name that a part has when all its rows live."""
    return f"{name.removesuffix(_SUFFIX).removesuffix(_MARK)}{_SUFFIX}"


def is_partly(name: str) -> bool:
    """Return whether a part has dead rows, by its name."""
    return name.endswith(f"{_MARK}{_SUFFIX}")


def read_dead(file: Location) -> NDArray[np.int64]:
    """Return the dead rows of a part, rising; none of a whole one.

    Raises:
        CorruptFileError: they are gone or altered.
    """
    if not is_partly(file.name):
        return np.zeros(0, np.int64)
    return read_rows(_dead_file(file))


def read_rows(file: Location) -> NDArray[np.int64]:
    """Return row numbers that `write_rows` wrote.

    Raises:
        CorruptFileError: the file is gone or altered.
    """
    try:
        content = file.read_bytes()
    except FileNotFoundError as error:
        raise CorruptFileError(f"{file} is gone; make it again with the stage that wrote it") from error
    if content[:_DIGEST_BYTES] != _digest(content[_DIGEST_BYTES:]):
        raise CorruptFileError(f"{file} was cut short or altered; make it again with the stage that wrote it")
    return np.frombuffer(content, "<i4", offset=_DIGEST_BYTES).astype(np.int64)


def write_rows(file: Location, rows: NDArray[np.int64]) -> None:
    """Write rising row numbers, 4 bytes each, with a checksum before them."""
    content = rows.astype("<i4").tobytes()
    file.write_bytes(_digest(content) + content)


def share_part(source: Location, folder: Location, name: str, dead: NDArray[np.int64]) -> str:
    """Share a part with another artifact, without some of its live rows; return its name there.

    Args:
        source: the part.
        folder: of the parts there.
        name: as a whole part has it.
        dead: the live rows that are dead from now on, rising and numbered through.
    """
    before = read_dead(source)
    if len(before) + len(dead):
        name = partly_name(name)
        write_rows(_dead_file(folder / name), np.union1d(before, physical_rows(dead, before)))
    share(source, folder / name)  # last: a part is there once its dead rows are
    return name


def physical_rows(rows: NDArray[np.int64], dead: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return where live rows, numbered through, stand in a file with dead rows.

    Example:
        physical_rows([0, 1, 2], dead=[1, 2]) == [0, 3, 4]
    """
    return rows + np.searchsorted(dead - np.arange(len(dead)), rows, side="right")


class LiveRows:
    """An open Parquet file without its dead rows.

    Args:
        parquet: the file.
        dead: its dead rows, rising.
        num_bytes: of the file.
    """

    def __init__(self, parquet: pq.ParquetFile, dead: NDArray[np.int64], num_bytes: int) -> None:
        self.parquet, self._dead, self.num_bytes = parquet, dead, num_bytes
        self.schema: pa.Schema = parquet.schema_arrow

    @property
    def num_rows(self) -> int:
        """Return the number of its live rows."""
        return int(self.parquet.metadata.num_rows) - len(self._dead)

    def read(self, rows: range | NDArray[np.int64], columns: Sequence[str]) -> pa.Table:
        """Read rising live rows; of a range the row groups at once, else one at a time. Unknown columns are left out."""
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
        """Yield all rows, at most `num_rows` at a time."""
        first = 0
        for batch in self.parquet.iter_batches(num_rows, columns=None if columns is None else list(columns)):
            yield self._living(batch, first)
            first += batch.num_rows

    def _living(self, rows: _Rows, first: int) -> _Rows:
        """Leave out the dead ones of rows that stand in the file from `first` on."""
        dead = self._dead[slice(*np.searchsorted(self._dead, (first, first + rows.num_rows)))]
        if not len(dead):
            return rows
        lives = np.ones(rows.num_rows, bool)
        lives[dead - first] = False
        return rows.filter(pa.array(lives))


@contextlib.contextmanager
def opened(file: Location, *, max_bytes: int = 0) -> Iterator[LiveRows]:
    """Open a part.

    Args:
        file: the part.
        max_bytes: as for `Location.open_input`.

    Raises:
        CorruptFileError: its dead rows are gone or altered.
    """
    dead = read_dead(file)
    with file.open_input(max_bytes=max_bytes) as stream, pq.ParquetFile(stream) as parquet:
        num_bytes = stream.seek(0, io.SEEK_END)  # known already: no request
        yield LiveRows(parquet, dead, num_bytes)


def read_table(file: Location, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a part as a whole."""
    with opened(file) as part:
        return part.read(range(part.num_rows), part.schema.names if columns is None else columns)


def _dead_file(file: Location) -> Location:
    """Return the file of the dead rows of a part; pyarrow and Spark leave out such a name when they read a folder."""
    return file.sibling(f"_{file.name.removesuffix(_SUFFIX)}{_DEAD_SUFFIX}")


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest()
