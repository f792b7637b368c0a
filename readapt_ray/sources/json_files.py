"""Read JSON files: an object per line (JSON Lines), an array of objects, or objects one after the other."""

import codecs
import contextlib
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from readapt_ray.damage import READ_ERRORS
from readapt_ray.errors import CorpusError
from readapt_ray.sources.columns import passage_columns, type_of_values
from readapt_ray.sources.lines import Line, is_divisible, open_text, read_lines, refuse_damaged
from readapt_ray.sources.read_options import ReadOptions
from readapt_ray.sources.source import MISSING, BadRow, Row, Span
from readapt_ray.sources.tables import REMEMBERED_FILES, Advance, Layout, SplitAt, Values, shares
from readapt_ray.storage import Location, state_of

_PEEKED_ROWS = 100
_CHUNK_BYTES = 1 << 20
_BEGIN = re.compile(r"^[\ufeff\s]*")
_BETWEEN = re.compile(r"[\s,]*")
_DECODER = json.JSONDecoder()


class JsonLines:
    """The format JSON Lines: one JSON object per line."""

    name = "jsonl"
    suffixes = (".jsonl", ".ndjson")

    def split_at(self, file: Location, label: str, options: ReadOptions) -> SplitAt:
        """Return "lines" if a file can be split at its lines, else "nowhere": a compressed or UTF-16 file cannot."""
        del label, options
        return "lines" if is_divisible(file) else "nowhere"

    def layout(self, file: Location, label: str, options: ReadOptions) -> Layout | None:
        """Read the columns from the keys of the objects in the first hundred lines. None if the file has no lines.

        Raises:
            CorpusError: none of these lines is a JSON object, or columns are missing.
        """
        return _lines_layout(file, label, state_of(file.info()), options)

    def rows(
        self, file: Location, label: str, options: ReadOptions, advance: Advance, span: Span | None = None
    ) -> Iterator[Row | BadRow]:
        """Yield a row per line, and a bad row for a line that is not a JSON object."""
        layout = self.layout(file, label, options)
        if layout is None:
            return
        lines = read_lines(file, label, max_line_bytes=options.max_line_bytes, advance=shares(file, advance), span=span)
        for row in _line_values(lines, label, layout.columns.names):
            yield row if isinstance(row, BadRow) else layout.columns.row(*row)


def json_rows(
    file: Location, label: str, pick: Callable[[list[str]], Sequence[str]], options: ReadOptions, *, is_lines: bool
) -> Iterator[Values | BadRow]:
    """Yield place and values of each object, and a bad row for any other value.

    A field that an object lacks is MISSING. An empty file has no rows.

    Args:
        file: the file to read.
        label: name of the file in places and errors.
        pick: takes the keys of the first hundred objects, and returns those to read. Values are in the order that it
            returns.
        options: limits on the length of a line or an object.
        is_lines: whether the file is JSON Lines. If not, the place has the number of the object, not of the line.
    """

    def items() -> Iterator[Any]:
        if is_lines:
            return read_lines(file, label, max_line_bytes=options.max_line_bytes)
        return _values(file, label, options)

    first = items()
    peeked = list(itertools.islice(first, _PEEKED_ROWS))
    objects = (parsed_object(each, label) if isinstance(each, Line) else each for each in peeked)
    if peeked:
        names = pick(list(dict.fromkeys(key for each in objects if isinstance(each, dict) for key in each)))
        yield from (_line_values(items(), label, names) if is_lines else _object_values(items(), label, names))


def _line_values(lines: Iterable[Line | BadRow], label: str, names: Sequence[str]) -> Iterator[Values | BadRow]:
    for line in lines:
        value = parsed_object(line, label)
        if isinstance(value, BadRow):
            yield value
        elif isinstance(line, Line):
            yield f"{label}:{line.number}", tuple(value.get(name, MISSING) for name in names)


@functools.lru_cache(maxsize=REMEMBERED_FILES)
def _lines_layout(file: Location, label: str, state: str, options: ReadOptions) -> Layout | None:
    """Find the columns of a JSON Lines file. The result is cached until the file changes."""
    del state
    lines = list(itertools.islice(read_lines(file, label, max_line_bytes=options.max_line_bytes), _PEEKED_ROWS))
    values = [value for line in lines if isinstance(value := parsed_object(line, label), dict)]
    if lines and not values:
        first = next((line.text for line in lines if isinstance(line, Line)), "")
        advice = (
            "; if it is one array or its objects have several lines, give --format json" if first[0:1] in "[{" else ""
        )
        raise CorpusError(f"{label} is not JSON Lines: none of its first {len(lines)} lines is a JSON object{advice}")
    return _layout_of(values, label, options) if lines else None


def _layout_of(values: list[dict[str, Any]], label: str, options: ReadOptions) -> Layout:
    found = tuple(dict.fromkeys(key for value in values for key in value))
    columns = passage_columns(found, label, options.columns, is_sample=True)
    return Layout(columns, found, tuple(type_of_values(value.get(name) for value in values) for name in columns.kept))


def parsed_object(line: Line | BadRow, label: str) -> dict[str, Any] | BadRow:
    """Parse a line as a JSON object. Returns a bad row if it is not one. A bad row is returned unchanged."""
    if isinstance(line, BadRow):
        return line
    try:
        value = json.loads(line.text)
    except (ValueError, RecursionError) as error:
        why = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        return BadRow(f"{label}:{line.number}", "not_json", why)
    return value if isinstance(value, dict) else BadRow(f"{label}:{line.number}", "not_json_object")


