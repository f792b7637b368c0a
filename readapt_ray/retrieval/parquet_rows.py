"""Read the Parquet files of a folder by row number as if they were one file, without their dead rows.

Only the row groups with these rows are read. Memory: the rows that are read and one row group.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from readapt_ray import dead_rows
from readapt_ray.damage import READ_ERRORS, is_damage
from readapt_ray.errors import CorruptFileError, first_line
from readapt_ray.object_streams import MAX_SCANNED_BYTES
from readapt_ray.storage import Location

RowCounts = tuple[tuple[str, int], ...]
"""Name and number of live rows of each file, in order."""


@dataclass(frozen=True)
class ParquetRows:
    """The live rows of the files of a folder, numbered from 0 over all files."""

    folder: Location
    counts: RowCounts

    @property
    def num_rows(self) -> int:
        """Return the total number of live rows of all files."""
        return sum(count for _, count in self.counts)

    def take(self, rows: NDArray[np.int64], columns: Sequence[str]) -> pa.Table:
        """Read some rows, in the order of `rows`; only the row groups with these rows are read.

        A column that no file has is left out. If some files lack a column, it is null in their rows. No rows give a
        table without columns.

        Args:
            rows: numbers of live rows over all files, in any order.
            columns: names of columns.

        Raises:
            CorruptFileError: a file was cut short or altered, is gone, or has fewer rows.
        """
        ends = np.cumsum([0, *(count for _, count in self.counts)])
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]
        files = np.searchsorted(ends, ordered, side="right") - 1
        tables = []
        for file in np.unique(files):
            location = self.folder / self.counts[file][0]
            first, last = np.searchsorted(ordered, (ends[file], ends[file + 1]))
            wanted = ordered[first:last] - ends[file]
            if wanted[-1] - wanted[0] == len(wanted) - 1 and (np.diff(wanted) == 1).all():
                tables.append(read_rows(location, int(wanted[0]), len(wanted), columns))
            else:
                tables.append(_read(location, wanted, columns))
        back = np.empty(len(order), np.int64)
        back[order] = np.arange(len(order))
        if not tables:
            return pa.table({})
        return pa.concat_tables(tables, promote_options="default").take(pa.array(back))


def read_rows(location: Location, start: int, num_rows: int, columns: Sequence[str]) -> pa.Table:
    """Read live rows `start` to `start + num_rows` (exclusive) of one Parquet file.

    Only the row groups with these rows are read. Columns that the file does not have are left out.

    Raises:
        CorruptFileError: the file was cut short or altered, is gone, or has fewer rows.
    """
    return _read(location, range(start, start + num_rows), columns)


def scan_rows(location: Location, start: int, num_rows: int, columns: Sequence[str]) -> pa.Table:
    """Read live rows `start` to `start + num_rows` (exclusive) of one Parquet file.

    Use it instead of `read_rows` to read a few columns of all rows: a file of up to 4 MiB on an object store is fetched
    whole in one request. Errors are the same.
    """
    return _read(location, range(start, start + num_rows), columns, max_bytes=MAX_SCANNED_BYTES)


def _read(
    location: Location, rows: range | NDArray[np.int64], columns: Sequence[str], *, max_bytes: int = 0
) -> pa.Table:
    """Read live rows, rising, of one file. If they are not a range, one row group is in memory at a time."""
    with explain_damage(location), dead_rows.opened(location, max_bytes=max_bytes) as file:
        due = int(rows[-1]) + 1 if len(rows) else 0
        if due > file.num_rows:
            raise CorruptFileError(f"{location} has {file.num_rows} rows, but {due} were expected; make it again")
        return file.read(rows, columns)


@contextlib.contextmanager
def explain_damage(location: Location) -> Iterator[None]:
    """Raise CorruptFileError if the block finds that a file is damaged or gone; let errors of disk and network pass.

    Args:
        location: the file, for the message.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise CorruptFileError(f"{location} is gone; make it again with the stage that wrote it") from error
    except READ_ERRORS as error:
        if not is_damage(error):
            raise
        raise CorruptFileError(
            f"{location} was cut short or altered ({first_line(error)}); remove it and run the stage that wrote it again"
        ) from error
