"""How passages lie in one file of rows: JSON Lines, TSV and Parquet.

One line, or one batch of 512 Parquet rows, is in memory at a time.
"""

import contextlib
import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, Literal, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from readapt_ray.damage import READ_ERRORS
from readapt_ray.errors import CorpusError
from readapt_ray.sources.lines import Line, read_lines, refuse_damaged
from readapt_ray.sources.source import MISSING, BadRow, Limits, Row, Span
from readapt_ray.storage import Location, state_of

ID_NAMES: Final = ("doc_id", "_id", "id")
TITLE_NAMES: Final = ("title",)
TEXT_NAMES: Final = ("text", "contents", "body")
QUERY_ID_NAMES: Final = ("query_id", "_id", "id", "qid", "query-id")
QUERY_TEXT_NAMES: Final = ("text", "query", "contents", "body")
_PEEKED_LINES = 100
_BATCH_ROWS = 512
_REMEMBERED_FILES = 64

Advance = Callable[[float], None]


Cut = Literal["lines", "row groups", "nowhere"]
"""Where each line is a row; where there are row groups; where a row may hold line breaks."""


class Columns(NamedTuple):
    """The names of the columns of a passage; `title` is None where there is none."""

    doc_id: str
    title: str | None
    text: str


def first_of(wanted: Sequence[str], found: Iterable[str]) -> str | None:
    """The first of the wanted names that was found."""
    present = set(found)
    return next((name for name in wanted if name in present), None)


def passage_columns(found: Sequence[str], label: str) -> Columns:
    """The columns of a passage.

    Raises:
        CorpusError: no id or no text; it names the columns found and those wanted.
    """
    doc_id, text = first_of(ID_NAMES, found), first_of(TEXT_NAMES, found)
    missing = [
        f"no {what} column ({' or '.join(names)})"
        for what, names, column in (("text", TEXT_NAMES, text), ("id", ID_NAMES, doc_id))
        if column is None
    ]
    if doc_id is None or text is None:
        have = ", ".join(map(str, found)) or "none"
        raise CorpusError(f"{label} has {' and '.join(missing)}; its columns are {have}: rename what holds it")
    return Columns(doc_id, first_of(TITLE_NAMES, found), text)


class TableFormat(Protocol):
    """How rows lie in one file."""

    @property
    def name(self) -> str:
        """The format's name."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """How its files end."""

    @property
    def is_cut_at(self) -> Cut:
        """Where a file can be cut into parts that are read on their own."""

    def columns(self, file: Location, label: str) -> Columns | None:
        """Which columns make a passage; None for a file without rows. Raises CorpusError where none do."""

    def rows(
        self, file: Location, label: str, limits: Limits, advance: Advance, span: Span | None = None
    ) -> Iterator[Row | BadRow]:
        """The rows; `advance` is told the part of the file, from 0 to 1, that was read, `span` the part to read."""


class JsonLines:
    """One JSON object a line."""

    name = "jsonl"
    suffixes = (".jsonl", ".ndjson")
    is_cut_at: Final = "lines"

    def columns(self, file: Location, label: str) -> Columns | None:
        """From the keys of the first hundred objects."""
        return _json_columns(file, label, state_of(file.info()))

    def rows(
        self, file: Location, label: str, limits: Limits, advance: Advance, span: Span | None = None
    ) -> Iterator[Row | BadRow]:
        """A row for each line that is an object."""
        columns = self.columns(file, label)
        if columns is None:
            return
        for line in read_lines(
            file, label, max_line_bytes=limits.max_line_bytes, advance=_shares(file, advance), span=span
        ):
            value = parsed_object(line, label)
            if isinstance(value, BadRow):
                yield value
                continue
            title = value.get(columns.title) if columns.title else None
            place = f"{label}:{line.number}" if isinstance(line, Line) else label
            yield Row(place, value.get(columns.doc_id, MISSING), title, value.get(columns.text, MISSING))


@functools.lru_cache(maxsize=_REMEMBERED_FILES)
def _json_columns(file: Location, label: str, state: str) -> Columns | None:
    """Find the columns once per process and state of a file, since each range of it asks for them."""
    del state
    keys: dict[str, None] = {}
    num_peeked = 0
    for line in itertools.islice(read_lines(file, label), _PEEKED_LINES):
        num_peeked += 1
        value = parsed_object(line, label)
        if isinstance(value, dict):
            keys |= dict.fromkeys(value)
    if num_peeked and not keys:
        raise CorpusError(f"{label} is not JSON Lines: none of its first {num_peeked} lines is a JSON object")
    return passage_columns(list(keys), label) if num_peeked else None


def parsed_object(line: Line | BadRow, label: str) -> dict[str, Any] | BadRow:
    """The JSON object that a line holds, or why it holds none."""
    if isinstance(line, BadRow):
        return line
    try:
        value = json.loads(line.text)
    except (ValueError, RecursionError):
        return BadRow(f"{label}:{line.number}", "not_json")
    return value if isinstance(value, dict) else BadRow(f"{label}:{line.number}", "not_json_object")


class Tsv:
    """Columns set apart by tabs: with a line of names, or id and text, or id, title and text. No quoting."""

    name = "tsv"
    suffixes = (".tsv",)
    is_cut_at: Final = "lines"

    def columns(self, file: Location, label: str) -> Columns | None:
        """From the first line."""
        header = _tsv_header(file, label, state_of(file.info()))
        return None if header is None else passage_columns(header[0], label)

    def rows(
        self, file: Location, label: str, limits: Limits, advance: Advance, span: Span | None = None
    ) -> Iterator[Row | BadRow]:
        """A row for each line that has all columns."""
        header = _tsv_header(file, label, state_of(file.info()))
        if header is None:
            return
        names, names_at = header
        columns = passage_columns(names, label)
        id_at, text_at = names.index(columns.doc_id), names.index(columns.text)
        title_at = names.index(columns.title) if columns.title else None
        lines = read_lines(file, label, max_line_bytes=limits.max_line_bytes, advance=_shares(file, advance), span=span)
        for line in lines:
            if isinstance(line, BadRow):
                yield line
            elif line.start == names_at:
                continue
            elif len(fields := line.text.split("\t")) != len(names):
                yield BadRow(f"{label}:{line.number}", "wrong_columns")
            else:
                title = None if title_at is None else fields[title_at]
                yield Row(f"{label}:{line.number}", fields[id_at], title, fields[text_at])


@functools.lru_cache(maxsize=_REMEMBERED_FILES)
def _tsv_header(file: Location, label: str, state: str) -> tuple[list[str], int | None] | None:
    """The columns' names, and where the line that gives them begins; None where no line does."""
    del state
    first = next((line for line in read_lines(file, label) if isinstance(line, Line)), None)
    if first is None:
        return None
    fields = first.text.split("\t")
    names = [field.strip().lower() for field in fields]
    if set(names) & set(ID_NAMES) or (set(names) & set(TEXT_NAMES) and len(set(names)) > 1):
        return names, first.start
    if len(fields) not in (2, 3):
        raise CorpusError(
            f"{label} has {len(fields)} columns and no line of names; give id and text, or id, title and text, "
            f"set apart by tabs, or a first line that names the columns"
        )
    return (["id", "text"] if len(fields) == 2 else ["id", "title", "text"]), None


