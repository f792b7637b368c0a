"""Define what a format of rows is: JSON, CSV, TSV, Parquet or Arrow.

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
"""Files whose columns a process remembers, since each range of a file asks for them."""

Advance = Callable[[float], None]

Values = tuple[str, tuple[object, ...]]
"""The place of a row, and its values in some columns."""

Cut = Literal["lines", "row groups", "nowhere"]
"""Where each line is a row; where there are row groups; where a row may hold line breaks."""


class Layout(NamedTuple):
    """What one file of rows holds."""

    columns: Columns
    found: tuple[str, ...]
    """Every column that was seen."""
    kept_types: tuple[pa.DataType, ...]
    """Of the columns to keep, as far as the file says."""


class TableFormat(Protocol):
    """The layout of rows in one file."""

    @property
    def name(self) -> str:
        """The format's name."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """How its files end."""

    def cut(self, file: Location, label: str, options: ReadOptions) -> Cut:
        """Return where a file can be cut into parts that are read on their own."""

    def layout(self, file: Location, label: str, options: ReadOptions) -> Layout | None:
        """Return which columns make a passage; None for a file without rows. Raises CorpusError where none do."""

    def rows(
        self, file: Location, label: str, options: ReadOptions, advance: Advance, span: Span | None = None
    ) -> Iterator[Row | BadRow]:
        """Return the rows; `advance` is told the part of the file, from 0 to 1, that was read, `span` the part to read."""


def shares(file: Location, advance: Advance) -> Callable[[int], None]:
    """Return what turns bytes that were read into the share of the file."""
    size_bytes = max(file.size_bytes(), 1)
    return lambda read_bytes: advance(read_bytes / size_bytes)
