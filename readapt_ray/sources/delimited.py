"""Read CSV and TSV files: fields separated by commas or tabs, and quoted if they contain a separator.

CSV is read as `csv.writer` and spreadsheets write it; a quoted field may contain line breaks. TSV is read line by line, so
that large files can be read in parts. In TSV, quotes around a field are removed only if they are as `csv.writer` writes
them; any other quote is text. A TSV file with quoted line breaks in its first megabyte is read like CSV.
"""

import collections
import csv
import functools
import itertools
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from readapt_ray.errors import CorpusError
from readapt_ray.progress import amount
from readapt_ray.sources.columns import FIELDS, ID_NAMES, TEXT_NAMES, first_of, passage_columns, type_of_texts
from readapt_ray.sources.lines import Line, is_divisible, read_lines
from readapt_ray.sources.read_options import ReadOptions
from readapt_ray.sources.source import BadRow, Row, Span
from readapt_ray.sources.tables import REMEMBERED_FILES, Advance, Layout, SplitAt, Values, shares
from readapt_ray.storage import Location, state_of

_PEEKED_ROWS = 100
_PEEKED_BYTES = 1 << 20
_DELIMITERS = ",;\t|"
_DOUBLED: dict[str, Any] = {}
_ESCAPED: dict[str, Any] = {"doublequote": False, "escapechar": "\\"}
_BACKSLASH_PAIR = re.compile(r"\\.")


class _Header(NamedTuple):
    """The columns of a CSV or TSV file, and how its fields are separated."""

    names: tuple[str, ...]
    first_line: int | None
    """Offset in bytes of the header line; None if the file has no header."""
    delimiter: str = "\t"
    has_line_breaks: bool = False
    """Whether quoted fields may contain line breaks."""
    rows: tuple[tuple[str, ...], ...] = ()
    """The first rows with all columns, at most 100."""


class Wanted(NamedTuple):
    """Column names by which a header line is recognised."""

    known: tuple[str, ...]
    """If the first line has one of these, it is a header."""
    texts: tuple[str, ...] = ()
    """If the first line has one of these and other fields, it is a header."""
    unnamed: tuple[tuple[str, ...], ...] = ()
    """Column names for TSV without a header: one tuple per possible number of columns."""
    unnamed_text: str = ""
    """`unnamed` as text, for errors."""


def _of_passages(options: ReadOptions) -> Wanted:
    given = [name for names in options.columns.of(FIELDS).values() for name in names]
    return Wanted(
        known=(*given, *ID_NAMES),
        texts=TEXT_NAMES,
        unnamed=(("doc_id", "text"), FIELDS) if not given else (),
        unnamed_text="id and text, or id, title and text",
    )


class Tsv:
    """The format TSV: columns separated by tabs. Without a header they are id and text, or id, title and text."""

    name = "tsv"
    suffixes = (".tsv",)

    def split_at(self, file: Location, label: str, options: ReadOptions) -> SplitAt:
        """Return "lines" if a file can be split at its lines, else "nowhere".

        It can be split if it is neither compressed nor UTF-16, and its first megabyte has no line breaks in quoted
        fields.
        """
        header = _header(file, label, _of_passages(options), is_tsv=True)
        return "nowhere" if (header and header.has_line_breaks) or not is_divisible(file) else "lines"

    def layout(self, file: Location, label: str, options: ReadOptions) -> Layout | None:
        """Read the columns from the header, or take the default ones. None if the file has no rows."""
        return _layout(_header(file, label, _of_passages(options), is_tsv=True), label, options)

    def rows(
        self, file: Location, label: str, options: ReadOptions, advance: Advance, span: Span | None = None
    ) -> Iterator[Row | BadRow]:
        """Yield a row per line, and a bad row for a line with another number of columns."""
        yield from _passages(file, label, options, advance, span, is_tsv=True)


class Csv:
    """The format CSV, with a header line. The separator (comma, semicolon, bar or tab) is found from the header."""

    name = "csv"
    suffixes = (".csv",)

    def split_at(self, file: Location, label: str, options: ReadOptions) -> SplitAt:
        """Return "nowhere": a file cannot be split, because a field may contain line breaks."""
        del file, label, options
        return "nowhere"

    def layout(self, file: Location, label: str, options: ReadOptions) -> Layout | None:
        """Read the columns from the header line. None if the file is empty."""
        return _layout(_header(file, label, _of_passages(options), is_tsv=False), label, options)

    def rows(
        self, file: Location, label: str, options: ReadOptions, advance: Advance, span: Span | None = None
    ) -> Iterator[Row | BadRow]:
        """Yield a row per CSV record, which may have several lines."""
        yield from _passages(file, label, options, advance, span, is_tsv=False)


