"""Parquet files of one folder, read by row number as if they were one.

Only the row groups that hold the rows are read. Memory: the rows asked for and one row group.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from readapt_ray.damage import READ_ERRORS, is_damage
from readapt_ray.errors import CorruptFileError, first_line
from readapt_ray.storage import Location

RowCounts = tuple[tuple[str, int], ...]
"""Name and number of rows of each file, in order."""


@dataclass(frozen=True)
class ParquetRows:
    """The rows of many files, numbered through."""

    folder: Location
    counts: RowCounts

    @property
    def num_rows(self) -> int:
        """Return the rows of all files."""
        return sum(count for _, count in self.counts)

    def take(self, rows: NDArray[np.int64], columns: Sequence[str]) -> pa.Table:
        """Return some rows in the order asked for; read only the row groups that hold them.

        A column that no file has is left out; one that some lack is null there.

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
                tables.append(_scattered(location, wanted, columns))
        back = np.empty(len(order), np.int64)
        back[order] = np.arange(len(order))
        if not tables:
            return pa.table({})
        return pa.concat_tables(tables, promote_options="default").take(pa.array(back))


def read_rows(location: Location, start: int, num_rows: int, columns: Sequence[str]) -> pa.Table:
    """Read rows `start` to `start + num_rows`, and only the row groups that hold them.

    Columns that the file does not have are left out.

    Raises:
        CorruptFileError: the file was cut short or altered, or has fewer rows.
    """
    with explain_damage(location), location.open_input() as stream, pq.ParquetFile(stream) as file:
        groups, first = [], 0
        skipped = 0
        for group in range(file.metadata.num_row_groups):
            last = first + file.metadata.row_group(group).num_rows
            if last <= start:
                skipped = last
            elif first < start + num_rows:
                groups.append(group)
            first = last
        there = [name for name in columns if name in file.schema_arrow.names]
        table = file.read_row_groups(groups, columns=there).slice(start - skipped, num_rows)
    if table.num_rows != num_rows:
        raise CorruptFileError(f"{location} has {first} rows, but {start + num_rows} were expected; make it again")
    return table


def _scattered(location: Location, rows: NDArray[np.int64], columns: Sequence[str]) -> pa.Table:
    """Yield rising rows of one file, with one row group in memory at a time."""
    tables = []
    with explain_damage(location), location.open_input() as stream, pq.ParquetFile(stream) as file:
        there = [name for name in columns if name in file.schema_arrow.names]
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        ends = np.cumsum([0, *sizes])
        if rows[-1] >= ends[-1]:
            raise CorruptFileError(f"{location} has {ends[-1]} rows, but {rows[-1] + 1} were expected; make it again")
        groups = np.searchsorted(ends, rows, side="right") - 1
        for group in np.unique(groups):
            part = file.read_row_group(int(group), columns=there)
            tables.append(part.take(pa.array(rows[groups == group] - ends[group])))
    return pa.concat_tables(tables)


@contextlib.contextmanager
def explain_damage(location: Location) -> Iterator[None]:
    """Raise our error for a file that is damaged or gone; a failure of the disk or network stays what it is."""
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
