"""Read CSV and TSV: fields set apart by commas or tabs, in quotes where they hold these.

CSV is read as `csv.writer` and spreadsheets write it, with line breaks in quotes. TSV is read line by line, so that large
files are read in parts: quotes around a field count where they are as `csv.writer` writes them, and are text elsewhere. A TSV
file whose first megabyte has quoted line breaks is read as CSV.
"""

import collections
import csv
import functools
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from readapt_ray.errors import CorpusError
from readapt_ray.progress import amount
from readapt_ray.sources.columns import FIELDS, ID_NAMES, TEXT_NAMES, Columns, first_of, passage_columns, type_of_texts
from readapt_ray.sources.lines import Line, is_divisible, read_lines
from readapt_ray.sources.read_options import ReadOptions
from readapt_ray.sources.source import BadRow, Row, Span
from readapt_ray.sources.tables import REMEMBERED_FILES, Advance, Cut, Layout, shares
from readapt_ray.storage import Location, state_of

_PEEKED_ROWS = 100
_PEEKED_BYTES = 1 << 20
_DELIMITERS = ",;\t|"
_DOUBLED: dict[str, Any] = {}
_ESCAPED: dict[str, Any] = {"doublequote": False, "escapechar": "\\"}


class _Header(NamedTuple):
    """The columns of a file."""

    names: tuple[str, ...]
    first_line: int | None
    """Where the line that gives the names begins; None where no line does."""
    delimiter: str = "\t"
    has_line_breaks: bool = False
    """Whether quoted fields hold line breaks."""
    rows: tuple[tuple[str, ...], ...] = ()
    """The first rows."""


class Tsv:
    """Columns set apart by tabs: with a line of names, or id and text, or id, title and text."""

    name = "tsv"
    suffixes = (".tsv",)

    def cut(self, file: Location, label: str, options: ReadOptions) -> Cut:
        """Return whether a file can be cut at its lines: not if it is compressed, or quoted fields hold line breaks."""
        header = _tsv_header(file, label, state_of(file.info()), options)
        return "nowhere" if (header and header.has_line_breaks) or not is_divisible(file) else "lines"

    def layout(self, file: Location, label: str, options: ReadOptions) -> Layout | None:
        """Read the columns from the first line."""
        return _layout(_tsv_header(file, label, state_of(file.info()), options), label, options)

    def rows(
        self, file: Location, label: str, options: ReadOptions, advance: Advance, span: Span | None = None
    ) -> Iterator[Row | BadRow]:
        """Yield a row for each line that has all columns."""
        header = _tsv_header(file, label, state_of(file.info()), options)
        if header is None:
            return
        lines = read_lines(file, label, max_line_bytes=options.max_line_bytes, advance=shares(file, advance), span=span)
        if header.has_line_breaks:
            yield from _csv_rows(lines, header, label, options)
            return
        columns, at = _places(header, label, options)
        for line in lines:
            if isinstance(line, BadRow):
                yield line
            elif line.start != header.first_line:
                fields = _fields(line.text, len(header.names))
                if len(fields) != len(header.names):
                    yield BadRow(f"{label}:{line.number}", "wrong_columns")
                else:
                    yield columns.row(f"{label}:{line.number}", [fields[place] for place in at])


class Csv:
    """Columns set apart by commas (or semicolons, bars or tabs, by the first line), with a line of names."""

    name = "csv"
    suffixes = (".csv",)

    def cut(self, file: Location, label: str, options: ReadOptions) -> Cut:
        """Return that a file cannot be cut: a field may hold line breaks."""
        del file, label, options
        return "nowhere"

    def layout(self, file: Location, label: str, options: ReadOptions) -> Layout | None:
        """Read the columns from the first line."""
        return _layout(_csv_header(file, label, state_of(file.info()), options), label, options)

    def rows(
        self, file: Location, label: str, options: ReadOptions, advance: Advance, span: Span | None = None
    ) -> Iterator[Row | BadRow]:
        """Yield a row for each record."""
        header = _csv_header(file, label, state_of(file.info()), options)
        if header is not None:
            lines = read_lines(
                file, label, max_line_bytes=options.max_line_bytes, advance=shares(file, advance), span=span
            )
            yield from _csv_rows(lines, header, label, options)


