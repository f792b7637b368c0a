"""A source of rows cut into pieces that are read on their own: byte ranges of text files, row groups of Parquet.

Enters: the files of a `TableSource`. Leaves: pieces of 64 to 512 MB. The cut depends on the files alone, never on the
cluster. A line belongs to the piece in which its first byte lies. A compressed file is one piece.
"""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from readapt_ray.errors import CorpusError
from readapt_ray.sources.lines import is_compressed
from readapt_ray.sources.source import BadRow, Limits, Row, Span
from readapt_ray.sources.table_sources import DataFile, TableSource
from readapt_ray.sources.tables import FORMATS, open_parquet
from readapt_ray.storage import Location

logger = logging.getLogger("readapt_ray")

MIN_PIECE_BYTES = 64 << 20
_MAX_PIECE_BYTES = 512 << 20
_WANTED_PIECES = 1000
_THREADS = 32


@dataclass(frozen=True)
class Piece:
    """A range of one file: of its bytes, or of its row groups."""

    number: int
    label: str
    file: Location
    state: str
    """Size and time of the file when it was planned."""
    start: int
    end: int

    def rows(self, table_format: str, limits: Limits, span: Span) -> Iterator[Row | BadRow]:
        """Yield the rows; places count lines from the begin of the piece. `span.num_lines` is then how many there are.

        Raises:
            CorpusError: the file changed since it was planned.
        """
        self._check_unchanged()
        yield from FORMATS[table_format].rows(self.file, self.label, limits, lambda _: None, span)
        self._check_unchanged()

    def _check_unchanged(self) -> None:
        if state_of(self.file) != self.state:
            raise CorpusError(
                f"{self.label} changed while it was read; wait until nobody writes it and run `readapt ingest` again"
            )


def state_of(file: Location) -> str:
    """Return the size and time of a file."""
    return ":".join(map(str, file.size_and_time()))


def plan_pieces(source: TableSource) -> tuple[list[Piece], int]:
    """Return the pieces in the order of the rows, and the bytes of all (uncompressed in the case of Parquet)."""
    files = source.files()
    with ThreadPoolExecutor(_THREADS) as pool:
        states = list(pool.map(lambda file: state_of(file.location), files))
        units = list(pool.map(_group_bytes if source.format == "parquet" else lambda file: [file.size_bytes()], files))
    total = sum(map(sum, units))
    piece_bytes = min(max(MIN_PIECE_BYTES, total // _WANTED_PIECES), _MAX_PIECE_BYTES)
    pieces: list[Piece] = []
    for file, state, sizes in zip(files, states, units, strict=True):
        ranges = _ranges_of_groups(sizes, piece_bytes) if source.format == "parquet" else _ranges(file, piece_bytes)
        for start, end in ranges:
            pieces.append(Piece(len(pieces), file.label, file.location, state, start, end))
    return pieces, total


def _group_bytes(file: DataFile) -> list[int]:
    with open_parquet(file.location, file.label) as parquet:
        return [parquet.metadata.row_group(number).total_byte_size for number in range(parquet.metadata.num_row_groups)]


def _ranges(file: DataFile, piece_bytes: int) -> list[tuple[int, int]]:
    size = file.size_bytes()
    if is_compressed(file.location.name):
        if size > piece_bytes:
            logger.warning(
                "%s is compressed, so one task reads all %d MB of it; several files, or one that is not compressed, are "
                "read in parallel",
                file.label,
                size >> 20,
            )
        return [(0, size)]
    return [(start, min(start + piece_bytes, size)) for start in range(0, size, piece_bytes)]


def _ranges_of_groups(sizes: list[int], piece_bytes: int) -> Iterator[tuple[int, int]]:
    start, gathered = 0, 0
    for group, size in enumerate(sizes):
        gathered += size
        if gathered >= piece_bytes or group + 1 == len(sizes):
            yield start, group + 1
            start, gathered = group + 1, 0