def _passages(
    file: Location, label: str, options: ReadOptions, advance: Advance, span: Span | None, *, is_tsv: bool
) -> Iterator[Row | BadRow]:
    wanted = _of_passages(options)
    layout = _layout(_header(file, label, wanted, is_tsv=is_tsv), label, options)
    if layout is not None:
        columns = layout.columns
        for row in delimited_rows(
            file, label, wanted, lambda _: columns.names, options=options, is_tsv=is_tsv, advance=advance, span=span
        ):
            yield row if isinstance(row, BadRow) else columns.row(*row)


def delimited_rows(
    file: Location,
    label: str,
    wanted: Wanted,
    pick: Callable[[Sequence[str]], Sequence[str]],
    *,
    options: ReadOptions,
    is_tsv: bool,
    advance: Advance = lambda _: None,
    span: Span | None = None,
) -> Iterator[Values | BadRow]:
    """Yield place (file and line) and values of each row, and a bad row for a row with another number of columns.

    The header line is not a row. An empty file has no rows.

    Args:
        file: the file to read.
        label: name of the file in places and errors.
        wanted: column names by which a header line is recognised.
        pick: takes the column names, and returns those to read. The values, all text, are in the order that it returns.
        options: limits on the length of a line.
        is_tsv: whether fields are separated by tabs. If not, the separator is found from the first line.
        advance: called with the fraction of the file that was read.
        span: the range of bytes to read; None means all.

    Raises:
        CorpusError: a TSV file has neither a header nor a known number of columns, or the file is cut short.
    """
    header = _header(file, label, wanted, is_tsv=is_tsv)
    if header is None:
        return
    at = [header.names.index(name) for name in pick(header.names)]
    lines = read_lines(file, label, max_line_bytes=options.max_line_bytes, advance=shares(file, advance), span=span)
    for record in (
        _records(lines, header.delimiter, len(header.names), options.max_line_bytes)
        if header.has_line_breaks
        else _line_records(lines, len(header.names))
    ):
        if isinstance(record, BadRow):
            yield record
        elif record.start == header.first_line:
            continue
        elif len(record.fields) != len(header.names):
            counts = f"{len(record.fields)}, not {len(header.names)}"
            yield BadRow(f"{label}:{record.number}", "wrong_columns", counts)
        else:
            yield f"{label}:{record.number}", tuple(record.fields[place] for place in at)


def _line_records(lines: Iterable[Line | BadRow], num_columns: int) -> Iterator["_Record | BadRow"]:
    for line in lines:
        yield line if isinstance(line, BadRow) else _Record(_fields(line.text, num_columns), line.number, line.start)


def _layout(header: _Header | None, label: str, options: ReadOptions) -> Layout | None:
    if header is None:
        return None
    columns = passage_columns(header.names, label, options.columns)
    at = [header.names.index(name) for name in columns.kept]
    return Layout(columns, header.names, tuple(type_of_texts(row[place] for row in header.rows) for place in at))


def _header(file: Location, label: str, wanted: Wanted, *, is_tsv: bool) -> _Header | None:
    return (_tsv_header if is_tsv else _csv_header)(file, label, state_of(file.info()), wanted)


@functools.lru_cache(maxsize=REMEMBERED_FILES)
def _tsv_header(file: Location, label: str, state: str, wanted: Wanted) -> _Header | None:
    """Read the column names of a TSV file, and whether its first megabyte has quoted line breaks."""
    del state
    lines = _first_lines(file, label)
    first = next((line for line in lines if isinstance(line, Line)), None)
    if first is None:
        return None
    fields = tuple(field.strip() for field in _fields(first.text, first.text.count("\t") + 1))
    unnamed = {len(names): names for names in wanted.unnamed}
    if first_of(wanted.known, fields) or (first_of(wanted.texts, fields) and len(set(fields)) > 1):
        names, first_line = fields, first.start
    elif len(fields) in unnamed:
        names, first_line = unnamed[len(fields)], None
    elif not unnamed:
        names, first_line = fields, first.start
    else:
        raise CorpusError(
            f"{label} has {amount(len(fields), 'columns')} and no header line; give {wanted.unnamed_text}, separated by tabs, or a "
            f"first line that names the columns"
        )
    records = [
        each
        for each in _records(lines, "\t", len(names), _PEEKED_BYTES)
        if isinstance(each, _Record) and each.start != first_line
    ]
    has_line_breaks = any(record.num_lines > 1 for record in records)
    return _Header(names, first_line, "\t", has_line_breaks, _full_rows(records, len(names)))


