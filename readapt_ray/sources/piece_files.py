"""Do the work of one task of a parallel ingest: read a piece, find duplicates in a partition, or remove duplicates.

A piece first writes all its passages to `passages/`. Parts from which duplicates were removed are marked in their footers,
so that a killed run resumes. `exchange/` holds digests and the results of tasks, and is removed at the end. A task holds
in memory one part of passages, and the digests of a million passages or of one partition.
"""

import itertools
import json
import logging
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from readapt_ray.damage import READ_ERRORS
from readapt_ray.errors import first_line
from readapt_ray.sources import exchange
from readapt_ray.sources.bad_rows import NUM_NAMED
from readapt_ray.sources.cleaning import num_bytes
from readapt_ray.sources.duplicates import digest
from readapt_ray.sources.known_pieces import KnownKeys, rows_of
from readapt_ray.sources.near_pieces import SketchWriter
from readapt_ray.sources.parts import PartWriter
from readapt_ray.sources.piece_job import PieceJob, dropped_rows, write_moves
from readapt_ray.sources.pieces import Piece
from readapt_ray.sources.row_checks import RowChecks
from readapt_ray.sources.source import BadRow
from readapt_ray.sources.splitting import split_part
from readapt_ray.storage import Location

logger = logging.getLogger("readapt_ray")

_CHUNK_ROWS = 1 << 20
"""Number of passages whose digests are written to one file."""
_FILTERED = b"readapt.repeats_taken_out"


