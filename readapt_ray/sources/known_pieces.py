"""Reuse the passages of pieces of a source that did not change since an earlier ingest.

A parallel ingest writes `passages.pieces.json` beside its passages. It has a record of some 300 bytes per piece of which
every row became a passage, under a fingerprint of the content of the piece's files. The next ingest uses this record for
an unchanged piece, shares its files of passages, and computes digests of ids and contents from these files. That is ten
times as fast as reading the source.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from readapt_ray import dead_rows
from readapt_ray.artifacts import fingerprint
from readapt_ray.object_streams import MAX_SCANNED_BYTES
from readapt_ray.sources.parts import DIGEST
from readapt_ray.sources.pieces import Piece
from readapt_ray.storage import Location

NAME = "passages.pieces.json"
_COLUMNS = ("doc_id", "title", "text", "content_hash")


class EarlierPieces(NamedTuple):
    """The content of `passages.pieces.json` of an earlier ingest."""

    artifact: Location
    made_by: str
    deduplicate: str
    """Which kind of duplicates was dropped. Empty if an older release wrote the file."""
    pieces: Mapping[str, Mapping[str, Any]]
    """The record of each piece that lost no row, by its key (see `key_of`)."""
    starts: frozenset[tuple[str, int]]
    """File and offset (bytes or row group) where each piece began."""

    def known(self, made_by: str, keys: Iterable[str]) -> dict[int, "KnownPiece"]:
        """Return the known pieces among the present ones, by piece number. Empty if `made_by` is not as in that ingest.

        Args:
            made_by: fingerprint of everything that decides how a piece is read.
            keys: the key of each present piece, in the order of their numbers from 0.
        """
        pieces = self.pieces if self.made_by == made_by else {}
        found = ((number, pieces.get(key)) for number, key in enumerate(keys))
        return {number: KnownPiece(self.artifact / "passages", record) for number, record in found if record}


class KnownPiece(NamedTuple):
    """The result of an earlier ingest for an unchanged piece."""

    folder: Location
    """Folder of its passages."""
    record: Mapping[str, Any]
    """The record that `read_piece` returned."""


class KnownKeys(NamedTuple):
    """The doc_ids and content hashes of some passages, to find passages that repeat them."""

    doc_ids: pa.ChunkedArray
    contents: NDArray[np.uint64]
    """The first half of each content hash. A passage with the same half may have the same content."""

    @classmethod
    def of(cls, files: Iterable[Location], *, with_contents: bool) -> "KnownKeys":
        """Read doc_ids, and with `with_contents` content hashes, from files of passages. Else `contents` is empty."""
        tables = [pa.table({"doc_id": pa.array([], pa.string()), "content_hash": pa.array([], pa.binary(16))})]
        table = pa.concat_tables([*tables, *map(_keys_of, files)])
        return cls(table["doc_id"], _first_halves(table) if with_contents else np.zeros(0, np.uint64))

    def repeated(self, file: Location) -> Iterator[tuple[int, str, bytes, int]]:
        """Yield (row, doc_id, content hash, bytes of title and text) of a file's passages that share an id or content.

        Contents are compared by half of their hash only, so in rare cases a passage with another content is yielded
        too.
        """
        if not len(self.doc_ids):
            return
        table = _keys_of(file)
        has_id = pc.is_in(table["doc_id"], self.doc_ids.combine_chunks()).to_numpy()
        rows = np.flatnonzero(has_id | np.isin(_first_halves(table), self.contents))
        if len(rows):
            with dead_rows.opened(file) as part:
                texts = part.read(rows, _COLUMNS)
            sizes = pc.add(*(_num_bytes(texts[name]) for name in ("title", "text")))
            columns = (texts["doc_id"], texts["content_hash"], sizes)
            yield from zip(rows.tolist(), *(each.to_pylist() for each in columns), strict=True)


def _keys_of(file: Location) -> pa.Table:
    with (
        file.open_input(max_bytes=MAX_SCANNED_BYTES) as stream,
        pq.ParquetFile(stream, pre_buffer=True) as parquet,
    ):
        return parquet.read(columns=["doc_id", "content_hash"])


def _first_halves(table: pa.Table) -> NDArray[np.uint64]:
    chunks = [each for each in table["content_hash"].chunks if len(each)]
    halves = [np.frombuffer(each.buffers()[1], np.uint64, 2 * len(each), 16 * each.offset)[::2] for each in chunks]
    return np.concatenate([np.zeros(0, np.uint64), *halves])


def key_of(piece: Piece, contents: Mapping[str, Sequence[str]]) -> str:
    """Return a fingerprint of the content of a piece.

    Args:
        piece: a piece of the source.
        contents: digests of the content of each file, by its label (see `listing.contents_of`).
    """
    return fingerprint([(each.label, contents[each.label], each.start, each.end) for each in piece.ranges])


def write_pieces(
    artifact: Location,
    made_by: str,
    deduplicate: str,
    found: Iterable[tuple[Piece, str, Mapping[str, Any]]],
    parts: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write `passages.pieces.json`, with the pieces that a later ingest may reuse: every row became a passage and was kept.

    Args:
        artifact: the output of ingest.
        made_by: fingerprint of everything that decides how a piece is read.
        deduplicate: which kind of duplicates was dropped.
        found: each piece, its key, and its record.
        parts: metadata of the files of passages, by name. A file from which rows were removed has no digest.
    """
    pieces, starts = {}, []
    for piece, key, record in found:
        starts.append((piece.ranges[0].label, piece.ranges[0].start))
        if _is_whole(record, parts):
            pieces[key] = record
    (artifact / NAME).write_text(
        json.dumps({"made_by": made_by, "deduplicate": deduplicate, "pieces": pieces, "starts": starts})
    )


def read_pieces(artifact: Location) -> EarlierPieces:
    """Read `passages.pieces.json` of an earlier ingest.

    No pieces are known if it does not exist (one process or an older release read the source) or is damaged.
    """
    try:
        noted = json.loads((artifact / NAME).read_bytes())
        starts = frozenset((label, start) for label, start in noted["starts"])
        return EarlierPieces(artifact, noted["made_by"], noted.get("deduplicate", ""), noted["pieces"], starts)
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # then everything is read from the source
        return EarlierPieces(artifact, "", "", {}, frozenset())


def rows_of(file: Location) -> Iterator[tuple[str, bytes, int]]:
    """Yield (doc_id, content hash, bytes of title and text) of each passage of a file."""
    with file.open_input() as stream, pq.ParquetFile(stream) as parquet:
        for group in range(parquet.num_row_groups):
            table = parquet.read_row_group(group, columns=list(_COLUMNS))
            sizes = pc.add(*(_num_bytes(table[name]) for name in ("title", "text")))
            columns = table["doc_id"], table["content_hash"], sizes
            yield from zip(*(each.to_pylist() for each in columns), strict=True)


def _num_bytes(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.fill_null(pc.binary_length(texts), 0)


def _is_whole(record: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]]) -> bool:
    has_all_rows = sum(record["num_lines"]) == sum(record["parts"].values())
    is_as_written = all(DIGEST in parts.get(name, {}) for name in record["parts"])
    return has_all_rows and is_as_written and not (record["reasons"] or record["unfit"])
