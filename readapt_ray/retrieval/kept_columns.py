"""Filter searches by columns that a corpus has besides doc_id, title and text.

In: the files of the passages, and the doc_ids of some vectors. Out: the columns in the order of these doc_ids, null for
a doc_id without a passage. Memory holds the columns of these passages, and while reading the columns of a million
others.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from readapt_ray.errors import InputError
from readapt_ray.storage import Location

Value = str | int | float | bool
Bound = Literal["gt", "gte", "lt", "lte"]
_COMPARE = {"gt": pc.greater, "gte": pc.greater_equal, "lt": pc.less, "lte": pc.less_equal}
_OWN = frozenset({"doc_id", "title", "text", "content_hash", "parent_id"})
_ROWS_AT_ONCE = 1 << 20
_KEPT_MASKS = 16


@dataclass(frozen=True)
class Condition:
    """A filter on one column: its value must be one of some values, and within bounds; give at least one of both.

    A null never passes. A list passes if one of its values does.
    """

    column: str
    one_of: tuple[Value, ...] | None = None
    """None allows all values."""
    bounds: tuple[tuple[Bound, Value], ...] = ()
    """All must hold: `(("gte", 2020), ("lt", 2024))`."""
    kinds: tuple[type, ...] = field(init=False)
    """Types of the values, so that 1, 1.0 and True make different conditions, though they are equal in Python."""

    def __post_init__(self) -> None:
        """Store the types of the values."""
        values = (*(self.one_of or ()), *(value for _, value in self.bounds))
        object.__setattr__(self, "kinds", tuple(map(type, values)))


def kept_columns(files: Sequence[Location]) -> dict[str, pa.DataType]:
    """Return the columns, with their types, by which searches in a corpus can be filtered, from its first file.

    They hold text, numbers, booleans, times or lists of these, and are not our own (doc_id, title, text, ...). Empty
    without files.
    """
    if not files:
        return {}
    with files[0].open_input() as stream:
        schema = pq.read_schema(stream)
    return {field.name: field.type for field in schema if field.name not in _OWN and _is_comparable(field.type)}


def _is_comparable(kind: pa.DataType) -> bool:
    """Return whether filters can compare values of a type, or elements of a list type."""
    kind = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
    return _is_text(kind) or _is_number(kind) or pa.types.is_boolean(kind) or pa.types.is_temporal(kind)


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


class KeptColumns:
    """The filterable columns of some passages.

    Args:
        table: the columns; one row per passage.
    """

    def __init__(self, table: pa.Table) -> None:
        self._table = table
        self.passing = functools.lru_cache(maxsize=_KEPT_MASKS)(self._passing)
        """Return for each row whether all of some conditions (a tuple) hold: bool [N], which must not be changed.

        Raises InputError if a column does not exist, or a value does not fit its type. The last 16 results are cached,
        since many searches share a filter.
        """

    @classmethod
    def read(cls, files: Sequence[Location], doc_ids: Sequence[str]) -> "KeptColumns":
        """Read the filterable columns of the passages with these doc_ids from the files of a corpus.

        Row i belongs to `doc_ids[i]`; it is null if the corpus lacks that doc_id. Without such columns the table is
        empty. The columns of all files are read.
        """
        names = list(kept_columns(files))
        if not names:
            return cls(pa.table({}))
        wanted = pa.array(doc_ids, pa.large_string())
        place = np.full(len(wanted), -1, np.int64)
        parts, num_found = [], 0
        for table in _tables(files, ["doc_id", *names]):
            rows = pc.index_in(wanted, value_set=table["doc_id"].combine_chunks().cast(pa.large_string()))
            there = rows.is_valid().to_numpy(zero_copy_only=False)
            parts.append(table.select(names).take(rows.drop_null()))
            place[there] = np.arange(num_found, num_found + there.sum())
            num_found += int(there.sum())
        return cls(pa.concat_tables(parts).take(pa.array(place, mask=place < 0)).combine_chunks())

    def part(self, start: int, num_rows: int) -> "KeptColumns":
        """Return `num_rows` rows from row `start`, as columns of their own, without copying."""
        return KeptColumns(self._table.slice(start, num_rows))

    def _passing(self, conditions: tuple[Condition, ...]) -> NDArray[np.bool_]:
        """Return for each row whether all conditions hold, bool [N].

        Raises:
            InputError: a column does not exist, or a value does not fit its type.
        """
        masks = [_mask(self._column(each.column), each) for each in conditions]
        return _all([np.ones(len(self._table), bool), *masks])

    def _column(self, name: str) -> pa.ChunkedArray:
        if name not in self._table.column_names:
            there = ", ".join(map(repr, self._table.column_names)) or "none"
            raise InputError(f"there is no column {name[:100]!r} to filter by; the columns of this corpus are: {there}")
        return self._table[name]


def _tables(files: Sequence[Location], columns: list[str]) -> Iterator[pa.Table]:
    """Read columns of all files, about a million rows at a time."""
    read: list[pa.Table] = []
    for number, file in enumerate(files, start=1):
        with file.open_input() as stream:
            read.append(pq.read_table(stream, columns=columns))
        if number == len(files) or sum(map(len, read)) >= _ROWS_AT_ONCE:
            yield pa.concat_tables(read)
            read = []


def _mask(column: pa.ChunkedArray, condition: Condition) -> NDArray[np.bool_]:
    kind = column.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return _mask_of_values(column, condition)
    # A list passes if at least one of its values does.
    array = column.combine_chunks()
    rows = pc.list_parent_indices(array).to_numpy()
    passing = np.zeros(len(array), bool)
    passing[rows[_mask_of_values(pc.list_flatten(array), condition)]] = True
    return passing


def _mask_of_values(column: Any, condition: Condition) -> NDArray[np.bool_]:
    kind = column.type
    # Arrow cannot compare float16.
    compared = pa.float32() if pa.types.is_float16(kind) else kind
    column, passing = column.cast(compared), []
    if condition.one_of is not None:
        values = pa.concat_arrays([_typed(each, kind, condition.column) for each in condition.one_of])
        passing.append(pc.is_in(column, value_set=values.cast(compared)))
    for bound, value in condition.bounds:
        passing.append(_COMPARE[bound](column, _typed(value, kind, condition.column).cast(compared)[0]))
    return _all([each.fill_null(False).to_numpy(zero_copy_only=False) for each in passing])


def _all(masks: Sequence[NDArray[np.bool_]]) -> NDArray[np.bool_]:
    return np.asarray(np.stack(masks).all(axis=0), np.bool_)


def _typed(value: Value, kind: pa.DataType, column: str) -> pa.Array:
    """Return a value as an array of the column's type."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = (
        (_is_text(kind) and isinstance(value, str))
        or (_is_number(kind) and is_number)
        or (pa.types.is_boolean(kind) and isinstance(value, bool))
        or (pa.types.is_temporal(kind) and isinstance(value, str))
    )
    with contextlib.suppress(pa.ArrowInvalid, pa.ArrowNotImplementedError, OverflowError, UnicodeEncodeError):
        if fits:
            return _parsed(pa.array([value]), kind)
    raise InputError(f"the column {column!r} holds {kind}, and {str(value)[:100]!r} is no such value")


def _parsed(values: pa.Array, kind: pa.DataType) -> pa.Array:
    """Cast values to the column's type. If the column has a time zone, a time without one is UTC."""
    if not pa.types.is_timestamp(kind) or kind.tz is None:
        return values.cast(kind)
    try:
        return values.cast(kind)
    except pa.ArrowInvalid:
        return values.cast(pa.timestamp(kind.unit)).cast(pa.timestamp(kind.unit, "UTC")).cast(kind)