class _Digests:
    """Writes digests of the passages of a piece for the exchange, a million per file."""

    def __init__(self, job: PieceJob, piece: int) -> None:
        self.num_chunks = 0
        self._job, self._piece = job, piece
        self._next = 0
        self._clear()

    def add(self, doc_id: str, content: bytes, line: int, size_bytes: int, *, place: int | None = None) -> None:
        """Add a passage. `place` is its index among the passages of the piece; None means after the last one."""
        self._ids += digest(doc_id)
        self._contents += content
        self._rows.append(self._next if place is None else place)
        self._next = self._rows[-1] + 1
        self._lines.append(line)
        self._sizes.append(size_bytes)
        if len(self._lines) == _CHUNK_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write the digests that were added since the last flush."""
        if not self._lines:
            return
        job, num_rows = self._job, len(self._lines)
        ids, contents = np.zeros(num_rows, exchange.ID), np.zeros(num_rows, exchange.CONTENT)
        for records, digests in ((ids, self._ids), (contents, self._contents)):
            records["key"] = np.frombuffer(digests, "<u8").reshape(-1, 2)
            records["row"] = np.frombuffer(self._rows, np.uint64) + np.uint64(self._piece << exchange.ROW_BITS)
            records["size"] = np.frombuffer(self._sizes, np.uint32)
        ids["line"] = np.frombuffer(self._lines, np.uint64)
        ids["partition"] = exchange.partition_of(contents["key"], job.num_partitions)
        by_id = exchange.partition_of(ids["key"], job.num_partitions)
        to = job.file("ids", self._piece, self.num_chunks)
        exchange.write_partitions(to, ids, by_id, job.num_partitions)
        if job.deduplicate != "none":
            to = job.file("contents", self._piece, self.num_chunks)
            exchange.write_partitions(to, contents, ids["partition"], job.num_partitions)
        self.num_chunks += 1
        self._clear()

    def _clear(self) -> None:
        self._ids, self._contents = bytearray(), bytearray()
        self._rows, self._lines, self._sizes = array("Q"), array("Q"), array("I")


def read_piece(piece: Piece, job: PieceJob) -> dict[str, Any]:
    """Write the passages and digests of a piece, unless that is done, and return its record: parts, counts, bad rows.

    Lines in the record are counted from the beginning of the piece.
    """
    record = job.file("piece", piece.number)
    if not record.is_file():
        content = _share_piece(piece, job) if piece.number in job.known else _read_piece(piece, job)
        record.write_text(json.dumps(content))
    found: dict[str, Any] = json.loads(record.read_text())
    return found


def _writer(number: int, job: PieceJob) -> PartWriter:
    prefix, to = f"{number:06d}", job.output / "passages"
    return PartWriter(to, rows_per_file=job.rows_per_file, prefix=prefix, kept=job.kept, earlier=job.earlier)


def _share_piece(piece: Piece, job: PieceJob) -> dict[str, Any]:
    """Share the files of an unchanged piece with an earlier corpus, and write their digests.

    Digests are not written if `repeats_in_known` writes the few that are needed. If a file is damaged, the source is read.
    """
    number = piece.number
    folder, record = job.known[number]
    writer, digests, parts = _writer(number, job), _Digests(job, number), {}
    lines = itertools.count(1)
    try:
        for part, (name, num_rows) in enumerate(record["parts"].items()):
            if not job.by_changes:
                for doc_id, content, size_bytes in rows_of(folder / name):
                    digests.add(doc_id, content, next(lines), size_bytes)
            parts[writer.share(folder / name, part)] = num_rows
    except READ_ERRORS as error:
        logger.warning("ingest: cannot read %s (%s), so the source is read", folder, first_line(error))
        return _read_piece(piece, replace(job, earlier={}))
    writer.remove_behind(len(parts))
    digests.flush()
    return {**record, "number": number, "parts": parts, "num_chunks": digests.num_chunks}


def repeats_in_known(numbers: Sequence[int], changed: Sequence[str], job: PieceJob) -> dict[int, int | None]:
    """Write digests of the passages of unchanged pieces that share a doc_id or content with a changed piece.

    Passages of unchanged pieces need not be compared with each other: an earlier ingest found no duplicates among them.

    Args:
        numbers: numbers of the unchanged (known) pieces.
        changed: names of the parts of all changed pieces.
        job: settings of the ingest.

    Returns:
        The number of digest files per piece; None for a piece whose files are damaged.
    """
    there = KnownKeys.of((job.output / "passages" / name for name in changed), with_contents=job.deduplicate != "none")
    found: dict[int, int | None] = {}
    for number in numbers:
        folder, record = job.known[number]
        digests, first = _Digests(job, number), 0
        try:
            for name, num_rows in record["parts"].items():
                for row, doc_id, content, size_bytes in there.repeated(folder / name):
                    digests.add(doc_id, content, first + row + 1, size_bytes, place=first + row)
                first += num_rows
            digests.flush()
            found[number] = digests.num_chunks
        except READ_ERRORS as error:
            logger.warning("ingest: cannot read %s (%s), so the source is read", folder, first_line(error))
            found[number] = None
    return found


def _read_piece(piece: Piece, job: PieceJob) -> dict[str, Any]:
    writer = _writer(piece.number, job)
    checks: RowChecks[int] = RowChecks(job.kept, max_text_bytes=job.options.max_text_bytes)
    digests = _Digests(job, piece.number)
    sketches = SketchWriter(job, piece.number) if job.deduplicate == "near" else None
    reasons: Counter[str] = Counter()
    first: list[tuple[int, str, str]] = []
    num_lines: list[int] = []
    total_bytes = 0
    for line, row in piece.rows(job.table_format, job.options, num_lines):
        passage = checks.passage(row, line)
        if isinstance(passage, BadRow):
            reasons[passage.reason] += 1
            if len(first) < NUM_NAMED:
                first.append((line, passage.reason, passage.value))
            continue
        size_bytes = num_bytes(passage.title) + num_bytes(passage.text)
        total_bytes += size_bytes
        digests.add(passage.doc_id, writer.add(passage, size_bytes), line, size_bytes)
        if sketches:
            sketches.add(passage, size_bytes)
    writer.close()
    digests.flush()
    if sketches:
        sketches.flush()
    return {
        "number": piece.number,
        "parts": writer.rows_by_file(),
        "num_bytes": total_bytes,
        "num_lines": num_lines,
        "num_chunks": digests.num_chunks,
        "num_changed_ids": checks.num_changed_ids,
        "kinds": dict(checks.kinds),
        "unfit": checks.unfit,
        "reasons": dict(reasons),
        "first": first,
    }


def repeated_ids(partition: int, num_chunks: list[int], job: PieceJob) -> dict[str, Any]:
    """Find passages whose doc_id an earlier passage has, in one partition, and write them to the lists of dropped ones.

    Args:
        partition: number of the partition of doc_ids.
        num_chunks: number of digest files per piece.
        job: settings of the ingest.

    Returns:
        `partition`; `count` and `num_bytes` of the dropped passages; `first`: (row, line in the piece) of the first 20.
    """
    records = exchange.read_partition(job.chunk_files("ids", num_chunks), partition, job.num_partitions, exchange.ID)
    lost, kept = exchange.repeats(records)
    if len(lost):
        rows = np.zeros(len(lost), exchange.ROW)
        rows["row"] = lost["row"]
        exchange.write_partitions(job.file("lost-ids", partition), rows, lost["partition"], job.num_partitions)
        write_moves(job, job.file("drop-ids", partition), lost["row"], kept)
    first = lost[:NUM_NAMED]
    return _found(partition, lost) | {"first": list(zip(first["row"].tolist(), first["line"].tolist(), strict=True))}


def repeated_contents(partition: int, num_chunks: list[int], with_lost_ids: list[int], job: PieceJob) -> dict[str, Any]:
    """Find passages with the same title and text as an earlier one, in one partition, and list them as dropped.

    Passages that are dropped for a repeated doc_id are left out before.

    Args:
        partition: number of the partition of contents.
        num_chunks: number of digest files per piece.
        with_lost_ids: the partitions of doc_ids in which passages were dropped.
        job: settings of the ingest.

    Returns:
        `partition`; `count` and `num_bytes` of the dropped passages; `first`: (row, kept row) of the first 20.
    """
    num = job.num_partitions
    records = exchange.read_partition(job.chunk_files("contents", num_chunks), partition, num, exchange.CONTENT)
    left_out = exchange.read_partition(job.files("lost-ids", with_lost_ids), partition, num, exchange.ROW)
    lost, kept = exchange.repeats(records[~np.isin(records["row"], left_out["row"])])
    if len(lost):
        write_moves(job, job.file("drop-contents", partition), lost["row"], kept)
    first = lost["row"][:NUM_NAMED].tolist()
    return _found(partition, lost) | {"first": list(zip(first, kept[:NUM_NAMED].tolist(), strict=True))}


def _found(partition: int, lost: NDArray[np.void]) -> dict[str, Any]:
    return {"partition": partition, "count": len(lost), "num_bytes": int(lost["size"].sum(dtype=np.int64))}


def take_out_repeats(number: int, parts: dict[str, int], lists: dict[str, list[tuple[int, int]]], job: PieceJob) -> int:
    """Remove dropped passages from the parts of a piece, and return how many passages are left.

    A part is written again, or removed if nothing is left of it. A part that a killed run has filtered is not changed.

    Args:
        number: number of the piece.
        parts: number of passages that each part had at first, by name.
        lists: the files that name dropped passages, under "drop-ids", "drop-contents" and "drop-near".
        job: settings of the ingest.
    """
    lists = lists | {"drop-near": [each for each in lists["drop-near"] if each[0] == number]}
    lost = dropped_rows(number, lists, job)
    places = np.sort(lost - np.uint64(number << exchange.ROW_BITS)).astype(np.int64)
    start = 0
    for name, num_rows in parts.items():
        inside = places[(places >= start) & (places < start + num_rows)] - start
        if len(inside):
            _filter(job.output / "passages" / name, inside, num_rows)
        start += num_rows
    return start - len(places)


def split_into_passages(name: str, job: PieceJob) -> dict[str, int]:
    """Split the documents of the part `name` into passages, unless that is done, and return the counts of `split_part`.

    `job.splitting` must be set.
    """
    assert job.splitting is not None
    return split_part(job.output / "passages" / name, job.splitting)


def _filter(file: Location, lost: NDArray[np.int64], num_rows: int) -> None:
    """Write a part again without some rows. If no row is left, the part is removed. Row groups are not merged."""
    if len(lost) == num_rows:
        file.delete()
        return
    keeps = np.ones(num_rows, bool)
    keeps[lost] = False
    with file.open_input() as stream, pq.ParquetFile(stream) as parquet:
        if _FILTERED in (parquet.metadata.metadata or {}):
            return
        start, schema = 0, parquet.schema_arrow.remove_metadata()  # the digest in the metadata is of all rows
        with file.open_output() as target, pq.ParquetWriter(target, schema, compression="zstd") as writer:
            for number in range(parquet.num_row_groups):
                group = parquet.read_row_group(number)
                kept = group.filter(pa.array(keeps[start : start + group.num_rows]))
                if kept.num_rows:
                    writer.write_table(kept)
                start += group.num_rows
            writer.add_key_value_metadata({_FILTERED.decode(): "yes"})
