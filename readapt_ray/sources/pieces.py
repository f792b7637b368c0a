"""Split a source of rows into pieces that tasks read independently: byte ranges of text files, row groups of Parquet.

In: the files of a `TableSource`. Out: pieces of about 4 to 512 MB, in the order of the rows. Small files share a piece. The
pieces depend only on the files, not on the cluster. A line belongs to the range that contains its first byte. A compressed
file is never split.
"""

import logging
import sys
from collections.abc import Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from readapt_ray.sources.arrow_files import open_parquet
from readapt_ray.sources.formats import FORMATS
from readapt_ray.sources.lines import is_compressed
from readapt_ray.sources.listing import DataFile, changed
from readapt_ray.sources.read_options import ReadOptions
from readapt_ray.sources.source import BadRow, Row, Span
from readapt_ray.sources.table_sources import TableSource
from readapt_ray.sources.tables import SplitAt
from readapt_ray.storage import Location, state_of

logger = logging.getLogger("readapt_ray")

MIN_PIECE_BYTES = 4 << 20
"""Smallest target size of a piece. Pieces are small because a piece is read again as a whole if anything in it changes."""
_MAX_PIECE_BYTES = 512 << 20
_WANTED_PIECES = 1000
_THREADS = 32
_TIMES_DECOMPRESSED = 5
"""Assumed ratio of decompressed to compressed size, for compressed text and small Parquet files."""


@dataclass(frozen=True)
class FileRange:
    """A part of one file: a range of its bytes, or of its row groups."""

    label: str
    file: Location
    state: str
    """Size and modification time of the file when the source was listed."""
    start: int
    end: int

    def check_unchanged(self) -> None:
        """Check that the file did not change since it was listed.

        Raises:
            CorpusError: its size or modification time changed.
        """
        if state_of(self.file.info()) != self.state:
            raise changed(self.label)


@dataclass(frozen=True)
class Piece:
    """The file ranges that one task reads."""

    number: int
    ranges: tuple[FileRange, ...]

    def rows(self, table_format: str, options: ReadOptions, num_lines: list[int]) -> Iterator[tuple[int, Row | BadRow]]:
        """Yield each row with the number of its line in the piece, from 1.

        Args:
            table_format: a key of `FORMATS`.
            options: how to read the rows.
            num_lines: a list to which the number of lines of each range is appended.

        Raises:
            CorpusError: a file changed since it was listed, or is damaged.
        """
        before = 0
        for each in self.ranges:
            each.check_unchanged()
            span = Span(each.start, each.end)
            for row in FORMATS[table_format].rows(each.file, each.label, options, lambda _: None, span):
                yield before + int(row.place.rpartition(":")[2]), row
            each.check_unchanged()
            num_lines.append(span.num_lines)
            before += span.num_lines


def plan_pieces(source: TableSource, earlier: Set[tuple[str, int]] = frozenset()) -> tuple[list[Piece], int]:
    """Plan the pieces of a source, in the order of the rows. Files of more than 4 MB are opened for this.

    Args:
        source: the source to split.
        earlier: file and offset where the pieces of an earlier ingest began. New pieces begin there again if possible, so
            that pieces after a change stay the same.

    Returns:
        The pieces, and their estimated total size in bytes when decompressed.
    """
    files = source.files()
    with ThreadPoolExecutor(_THREADS) as pool:
        splits = list(pool.map(lambda file: _split_at(file, source), files))
        units = list(pool.map(lambda file, split_at: _unit_bytes(file, split_at, source), files, splits))
    total = sum(map(sum, units))
    # A power of two, so that it rarely changes with the corpus.
    piece_bytes = min(max(MIN_PIECE_BYTES, 1 << (total // _WANTED_PIECES).bit_length()), _MAX_PIECE_BYTES)
    most_bytes = piece_bytes * 3 // 2 if earlier else piece_bytes
    pieces: list[Piece] = []
    gathered: list[FileRange] = []
    gathered_bytes = 0
    for file, split_at, sizes in zip(files, splits, units, strict=True):
        for (start, end), size in _ranges(split_at, sizes, piece_bytes):
            if (file.label, start) in earlier and 2 * gathered_bytes >= piece_bytes:
                pieces.append(Piece(len(pieces), tuple(gathered)))
                gathered, gathered_bytes = [], 0
            gathered.append(FileRange(file.label, file.location, file.state(), start, end))
            gathered_bytes += size
            if gathered_bytes >= most_bytes:
                pieces.append(Piece(len(pieces), tuple(gathered)))
                gathered, gathered_bytes = [], 0
    if gathered:
        pieces.append(Piece(len(pieces), tuple(gathered)))
    _name_unsplit(
        [file.label for file, split_at, sizes in zip(files, splits, units, strict=True) if _is_unsplit(split_at, sizes)]
    )
    return pieces, total


def _unit_bytes(file: DataFile, split_at: SplitAt, source: TableSource) -> list[int]:
    """Return the decompressed bytes of each row group, or of the whole file."""
    if split_at != "row groups":
        is_packed = source.table_format.name == "parquet" or is_compressed(file.location.name)
        return [file.size_bytes() * (_TIMES_DECOMPRESSED if is_packed else 1)]
    with open_parquet(file.location, file.label) as parquet:
        return [parquet.metadata.row_group(number).total_byte_size for number in range(parquet.metadata.num_row_groups)]


def _split_at(file: DataFile, source: TableSource) -> SplitAt:
    """Return where a file can be split. A file smaller than a piece is never split, so it is not opened."""
    table_format = source.table_format
    is_large = file.size_bytes() > MIN_PIECE_BYTES
    return table_format.split_at(file.location, file.label, source.options) if is_large else "nowhere"


def _is_unsplit(split_at: SplitAt, sizes: Sequence[int]) -> bool:
    return split_at != "lines" and max(sizes, default=0) > _MAX_PIECE_BYTES


def _name_unsplit(labels: Sequence[str]) -> None:
    if labels:
        logger.warning(
            "ingest: %d files hold more than %d MB that cannot be read in parts (compressed, in UTF-16, one row group, or records that may have line breaks), %s first; one "
            "task reads each of them: smaller files, JSON Lines and Parquet are read in parallel",
            *(len(labels), _MAX_PIECE_BYTES >> 20, labels[0]),
        )


def _ranges(split_at: SplitAt, sizes: Sequence[int], piece_bytes: int) -> Iterator[tuple[tuple[int, int], int]]:
    """Yield each range of a file (bytes or row groups), and its size in bytes."""
    if split_at == "lines":
        size = sizes[0]
        for start in range(0, size, piece_bytes):
            end = min(start + piece_bytes, size)
            yield (start, end), end - start
    elif split_at == "row groups":
        first = gathered = 0
        for group, size in enumerate(sizes):
            gathered += size
            if gathered >= piece_bytes or group + 1 == len(sizes):
                yield (first, group + 1), gathered
                first, gathered = group + 1, 0
    elif sizes[0]:
        yield (0, sys.maxsize), sizes[0]
