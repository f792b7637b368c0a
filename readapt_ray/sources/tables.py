"""Define `TableFormat`, the interface of all readers of rows: JSON, CSV, TSV, Parquet and Arrow.

One line, one JSON object, or one batch of 512 rows is in memory at a time.
"""

from collections.abc import Callable, Iterator
from typing import Final, Literal, NamedTuple, Protocol

import pyarrow as pa

from readapt_ray.sources.columns import Columns
from readapt_ray.sources.read_options import ReadOptions
from readapt_ray.sources.source import BadRow, Row, Span
from readapt_ray.storage import Location

BATCH_ROWS: Final = 512
REMEMBERED_FILES: Final = 64
"""Number of files whose columns are cached in a process, because every range of a file needs them."""

Advance = Callable[[float], None]

Values = tuple[str, tuple[object, ...]]
"""The place of a row (file and line), and its values in some columns."""

SplitAt = Literal["lines", "row groups", "nowhere"]
"""Where a file can be split: at lines (each is a row), at row groups, or nowhere (a row may contain line breaks)."""


class Layout(NamedTuple):
    """The columns of one file."""

    columns: Columns
    """The columns that make a passage."""
    found: tuple[str, ...]
    """All column names in the file."""
    kept_types: tuple[pa.DataType, ...]
    """Types of the kept columns, from the file's schema or its first rows."""


class TableFormat(Protocol):
    """A format of tables: how to find the columns of a file, and to read its rows."""

    @property
    def name(self) -> str:
        """The format's name."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The suffixes of its files, such as ".csv"."""

    def split_at(self, file: Location, label: str, options: ReadOptions) -> SplitAt:
        """Return where a file can be split into parts that are read independently."""

    def layout(self, file: Location, label: str, options: ReadOptions) -> Layout | None:
        """Return which columns make a passage; None for a file without rows. Raises CorpusError if columns are missing."""

    def rows(
        self, file: Location, label: str, options: ReadOptions, advance: Advance, span: Span | None = None
    ) -> Iterator[Row | BadRow]:
        """Yield the rows of a file, and a bad row for each one that cannot be read.

        Args:
            file: the file to read.
            label: name of the file in places and errors.
            options: how to read it.
            advance: called with the fraction of the file that was read, from 0 to 1.
            span: the part of the file to read; None means all. At the end its `num_lines` is set. A format that cannot
                be split at all reads the whole file.

        Raises:
            CorpusError: the file is damaged, or columns are missing.
        """


def shares(file: Location, advance: Advance) -> Callable[[int], None]:
    """Return a function that reports progress: it takes the bytes read so far, and calls `advance` with their fraction.

    Args:
        file: the file that is read.
        advance: called with the fraction of the file that was read, from 0 to 1.
    """
    size_bytes = max(file.size_bytes(), 1)
    return lambda read_bytes: advance(read_bytes / size_bytes)