def _cells(column: pa.Array) -> Iterator[object]:
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


def parquet_rows(
    file: Location,
    label: str,
    pick: Callable[[list[str]], Sequence[str]],
    advance: Advance = lambda _: None,
    span: Span | None = None,
) -> Iterator[tuple[str, tuple[object, ...]] | BadRow]:
    """Yield place and values of each row, in the columns that `pick` chooses; a place counts rows from 1."""
    number = 0
    with open_parquet(file, label) as parquet:
        columns = pick(parquet.schema_arrow.names)
        groups = list(range(parquet.num_row_groups) if span is None else range(span.start, span.end))
        try:
            for batch in parquet.iter_batches(_BATCH_ROWS, row_groups=groups, columns=columns, use_threads=False):
                for values in zip(*(_cells(batch.column(name)) for name in columns), strict=True):
                    number += 1
                    try:
                        yield f"{label}:{number}", tuple(v.decode() if isinstance(v, bytes) else v for v in values)
                    except UnicodeDecodeError:
                        yield BadRow(f"{label}:{number}", "not_utf8")
                advance(number / parquet.metadata.num_rows)
            if span is not None:
                span.num_lines = number
        except READ_ERRORS as error:
            refuse_damaged(label, f"after row {number}", error)
            raise


class Parquet:
    """Columns of Parquet files; a place counts rows from 1."""

    name = "parquet"
    suffixes = (".parquet",)
    is_cut_at: Final = "row groups"

    def columns(self, file: Location, label: str) -> Columns | None:
        """From the schema."""
        with open_parquet(file, label) as parquet:
            return passage_columns(parquet.schema_arrow.names, label) if parquet.metadata.num_rows else None

    def rows(
        self,
        file: Location,
        label: str,
        limits: Limits,  # noqa: ARG002 - the protocol's signature
        advance: Advance,
        span: Span | None = None,
    ) -> Iterator[Row | BadRow]:
        """A row for each row."""
        columns = self.columns(file, label)
        if columns is None:
            return
        for row in parquet_rows(file, label, lambda _: [name for name in columns if name], advance, span):
            if isinstance(row, BadRow):
                yield row
            else:
                place, (doc_id, *title, text) = row
                yield Row(place, doc_id, title[0] if title else None, text)


def _shares(file: Location, advance: Advance) -> Callable[[int], None]:
    size_bytes = max(file.size_bytes(), 1)
    return lambda read_bytes: advance(read_bytes / size_bytes)


FORMATS: dict[str, TableFormat] = {"jsonl": JsonLines(), "tsv": Tsv(), "parquet": Parquet()}