class JsonValues:
    """The format JSON: objects in one array or one after the other, on any number of lines. Places count objects from 1."""

    name = "json"
    suffixes = (".json",)

    def split_at(self, file: Location, label: str, options: ReadOptions) -> SplitAt:
        """Return "nowhere": a file cannot be split, because an object may have several lines."""
        del file, label, options
        return "nowhere"

    def layout(self, file: Location, label: str, options: ReadOptions) -> Layout | None:
        """Read the columns from the keys of the first hundred objects. None if the file has no values.

        Raises:
            CorpusError: none of these values is an object, the file is one object around a list, or columns are
                missing.
        """
        return _values_layout(file, label, state_of(file.info()), options)

    def rows(
        self, file: Location, label: str, options: ReadOptions, advance: Advance, span: Span | None = None
    ) -> Iterator[Row | BadRow]:
        """Yield a row per object, and a bad row for any other value. `span` only takes the number of values."""
        layout = self.layout(file, label, options)
        number = 0
        if layout is not None:
            values = _values(file, label, options, advance)
            for row in _object_values(values, label, layout.columns.names):
                number += 1
                yield row if isinstance(row, BadRow) else layout.columns.row(*row)
        if span is not None:
            span.num_lines = number


def _object_values(values: Iterable[Any], label: str, names: Sequence[str]) -> Iterator[Values | BadRow]:
    for number, value in enumerate(values, start=1):
        if isinstance(value, dict):
            yield f"{label}:{number}", tuple(value.get(name, MISSING) for name in names)
        else:
            yield BadRow(f"{label}:{number}", "not_json_object")


@functools.lru_cache(maxsize=REMEMBERED_FILES)
def _values_layout(file: Location, label: str, state: str, options: ReadOptions) -> Layout | None:
    del state
    peeked = list(itertools.islice(_values(file, label, options), _PEEKED_ROWS))
    values = [value for value in peeked if isinstance(value, dict)]
    if peeked and not values:
        raise CorpusError(f"{label} holds no JSON objects: its first value is {json.dumps(peeked[0])[:60]}")
    lists = [key for key, value in values[0].items() if _are_objects(value)] if len(values) == 1 else []
    if lists:
        raise CorpusError(
            f"{label} is one JSON object, whose {' and '.join(map(repr, lists))} {'is a list' if len(lists) == 1 else 'are lists'} "
            f"of objects; give a file that holds such a list alone, as `jq .{lists[0]}` writes it"
        )
    return _layout_of(values, label, options) if values else None


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _values(file: Location, label: str, options: ReadOptions, advance: Advance = lambda _: None) -> Iterator[Any]:
    """Yield each JSON value of a file. If the file is one array, yield its elements.

    Raises:
        CorpusError: the file is cut short, is not JSON, has text after its array (such as a second array), or has a
            value longer than a row may be.
    """
    chunks = _chunks(file, label, shares(file, advance))
    first = next(chunks, "")
    buffer = _BEGIN.sub("", first)
    is_array = buffer.startswith("[")
    buffer, number, ended = buffer.removeprefix("["), 0, False
    place = _behind(_Place(1, 1), first[: len(first) - len(buffer)])
    for chunk in itertools.chain(chunks, [""]):
        at = 0
        while not ended and (at := _skip(buffer, at)) < len(buffer):
            if buffer[at] == "]" and is_array:
                ended, at = True, at + 1
                break
            try:
                value, at = _DECODER.raw_decode(buffer, at)
            except (ValueError, RecursionError) as error:
                if chunk and len(buffer) - at < options.max_line_bytes:
                    break  # the value continues in the next chunk
                raise _not_json(label, number, _told(error, place)) from None
            number += 1
            yield value
        place = _behind(place, buffer[:at])
        buffer = buffer[at:] + chunk
        if ended and (rest := buffer.lstrip()):
            found = _behind(place, buffer[: len(buffer) - len(rest)])
            where = f"line {found.line}, column {found.column}"
            raise _not_json(label, number, f"after the end of its array there is more text, {where}")
    if is_array and not ended:
        raise _not_json(label, number, "its array has no end")


class _Place(NamedTuple):
    """Line and column of a character in a file, both from 1."""

    line: int
    column: int


def _behind(place: _Place, text: str) -> _Place:
    """Return the place just after a text that begins at `place`."""
    num_lines = text.count("\n")
    column = len(text) - text.rfind("\n") if num_lines else place.column + len(text)
    return _Place(place.line + num_lines, column)


def _told(error: Exception, place: _Place) -> str:
    """Return a decoding error as text, with line and column in the file. `place` is where the decoded text begins."""
    if not isinstance(error, json.JSONDecodeError):
        return str(error)
    found = _behind(place, error.doc[: error.pos])
    return f"{error.msg}, line {found.line}, column {found.column}"


def _skip(text: str, start: int) -> int:
    """Return the index of the next value, after white space and commas."""
    found = _BETWEEN.match(text, start)
    return found.end() if found else start


def _not_json(label: str, number: int, error: object) -> CorpusError:
    return CorpusError(
        f"{label} is not JSON after value {number}: {error}; fix it, or fetch it again if it was cut short"
    )


def _chunks(file: Location, label: str, read_share: Callable[[int], None]) -> Iterator[str]:
    """Yield the text of a file in chunks of a megabyte. Bytes that are not UTF-8 become lone surrogates."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    try:
        with contextlib.closing(file.open_input()) as raw:
            stream = open_text(file, raw)
            while data := stream.read(_CHUNK_BYTES):
                yield decoder.decode(data)
                read_share(raw.tell())
    except READ_ERRORS as error:
        refuse_damaged(label, "to its end", error)
        raise