@functools.lru_cache(maxsize=REMEMBERED_FILES)
def _csv_header(file: Location, label: str, state: str, wanted: Wanted) -> _Header | None:
    """Find the separator of a CSV file by its column names, and read these."""
    del state
    lines = _first_lines(file, label)
    first = next((line for line in lines if isinstance(line, Line)), None)
    if first is None:
        return None

    def fitness(delimiter: str) -> tuple[bool, int]:
        names = _parsed([first.text], delimiter) or []
        return first_of((*wanted.known, *wanted.texts), [name.strip() for name in names]) is not None, len(names)

    delimiter = max(_DELIMITERS, key=fitness)
    number = len(_parsed([first.text], delimiter) or [])
    records = [each for each in _records(lines, delimiter, number, _PEEKED_BYTES) if isinstance(each, _Record)]
    names = tuple(field.strip() for field in records[0].fields)
    return _Header(names, records[0].start, delimiter, True, _full_rows(records[1:], len(names)))


def _first_lines(file: Location, label: str) -> list[Line | BadRow]:
    """Read the lines in the first megabyte of a file."""
    lines = read_lines(file, label)
    return list(itertools.takewhile(lambda line: isinstance(line, BadRow) or line.start < _PEEKED_BYTES, lines))


def _full_rows(records: Sequence["_Record"], num_columns: int) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(each.fields) for each in records[:_PEEKED_ROWS] if len(each.fields) == num_columns)


class _Record(NamedTuple):
    """The fields of one record, the number of its first line, and that line's offset in bytes."""

    fields: list[str]
    number: int
    start: int
    num_lines: int = 1


def _records(
    lines: Iterable[Line | BadRow], delimiter: str, num_columns: int, max_chars: int
) -> Iterator[_Record | BadRow]:
    """Join lines to records. If a quote is never closed, it is text, and its line is a record."""
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
    """Read further lines into `taken` until one closes the quote. Return the fields; None if no line closes it.

    A record can end where the number of quotes is even: of all quotes if they are doubled, else of those without a
    backslash before them. Each of the two is tried once, so that a stray quote does not cost a parse per line.
    """
    texts = [each.text for each in taken if isinstance(each, Line)]
    size, is_open = len(texts[0]), _quotes(texts[0])
    untried = {0, 1}
    while untried and size < max_chars and (following := read()) is not None:
        taken.append(following)
        if isinstance(following, BadRow):
            return None
        texts.append(following.text)
        size += len(following.text)
        is_open = tuple((before + more) % 2 for before, more in zip(is_open, _quotes(following.text), strict=True))
        ended = {way for way in untried if not is_open[way]} if '"' in following.text else set()
        if ended and (fields := _parsed(texts, delimiter)) is not None:
            return fields
        untried -= ended
    return None


def _quotes(text: str) -> tuple[int, ...]:
    """Return the number of quotes in a text, and of those without a backslash before them."""
    num_quotes = text.count('"')
    return num_quotes, _BACKSLASH_PAIR.sub("", text).count('"') if '\\"' in text else num_quotes


def _are_rows(lines: Sequence[Line | BadRow], delimiter: str, num_columns: int) -> bool:
    """Return whether each line has the right number of tabs. If so, each is a TSV row, and a quote in it is text."""
    return delimiter == "\t" and all(
        isinstance(line, Line) and line.text.count("\t") + 1 == num_columns for line in lines
    )


def _fields(text: str, num_columns: int, delimiter: str = "\t") -> list[str]:
    """Split a line into fields. Quotes are removed if the line is valid CSV with this many columns; else they stay."""
    if '"' in text and (fields := _parsed([text], delimiter)) is not None and len(fields) == num_columns:
        return fields
    return text.split(delimiter)


def _parsed(lines: Sequence[str], delimiter: str) -> list[str] | None:
    """Parse lines as one CSV record, with quotes escaped by doubling or by a backslash. None if they are not one.

    Lines with both `""` and `\\"`, such as a field that ends with an escaped quote, are first read as doubled. As
    escaped they are read only if all their quotes are well formed, because csv does not check that.
    """
    csv.field_size_limit(sys.maxsize)
    ended = [f"{line}\n" for line in lines]
    has_escaped = any('\\"' in line for line in lines)
    if not has_escaped:
        ways = [_DOUBLED]
    elif not any('""' in line for line in lines):
        ways = [_ESCAPED, _DOUBLED]
    else:
        ways = [_DOUBLED, _ESCAPED] if _is_escaped("\n".join(lines), delimiter) else [_DOUBLED]
    for quoting in ways:
        try:
            rows = list(csv.reader(ended, delimiter=delimiter, strict=True, **quoting))
        except csv.Error:
            continue
        if len(rows) == 1:
            return rows[0]
    return None


def _is_escaped(record: str, delimiter: str) -> bool:
    """Return whether each field is quoted as a whole, with inner quotes behind backslashes, or has no quote."""
    field = rf'(?:"(?:[^"\\]|\\.)*"|[^"{re.escape(delimiter)}\n]*)'
    return re.fullmatch(rf"{field}(?:{re.escape(delimiter)}{field})*", record, re.DOTALL) is not None
