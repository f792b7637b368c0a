"""Parquet files as they come: perhaps cut short, with strings that are perhaps not UTF-8."""

import contextlib
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from readapt_ray.damage import READ_ERRORS
from readapt_ray.sources.lines import refuse_damaged
from readapt_ray.storage import Location


def cells(column: pa.Array) -> Iterator[object]:
    """The values of a column; strings as bytes, since what a file calls a string need not be UTF-8."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = column.cast(pa.large_binary())
    return (value.as_py() for value in column)


@contextlib.contextmanager
def open_parquet(file: Location, label: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file.

    Raises:
        CorpusError: it is cut short, or is not one.
    """
    try:
        parquet = pq.ParquetFile(file.open_input())
    except READ_ERRORS as error:
        refuse_damaged(label, "as Parquet", error)
        raise
    with parquet:
        yield parquet