def _layout(header: _Header | None, label: str, options: ReadOptions) -> Layout | None:
    if header is None:
        return None
    columns = passage_columns(header.names, label, options.columns)
    at = [header.names.index(name) for name in columns.kept]
    return Layout(columns, header.names, tuple(type_of_texts(row[place] for row in header.rows) for place in at))


def _places(header: _Header, label: str, options: ReadOptions) -> tuple[Columns, list[int]]:
    """Return the columns of a passage, and where in a row the value of each stands."""
    columns = passage_columns(header.names, label, options.columns)
    return columns, [header.names.index(name) for name in columns.names]


def _csv_rows(
    lines: Iterable[Line | BadRow], header: _Header, label: str, options: ReadOptions
) -> Iterator[Row | BadRow]:
    columns, at = _places(header, label, options)
    for record in _records(lines, header.delimiter, len(header.names), options.max_line_bytes):
        if isinstance(record, BadRow):
            yield record
        elif record.start == header.first_line:
            continue
        elif len(record.fields) != len(header.names):
            yield BadRow(f"{label}:{record.number}", "wrong_columns")
        else:
            yield columns.row(f"{label}:{record.number}", [record.fields[place] for place in at])


@functools.lru_cache(maxsize=REMEMBERED_FILES)
def _tsv_header(file: Location, label: str, state: str, options: ReadOptions) -> _Header | None:
    """Read the names of the columns, and whether fields hold line breaks."""
    del state
    lines = _first_lines(file, label)
    first = next((line for line in lines if isinstance(line, Line)), None)
    if first is None:
        return None
    fields = tuple(field.strip() for field in _fields(first.text, first.text.count("\t") + 1))
    given = [name for _, names in options.columns.fields for name in names]
    if given or first_of(ID_NAMES, fields) or (first_of(TEXT_NAMES, fields) and len(set(fields)) > 1):
        names, first_line = fields, first.start
    elif len(fields) in (2, 3):
        names, first_line = (("doc_id", "text") if len(fields) == 2 else FIELDS), None
    else:
        raise CorpusError(
            f"{label} has {amount(len(fields), 'columns')} and no line of names; give id and text, or id, title and "
            f"text, set apart by tabs, or a first line that names the columns"
        )
    records = [
        each
        for each in _records(lines, "\t", len(names), _PEEKED_BYTES)
        if isinstance(each, _Record) and each.start != first_line
    ]
    has_line_breaks = any(record.num_lines > 1 for record in records)
    return _Header(names, first_line, "\t", has_line_breaks, _full_rows(records, len(names)))


@functools.lru_cache(maxsize=REMEMBERED_FILES)
def _csv_header(file: Location, label: str, state: str, options: ReadOptions) -> _Header | None:
    """Read the names of the columns, and find by them what sets fields apart."""
    del state
    lines = _first_lines(file, label)
    first = next((line for line in lines if isinstance(line, Line)), None)
    if first is None:
        return None
    wanted = [*(name for _, names in options.columns.fields for name in names), *ID_NAMES, *TEXT_NAMES]

    def fitness(delimiter: str) -> tuple[bool, int]:
        names = _parsed([first.text], delimiter) or []
        return first_of(wanted, [name.strip() for name in names]) is not None, len(names)

    delimiter = max(_DELIMITERS, key=fitness)
    number = len(_parsed([first.text], delimiter) or [])
    records = [each for each in _records(lines, delimiter, number, _PEEKED_BYTES) if isinstance(each, _Record)]
    names = tuple(field.strip() for field in records[0].fields)
    return _Header(names, records[0].start, delimiter, True, _full_rows(records[1:], len(names)))


