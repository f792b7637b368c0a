"""Read Parquet and Arrow files. Strings are read as bytes and decoded here, because they may not be valid UTF-8."""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from readapt_ray.damage import READ_ERRORS
from readapt_ray.errors import CorpusError, first_line
from readapt_ray.sources.columns import passage_columns
from readapt_ray.sources.lines import refuse_damaged
from readapt_ray.sources.listing import DataFile
from readapt_ray.sources.read_options import ReadOptions
from readapt_ray.sources.source import BadRow, Row, Span, Unreadable
from readapt_ray.sources.tables import BATCH_ROWS, Advance, Layout, SplitAt, Values
from readapt_ray.storage import Location

_FILE_MAGIC = b"ARROW1"


@contextlib.contextmanager
def open_parquet(file: Location, label: str) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file for a `with` block, and close it at its end. `label` is the file's name in errors.

    Raises:
        CorpusError: the file is missing, cut short, or not Parquet.
    """
    try:
        parquet = pq.ParquetFile(file.open_input())
    except READ_ERRORS as error:
        refuse_damaged(label, "as Parquet", error)
        raise
    with parquet:
        yield parquet


def parquet_rows(
    file: Location,
    label: str,
    pick: Callable[[list[str]], Sequence[str]],
    advance: Advance = lambda _: None,
    span: Span | None = None,
) -> Iterator[Values | BadRow]:
    """Yield place and values of each row of a Parquet file, and a bad row for each row with text that is not UTF-8.

    Args:
        file: the file to read.
        label: name of the file in places and errors. A place is the label and the row number from 1; with a span, rows
            are counted from its beginning.
        pick: takes the column names of the file, and returns those to read. Values are in the order that it returns.
        advance: called with the fraction of the file's rows that were read.
        span: the row groups to read; None means all. At the end its `num_lines` is set to the number of rows.
    """
    with open_parquet(file, label) as parquet:
        yield from _parquet_rows(parquet, label, pick(parquet.schema_arrow.names), advance, span)


def _parquet_rows(
    parquet: pq.ParquetFile, label: str, columns: Sequence[str], advance: Advance, span: Span | None
) -> Iterator[Values | BadRow]:
    number = 0
    groups = list(
        range(parquet.num_row_groups) if span is None else range(span.start, min(span.end, parquet.num_row_groups))
    )
    wanted = list(dict.fromkeys(columns))
    _refuse_repeated(parquet.schema_arrow.names, wanted, label)
    try:
        for batch in parquet.iter_batches(BATCH_ROWS, row_groups=groups, columns=wanted, use_threads=False):
            yield from _batch_rows(batch, columns, label, number)
            number += batch.num_rows
            advance(number / parquet.metadata.num_rows)
        if span is not None:
            span.num_lines = number
    except READ_ERRORS as error:
        refuse_damaged(label, f"after row {number}", error)
        raise


def _batch_rows(batch: pa.RecordBatch, columns: Sequence[str], label: str, before: int) -> Iterator[Values | BadRow]:
    for number, values in enumerate(zip(*(_cells(batch.column(name)) for name in columns), strict=True), before + 1):
        try:
            yield f"{label}:{number}", tuple(v.decode() if isinstance(v, bytes) else v for v in values)
        except UnicodeDecodeError:
            yield BadRow(f"{label}:{number}", "not_utf8")


def _cells(column: pa.Array) -> Iterator[object]:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = column.cast(pa.large_binary())
    return map(_python_value, column)


def _python_value(value: pa.Scalar) -> object:
    """Convert a value to Python; to `Unreadable` if Python cannot hold it, such as the year 20201."""
    try:
        return value.as_py()
    except (OverflowError, ValueError) as error:
        return Unreadable(f"{value.type}: {first_line(error)}")


def _refuse_repeated(found: Sequence[str], wanted: Iterable[str], label: str) -> None:
    """Refuse a file that has a wanted column more than once: which one is meant is not known."""
    for name in wanted:
        if list(found).count(name) > 1:
            raise CorpusError(
                f"{label} has {list(found).count(name)} columns {name!r}; write it again with one, or name another column with --columns"
            )


class Parquet:
    """The format Parquet. Places count rows from 1."""

    name = "parquet"
    suffixes = (".parquet",)

    def split_at(self, file: Location, label: str, options: ReadOptions) -> SplitAt:
        """Return "row groups": a file can be split at its row groups."""
        del file, label, options
        return "row groups"

    def layout(self, file: Location, label: str, options: ReadOptions) -> Layout | None:
        """Read the columns from the file's schema. None if the file has no rows."""
        with open_parquet(file, label) as parquet:
            return schema_layout(parquet.schema_arrow, label, options) if parquet.metadata.num_rows else None

    def rows(
        self, file: Location, label: str, options: ReadOptions, advance: Advance, span: Span | None = None
    ) -> Iterator[Row | BadRow]:
        """Yield each row of the file, or of the row groups in `span`."""
        with open_parquet(file, label) as parquet:
            if parquet.metadata.num_rows:
                columns = schema_layout(parquet.schema_arrow, label, options).columns
                for row in _parquet_rows(parquet, label, columns.names, advance, span):
                    yield row if isinstance(row, BadRow) else columns.row(*row)


