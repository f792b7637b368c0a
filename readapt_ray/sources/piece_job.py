"""What all tasks of a parallel ingest know, and the files by which they say what is dropped."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from readapt_ray.artifacts import fingerprint
from readapt_ray.sources import exchange
from readapt_ray.sources.duplicates import Deduplication
from readapt_ray.sources.known_pieces import KnownPiece
from readapt_ray.sources.parts import EarlierPart
from readapt_ray.sources.read_options import ReadOptions
from readapt_ray.sources.splitting import Splitting
from readapt_ray.storage import Location

Lists = Mapping[str, Sequence[tuple[int, int]]]
"""For "drop-ids", "drop-contents" and "drop-near" the numbers and chunks of the files that name dropped passages."""


@dataclass(frozen=True, kw_only=True)
class PieceJob:
    """What all tasks of one ingest need to know."""

    output: Location
    table_format: str
    options: ReadOptions
    kept: pa.Schema
    splitting: Splitting | None
    rows_per_file: int
    deduplicate: Deduplication
    near_threshold: float
    num_pieces: int
    num_partitions: int
    num_near_partitions: int
    earlier: Mapping[str, EarlierPart]
    """Parts of an earlier corpus, for `PartWriter`."""
    known: Mapping[int, KnownPiece]
    """What an earlier ingest found in pieces that did not change."""
    by_changes: bool
    """Whether known pieces are looked at only for passages that repeat changed ones."""

    @property
    def is_plain(self) -> bool:
        """Whether rows of the source become passages as they are, and are compared as wholes."""
        return self.splitting is None and self.deduplicate != "near"

    @property
    def made_by(self) -> str:
        """Fingerprint of what decides how a piece is read."""
        reading = (self.table_format, self.options, self.kept, self.rows_per_file, version("readapt-ray"))
        return fingerprint([str(each) for each in reading])

    def file(self, what: str, number: int, chunk: int = 0) -> Location:
        """Return the place of one file of the exchange."""
        return self.output / "exchange" / f"{what}-{number:06d}-{chunk:05d}"

    def files(self, what: str, numbers: Iterable[int]) -> list[Location]:
        """Return the places of several files of the exchange."""
        return [self.file(what, number) for number in numbers]

    def chunk_files(self, what: str, num_chunks: Iterable[int]) -> list[Location]:
        """Return the places of the digests of all pieces, given how many files each piece has."""
        return [self.file(what, piece, chunk) for piece, num in enumerate(num_chunks) for chunk in range(num)]


def write_moves(job: PieceJob, to: Location, rows: NDArray[np.uint64], kept: NDArray[np.uint64]) -> None:
    """Write which passages are dropped, by their pieces, and which ones were kept in their place."""
    moves = np.zeros(len(rows), exchange.MOVE)
    moves["row"], moves["kept"] = rows, kept
    exchange.write_partitions(to, moves, exchange.pieces_of(rows), job.num_pieces)


def dropped_rows(piece: int, lists: Lists, job: PieceJob) -> NDArray[np.uint64]:
    """Return the passages of a piece that some files name as dropped."""
    files = [job.file(what, *each) for what, numbers in lists.items() for each in numbers]
    found: NDArray[np.uint64] = exchange.read_partition(files, piece, job.num_pieces, exchange.MOVE)["row"]
    return found
