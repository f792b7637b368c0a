"""Read the lines of a text file on any filesystem, plain or compressed (suffix gz, bz2, zst or lz4).

One line is in memory at a time. Of a line longer than the limit, only the part up to the limit is.
"""

import codecs
import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple, cast

import pyarrow as pa

from readapt_ray.damage import READ_ERRORS, is_damage
from readapt_ray.errors import CorpusError, first_line
from readapt_ray.sources.read_options import ReadOptions
from readapt_ray.sources.source import BadRow, Span
from readapt_ray.storage import Location

COMPRESSED_SUFFIXES = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4"}
_BUFFER_BYTES = 1 << 18
_LINES_PER_ADVANCE = 256


class Line(NamedTuple):
    """A line without its line break. `number` counts from 1; `start` is its offset in the decompressed file in bytes."""

    number: int
    text: str
    start: int


def plain_name(name: str) -> str:
    """Return a file's name in lower case, without a suffix of compression such as `.gz`."""
    lowered = name.lower()
    for suffix in COMPRESSED_SUFFIXES:
        lowered = lowered.removesuffix(suffix)
    return lowered


def is_compressed(name: str) -> bool:
    """Return whether a file's name has a suffix of compression such as `.gz`."""
    return name.lower().endswith(tuple(COMPRESSED_SUFFIXES))


def read_lines(
    location: Location,
    label: str,
    *,
    max_line_bytes: int | None = None,
    advance: Callable[[int], None] | None = None,
    span: Span | None = None,
) -> Iterator[Line | BadRow]:
    """Yield the lines of a file that are not blank, and a bad row for each line that is too long or not UTF-8.

    Args:
        location: the file.
        label: name of the file in places and errors.
        max_line_bytes: maximum length of a line. None means the default of `ReadOptions`.
        advance: called every 256 lines with the number of (compressed) bytes that were read.
        span: a range of bytes of a file that is not compressed. The lines that begin in it are read, and numbered from 1.
            At the end its `num_lines` is set, blank lines included. None means the whole file.

    Raises:
        CorpusError: the file is damaged or cut short.
    """
    limit = max_line_bytes or ReadOptions().max_line_bytes
    start, end = (span.start, span.end) if span is not None else (0, sys.maxsize)
    number, position = 0, start
    try:
        with contextlib.closing(location.open_input()) as raw:
            if start:
                raw.seek(start - 1)
            stream = io.BufferedReader(cast(io.RawIOBase, raw), _BUFFER_BYTES) if start else open_text(location, raw)
            if start:
                position += _skip_line(stream, limit, end - start) - 1
            while position < end and (data := stream.readline(limit)):
                line_start, position = position, position + len(data)
                number += 1
                if advance is not None and number % _LINES_PER_ADVANCE == 0:
                    advance(raw.tell())
                if len(data) == limit and not data.endswith(b"\n"):
                    position += _skip_line(stream, limit, end - position)
                    yield BadRow(f"{label}:{number}", "long_text")
                    continue
                yield from _decoded(data, number, label, line_start)
            if span is not None:
                span.num_lines = number
    except READ_ERRORS as error:
        refuse_damaged(label, f"after line {number}", error)
        raise


def read_whole(location: Location, label: str, *, max_bytes: int) -> bytes:
    """Read a file, decompressed and (from UTF-16) converted to UTF-8. It is cut at `max_bytes` without an error.

    So a result of `max_bytes` bytes may be incomplete.

    Raises:
        CorpusError: the file is damaged or missing.
    """
    try:
        with contextlib.closing(location.open_input()) as raw:
            return open_text(location, raw).read(max_bytes)
    except READ_ERRORS as error:
        refuse_damaged(label, "to its end", error)
        raise


def refuse_damaged(label: str, where: str, error: Exception) -> None:
    """Raise an error for the user if a read error means that a file is damaged. Do nothing if disk or network failed.

    Args:
        label: name of the file in the message.
        where: what could not be read, for the message: "to its end", "after line 7", "as Parquet".
        error: the read error.

    Raises:
        CorpusError: the file is missing or damaged.
    """
    if isinstance(error, FileNotFoundError) or is_damage(error):
        raise CorpusError(
            f"{label} cannot be read {where}: {first_line(error)}; it may be cut short: fetch or write that file again"
        ) from error


def open_text(location: Location, raw: IO[bytes]) -> IO[bytes]:
    """Return a stream of a file's content, decompressed, with UTF-16 converted to UTF-8.

    Args:
        location: the file. The suffix of its name says how it is compressed.
        raw: the open file, at its beginning.
    """
    stream = io.BufferedReader(_decompressed(raw, location.name), _BUFFER_BYTES)
    encoding = utf16(stream.peek(2)[:2])
    return io.BufferedReader(_Utf8(stream, encoding), _BUFFER_BYTES) if encoding else stream


def utf16(first: bytes) -> str | None:
    """Return the codec of a text in UTF-16, such as "utf-16-le", by its first two bytes; None if it is not UTF-16.

    They are a byte order mark, or an ASCII character and a zero.
    """
    if first in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    if len(first) == 2 and (first[0] == 0) != (first[1] == 0):
        return "utf-16-be" if first[0] == 0 else "utf-16-le"
    return None


def is_divisible(location: Location) -> bool:
    """Return whether a file can be read in byte ranges: it is neither compressed nor UTF-16. It is opened for this."""
    if is_compressed(location.name):
        return False
    with contextlib.closing(location.open_input()) as raw:
        return utf16(raw.read(2)) is None


class _Utf8(io.RawIOBase):
    """A stream that converts a text to UTF-8. Invalid input becomes bytes that are not UTF-8, so that it is noticed."""

    def __init__(self, stream: Any, encoding: str) -> None:
        self._stream, self._rest = stream, b""
        self._decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest and (data := self._stream.read1(_BUFFER_BYTES)):
            self._rest = self._decoder.decode(data).encode("utf-8", "surrogatepass")
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size


def _decompressed(raw: IO[bytes], name: str) -> io.RawIOBase:
    for suffix, codec in COMPRESSED_SUFFIXES.items():
        if name.lower().endswith(suffix):
            return cast(io.RawIOBase, pa.CompressedInputStream(raw, codec))
    return cast(io.RawIOBase, raw)


def _skip_line(stream: IO[bytes], limit: int, most: int) -> int:
    """Skip to the end of the line, or past `most` bytes. Return how many bytes were read."""
    num_read = 0
    while num_read <= most and (rest := stream.readline(limit)):
        num_read += len(rest)
        if rest.endswith(b"\n"):
            break
    return num_read


def _decoded(data: bytes, number: int, label: str, start: int) -> Iterator[Line | BadRow]:
    try:
        text = data.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError:
        yield BadRow(f"{label}:{number}", "not_utf8")
        return
    if not start:
        text = text.removeprefix("\ufeff")
    if text.strip():
        yield Line(number, text, start)