def schema_layout(schema: pa.Schema, label: str, options: ReadOptions) -> Layout:
    """Return which columns of an Arrow schema make a passage: the columns that the user chose, else well-known names.

    Raises:
        CorpusError: there is no id or text column, or a chosen column is missing. `label` names the file in the
            message.
    """
    columns = passage_columns(schema.names, label, options.columns)
    _refuse_repeated(schema.names, columns.names, label)
    return Layout(columns, tuple(schema.names), tuple(schema.field(name).type for name in columns.kept))


class Arrow:
    """The format Arrow IPC: streams, as `datasets.save_to_disk` writes them, and files with a footer (Feather)."""

    name = "arrow"
    suffixes = (".arrow", ".feather")

    def split_at(self, file: Location, label: str, options: ReadOptions) -> SplitAt:
        """Return "nowhere": a file cannot be split, because a stream has no list of its batches."""
        del file, label, options
        return "nowhere"

    def layout(self, file: Location, label: str, options: ReadOptions) -> Layout | None:
        """Read the columns from the file's schema. None if the file has no rows."""
        with _open_arrow(file, label) as (schema, batches):
            has_rows = any(batch.num_rows for batch, _ in batches)
            return schema_layout(schema, label, options) if has_rows else None

    def rows(
        self, file: Location, label: str, options: ReadOptions, advance: Advance, span: Span | None = None
    ) -> Iterator[Row | BadRow]:
        """Yield each row of the file. It is always read as a whole: `span` only takes the number of rows."""
        layout = self.layout(file, label, options)
        if layout is not None:
            for row in arrow_rows(file, label, lambda _: layout.columns.names, advance, span):
                yield row if isinstance(row, BadRow) else layout.columns.row(*row)


def arrow_rows(
    file: Location,
    label: str,
    pick: Callable[[list[str]], Sequence[str]],
    advance: Advance = lambda _: None,
    span: Span | None = None,
) -> Iterator[Values | BadRow]:
    """Yield place and values of each row of an Arrow file, and a bad row for each row with text that is not UTF-8.

    See `parquet_rows` for the arguments. The whole file is read: `span` only takes the number of rows. `advance` is
    called with the fraction of the bytes.
    """
    number, size_bytes = 0, max(file.size_bytes(), 1)
    with _open_arrow(file, label) as (schema, batches):
        columns = pick(schema.names)
        _refuse_repeated(schema.names, columns, label)
        for batch, position in batches:
            for start in range(0, batch.num_rows, BATCH_ROWS):
                part = batch.slice(start, BATCH_ROWS)
                yield from _batch_rows(part, columns, label, number)
                number += part.num_rows
            advance(min(position / size_bytes, 1.0))
    if span is not None:
        span.num_lines = number


@contextlib.contextmanager
def _open_arrow(file: Location, label: str) -> Iterator[tuple[pa.Schema, Iterator[tuple[pa.RecordBatch, int]]]]:
    """Open an Arrow stream or file. Yields its schema, and its batches, each with the offset in bytes after it.

    Raises:
        CorpusError: the file is neither a stream nor a file with a footer, or is cut short.
    """
    with contextlib.closing(file.open_input()) as raw:
        try:
            is_file = raw.read(len(_FILE_MAGIC)) == _FILE_MAGIC
            raw.seek(0)
            reader: Any = pa.ipc.open_file(raw) if is_file else pa.ipc.open_stream(raw)
        except READ_ERRORS as error:
            refuse_damaged(label, "as Arrow", error)
            raise
        yield reader.schema, _batches(reader, raw, label, is_file)


def _batches(reader: Any, raw: IO[bytes], label: str, is_file: bool) -> Iterator[tuple[pa.RecordBatch, int]]:
    number = 0
    try:
        for batch in map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader:
            yield batch, raw.tell()
            number += batch.num_rows
    except READ_ERRORS as error:
        refuse_damaged(label, f"after row {number}", error)
        raise


def saved_files(folder: Location, files: Sequence[DataFile]) -> list[DataFile]:
    """Return `files` without those that the library `datasets` cached beside a saved data set.

    Of a folder (`folder` itself or one below it) with a `state.json`, only the files that it lists are kept. The files
    of all other folders are kept.

    Args:
        folder: the data set.
        files: files below it. Their labels are relative to it.

    Raises:
        CorpusError: a listed file is missing.
    """
    states = {name for name, _ in folder.listing("state.json", recursive=True)} if folder.is_folder() else set()
    kept = list(files)
    for name in sorted(states):
        below = name.removesuffix("state.json")
        try:
            state = json.loads((folder / name).read_text())
            wanted = {f"{below}{each['filename']}" for each in state["_data_files"]}
        except (ValueError, KeyError, TypeError):
            continue
        there = {file.label for file in files}
        if wanted - there:
            raise CorpusError(
                f"{folder / name} lists {min(wanted - there)}, which is not there; copy the data set again"
            )
        kept = [file for file in kept if file.label.rpartition("/")[0] != below.rstrip("/") or file.label in wanted]
    return kept