def _first_lines(file: Location, label: str) -> list[Line | BadRow]:
    """Read lines of the first megabyte."""
    lines = read_lines(file, label)
    return list(itertools.takewhile(lambda line: isinstance(line, BadRow) or line.start < _PEEKED_BYTES, lines))


def _full_rows(records: Sequence["_Record"], num_columns: int) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(each.fields) for each in records[:_PEEKED_ROWS] if len(each.fields) == num_columns)


class _Record(NamedTuple):
    """The fields of one record, and where it begins."""

    fields: list[str]
    number: int
    start: int
    num_lines: int = 1


def _records(
    lines: Iterable[Line | BadRow], delimiter: str, num_columns: int, max_chars: int
) -> Iterator[_Record | BadRow]:
    """Put lines together to records. A quote that nothing closes as CSV has it is text, and its line a record."""
    waiting: collections.deque[Line | BadRow] = collections.deque()
    source = iter(lines)

    def read() -> Line | BadRow | None:
        return waiting.popleft() if waiting else next(source, None)

    while (line := read()) is not None:
        if isinstance(line, BadRow):
            yield line
            continue
        taken: list[Line | BadRow] = [line]
        fields = _continued(taken, read, delimiter, max_chars) if _has_open_quote(line.text, delimiter) else None
        if fields and len(fields) == num_columns and not _are_rows(taken, delimiter, num_columns):
            yield _Record(fields, line.number, line.start, len(taken))
        else:
            waiting.extendleft(reversed(taken[1:]))
            yield _Record(_fields(line.text, num_columns, delimiter), line.number, line.start)


def _has_open_quote(text: str, delimiter: str) -> bool:
    return '"' in text and _parsed([text], delimiter) is None


def _continued(
    taken: list[Line | BadRow], read: Callable[[], Line | BadRow | None], delimiter: str, max_chars: int
) -> list[str] | None:
    """Read on to the line that closes a quote, adding to `taken`; return the fields, None where no line does."""
    texts = [each.text for each in taken if isinstance(each, Line)]
    num_quotes, size = texts[0].count('"'), len(texts[0])
    while size < max_chars and (following := read()) is not None:
        taken.append(following)
        if isinstance(following, BadRow):
            return None
        texts.append(following.text)
        size += len(following.text)
        num_quotes += following.text.count('"')
        if '"' in following.text and num_quotes % 2 == 0:
            return _parsed(texts, delimiter)
    return None


def _are_rows(lines: Sequence[Line | BadRow], delimiter: str, num_columns: int) -> bool:
    """Return whether each of some lines of TSV is a row without regard to quotes; a comma is common in text, a tab is not."""
    return delimiter == "\t" and all(
        isinstance(line, Line) and line.text.count("\t") + 1 == num_columns for line in lines
    )


def _fields(text: str, num_columns: int, delimiter: str = "\t") -> list[str]:
    """Return the fields of a line: without quotes where these are as CSV has them, else as they stand."""
    if '"' in text and (fields := _parsed([text], delimiter)) is not None and len(fields) == num_columns:
        return fields
    return text.split(delimiter)


def _parsed(lines: Sequence[str], delimiter: str) -> list[str] | None:
    """Return the fields of one record of CSV, in which quotes are doubled or behind a backslash; None if it is none."""
    csv.field_size_limit(sys.maxsize)
    ended = [f"{line}\n" for line in lines]
    has_escaped = any('\\"' in line for line in lines) and not any('""' in line for line in lines)
    for quoting in (_ESCAPED, _DOUBLED) if has_escaped else (_DOUBLED,):
        try:
            rows = list(csv.reader(ended, delimiter=delimiter, strict=True, **quoting))
        except csv.Error:
            continue
        if len(rows) == 1:
            return rows[0]
    return None
