"""Split a source of rows into pieces that are read independently: byte ranges of text files, row groups of Parquet.

Enters: the files of a `TableSource`. Leaves: pieces of 16 to 512 MB, in the order of the rows; small files share one. The cut
depends on the files alone, never on the cluster. A line belongs to the range in which its first byte lies. A compressed
file is never cut.
"""

import logging
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from readapt_ray.errors import CorpusError
from readapt_ray.sources.lines import is_compressed
from readapt_ray.sources.source import BadRow, Limits, Row, Span
from readapt_ray.sources.table_sources import DataFile, TableSource
from readapt_ray.sources.tables import FORMATS, Cut, open_parquet
from readapt_ray.storage import Location, state_of

logger = logging.getLogger("readapt_ray")

MIN_PIECE_BYTES = 16 << 20
_MAX_PIECE_BYTES = 512 << 20
_WANTED_PIECES = 1000
_THREADS = 32
_TIMES_DECOMPRESSED = 5
"""How much larger than its file a compressed text is taken to be."""


@dataclass(frozen=True)
class FileRange:
    """A part of one file: a range of its bytes, or of its row groups."""

    label: str
    file: Location
    state: str
    """Size and time of the file when the source was listed."""
    start: int
    end: int

    def check_unchanged(self) -> None:
        """Check that the file still is the one that was listed.

        Raises:
            CorpusError: it is not.
        """
        if state_of(self.file.info()) != self.state:
            raise CorpusError(
                f"{self.label} changed while it was read; wait until nobody writes it and run `readapt ingest` again"
            )


@dataclass(frozen=True)
class Piece:
    """The file ranges that one task reads."""

    number: int
    ranges: tuple[FileRange, ...]

    def rows(self, table_format: str, limits: Limits, num_lines: list[int]) -> Iterator[tuple[int, Row | BadRow]]:
        """Yield each row with the number of its line in the piece, from 1.

        Args:
            table_format: a key of `FORMATS`.
            limits: bounds on a row.
            num_lines: gets the number of lines of each range.

        Raises:
            CorpusError: a file changed since it was listed, or is damaged.
        """
        before = 0
        for each in self.ranges:
            each.check_unchanged()
            span = Span(each.start, each.end)
            for row in FORMATS[table_format].rows(each.file, each.label, limits, lambda _: None, span):
                yield before + int(row.place.rpartition(":")[2]), row
            each.check_unchanged()
            num_lines.append(span.num_lines)
            before += span.num_lines


def plan_pieces(source: TableSource) -> tuple[list[Piece], int]:
    """Return the pieces in the order of the rows, and about how many bytes they hold when decompressed."""
    files, cut = source.files(), FORMATS[source.format].is_cut_at
    with ThreadPoolExecutor(_THREADS) as pool:
        units = list(pool.map(lambda file: _unit_bytes(file, cut), files))
    total = sum(map(sum, units))
    piece_bytes = min(max(MIN_PIECE_BYTES, total // _WANTED_PIECES), _MAX_PIECE_BYTES)
    pieces: list[Piece] = []
    gathered: list[FileRange] = []
    gathered_bytes = 0
    for file, sizes in zip(files, units, strict=True):
        for (start, end), size in _ranges(file, cut, sizes, piece_bytes):
            gathered.append(FileRange(file.label, file.location, file.state(), start, end))
            gathered_bytes += size
            if gathered_bytes >= piece_bytes:
                pieces.append(Piece(len(pieces), tuple(gathered)))
                gathered, gathered_bytes = [], 0
    if gathered:
        pieces.append(Piece(len(pieces), tuple(gathered)))
    _name_uncut([file.label for file, sizes in zip(files, units, strict=True) if _is_uncut(file, cut, sizes)])
    return pieces, total


def _unit_bytes(file: DataFile, cut: Cut) -> list[int]:
    """Return the decompressed bytes of each row group, or of the whole file."""
    if cut != "row groups":
        return [file.size_bytes() * (_TIMES_DECOMPRESSED if is_compressed(file.location.name) else 1)]
    with open_parquet(file.location, file.label) as parquet:
        return [parquet.metadata.row_group(number).total_byte_size for number in range(parquet.metadata.num_row_groups)]


def _is_cut_into_bytes(file: DataFile, cut: Cut) -> bool:
    return cut == "lines" and not is_compressed(file.location.name)


def _is_uncut(file: DataFile, cut: Cut, sizes: Sequence[int]) -> bool:
    return not _is_cut_into_bytes(file, cut) and max(sizes, default=0) > _MAX_PIECE_BYTES


def _name_uncut(labels: Sequence[str]) -> None:
    if labels:
        logger.warning(
            "ingest: %d files hold more than %d MB that cannot be read in parts (compressed, or one row group), %s first; one "
            "task reads each of them: smaller files, or text that is not compressed, are read in parallel",
            *(len(labels), _MAX_PIECE_BYTES >> 20, labels[0]),
        )


def _ranges(file: DataFile, cut: Cut, sizes: Sequence[int], piece_bytes: int) -> Iterator[tuple[tuple[int, int], int]]:
    """Yield each range of a file and its bytes."""
    if _is_cut_into_bytes(file, cut):
        size = sizes[0]
        for start in range(0, size, piece_bytes):
            end = min(start + piece_bytes, size)
            yield (start, end), end - start
    elif cut == "row groups":
        first = gathered = 0
        for group, size in enumerate(sizes):
            gathered += size
            if gathered >= piece_bytes or group + 1 == len(sizes):
                yield (first, group + 1), gathered
                first, gathered = group + 1, 0
    elif sizes[0]:
        yield (0, sys.maxsize), sizes[0]
