"""Define the settings that all tasks of a parallel ingest share, and the files that list dropped passages."""

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
"""The files that name dropped passages: (number, chunk) of each, under "drop-ids", "drop-contents" and "drop-near"."""


@dataclass(frozen=True, kw_only=True)
class PieceJob:
    """Settings that all tasks of one ingest share."""

    output: Location
    table_format: str
    """A key of `FORMATS`."""
    options: ReadOptions
    kept: pa.Schema
    """The kept columns."""
    splitting: Splitting | None
    """How to split documents into passages. None: they are not split."""
    rows_per_file: int
    deduplicate: Deduplication
    near_threshold: float
    """Jaccard similarity from which on passages are near duplicates."""
    num_pieces: int
    num_partitions: int
    """Number of partitions of doc_ids, and of contents."""
    num_near_partitions: int
    """Number of partitions of bands of MinHashes."""
    earlier: Mapping[str, EarlierPart]
    """Parts of an earlier corpus, for `PartWriter`."""
    known: Mapping[int, KnownPiece]
    """Results of an earlier ingest for the pieces that did not change, by piece number."""
    by_changes: bool
    """Whether unchanged pieces are only searched for passages that repeat passages of changed pieces."""

    @property
    def is_plain(self) -> bool:
        """Whether documents are not split, and near duplicates are not dropped."""
        return self.splitting is None and self.deduplicate != "near"

    @property
    def made_by(self) -> str:
        """Fingerprint of everything that decides how a piece is read."""
        reading = (self.table_format, self.options, self.kept, self.rows_per_file, version("readapt-ray"))
        return fingerprint([str(each) for each in reading])

    def file(self, what: str, number: int, chunk: int = 0) -> Location:
        """Return the location of a file of the exchange.

        Args:
            what: its kind, such as "ids" or "drop-near".
            number: number of the piece or partition that wrote it.
            chunk: number of the file, if a piece writes several of a kind.
        """
        return self.output / "exchange" / f"{what}-{number:06d}-{chunk:05d}"

    def files(self, what: str, numbers: Iterable[int]) -> list[Location]:
        """Return the locations of several files of one kind, by their numbers."""
        return [self.file(what, number) for number in numbers]

    def chunk_files(self, what: str, num_chunks: Iterable[int]) -> list[Location]:
        """Return the locations of the files of one kind of all pieces, given the number of files per piece."""
        return [self.file(what, piece, chunk) for piece, num in enumerate(num_chunks) for chunk in range(num)]


def write_moves(job: PieceJob, to: Location, rows: NDArray[np.uint64], kept: NDArray[np.uint64]) -> None:
    """Write a list of dropped passages (`rows`) and of the passages kept instead (`kept`), partitioned by piece.

    Args:
        job: settings of the ingest.
        to: the file to write.
        rows: row numbers of the dropped passages: uint64 [N].
        kept: for each, the row number of the passage that is kept instead: uint64 [N].
    """
    moves = np.zeros(len(rows), exchange.MOVE)
    moves["row"], moves["kept"] = rows, kept
    exchange.write_partitions(to, moves, exchange.pieces_of(rows), job.num_pieces)


def dropped_rows(piece: int, lists: Lists, job: PieceJob) -> NDArray[np.uint64]:
    """Return the row numbers of a piece that the files in `lists` name as dropped: uint64, in no order."""
    files = [job.file(what, *each) for what, numbers in lists.items() for each in numbers]
    found: NDArray[np.uint64] = exchange.read_partition(files, piece, job.num_pieces, exchange.MOVE)["row"]
    return found
