"""Send a file of vectors to a target, or remove what a corpus lost, and note it in a ledger.

In: the name of a file. Out: its rows in the target, then a ledger, `rows/part-00000.parquet`: doc_id and a digest of
what was sent per row. A file whose ledger is there is done, so a killed export resumes with the next one. A later
export compares its rows with the ledgers of this one. Memory is one file of vectors and its passages.
"""

import functools
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from readapt_ray.errors import CorruptFileError, TargetError
from readapt_ray.retrieval.id_lookup import IdLookup
from readapt_ray.retrieval.parquet_rows import ParquetRows, read_rows
from readapt_ray.retrieval.vector_files import METADATA_KEY, VECTOR_COLUMNS, matrix_of, read_footer
from readapt_ray.storage import Location
from readapt_ray.targets.addresses import Address
from readapt_ray.targets.opening import open_target
from readapt_ray.targets.target import Layout, Target, matrix

logger = logging.getLogger("readapt_ray")

ROWS, DELETED = "rows", "deleted"
_READ_ROWS = 65536
_DIGEST_BYTES = 8
_ATTEMPTS = 4
_FIRST_WAIT_S = 1.0


@dataclass(frozen=True, kw_only=True)
class ExportJob:
    """What every task needs to know."""

    address: Address
    fingerprint: str
    """Of the export; its first 8 digits are in the names of files that a target writes."""
    layout: Layout
    vectors: ParquetRows
    passages: ParquetRows | None
    """None if no payload is sent."""
    previous: ParquetRows | None
    """The ledgers of the earlier export."""
    output: Location
    batch_rows: int


@dataclass(frozen=True, kw_only=True)
class Lookups:
    """What is known of all rows."""

    passages: IdLookup | None
    """The row of each passage in the corpus."""
    before: IdLookup | None
    """The digest of each row that the earlier export sent."""
    now: IdLookup | None
    """Every doc_id that has a vector now; only for deletions."""


@dataclass(frozen=True)
class Done:
    """What became of one file."""

    num_rows: int
    num_sent: int
    num_deleted: int
    num_new: int


def look_up(job: ExportJob) -> Lookups:
    """Read the doc_ids of the corpus, and for an update also of the vectors and the earlier export."""
    passages = _rows_by_id(job.passages) if job.passages else None
    if job.previous is None:
        return Lookups(passages=passages, before=None, now=None)
    tables = list(_columns(job.previous, ("doc_id", "digest")))
    digests = np.concatenate([np.zeros(0, np.uint64), *(each["digest"].to_numpy() for each in tables)])
    before = IdLookup.build((name for each in tables for name in each["doc_id"].to_pylist()), digests)
    return Lookups(passages=passages, before=before, now=_rows_by_id(job.vectors))


def _rows_by_id(rows: ParquetRows) -> IdLookup:
    doc_ids = (name for table in _columns(rows, ("doc_id",)) for name in table["doc_id"].to_pylist())
    return IdLookup.build(doc_ids, np.arange(rows.num_rows, dtype=np.uint64))


def _columns(rows: ParquetRows, names: tuple[str, ...]) -> Iterator[pa.Table]:
    for file, count in rows.counts:
        for start in range(0, count, _READ_ROWS):
            yield read_rows(rows.folder / file, start, min(_READ_ROWS, count - start), names)


def send_file(job: ExportJob, lookups: Lookups, number: int) -> Done:
    """Send the rows of a file of vectors that the target does not have yet, unless its ledger is there.

    Raises:
        CorruptFileError: a passage of a vector is not in the corpus.
        TargetError: the database cannot be reached or refuses the rows.
    """
    name, count = job.vectors.counts[number]
    ledger = job.output / ROWS / name
    if not ledger.is_file():
        stored = read_rows(job.vectors.folder / name, 0, count, (*VECTOR_COLUMNS, "content_hash"))
        rows = _rows(job, lookups, stored, name)
        digests = _digests(rows, stored)
        is_due, is_new = np.ones(count, bool), np.ones(count, bool)
        if lookups.before is not None:
            there, known = lookups.before.find(rows["doc_id"].to_pylist())
            is_due, is_new = ~known | (there != digests), ~known
        due = rows.filter(pa.array(is_due))
        part = f"{name.removesuffix('.parquet')}-{job.fingerprint[:8]}"
        if due.num_rows:
            batches = [due.slice(at, job.batch_rows) for at in range(0, due.num_rows, job.batch_rows)]
            _insist(job, lambda target: target.write(part, iter(batches)))
        done = Done(count, due.num_rows, 0, int(is_new.sum()))
        _write_ledger(ledger, pa.table({"doc_id": rows["doc_id"], "digest": digests}), done)
    return _read_ledger(ledger)


def delete_lost(job: ExportJob, lookups: Lookups, number: int) -> Done:
    """Delete what a file of the earlier export's ledgers lists and the corpus no longer has.

    Raises:
        TargetError: the database cannot be reached or refuses the deletion.
    """
    assert job.previous is not None and lookups.now is not None
    name, count = job.previous.counts[number]
    ledger = job.output / DELETED / name
    if not ledger.is_file():
        doc_ids = read_rows(job.previous.folder / name, 0, count, ("doc_id",))["doc_id"]
        lost = doc_ids.filter(pa.array(~lookups.now.find(doc_ids.to_pylist())[1]))
        batches = [lost.slice(at, job.batch_rows).to_pylist() for at in range(0, len(lost), job.batch_rows)]
        if batches:
            _insist(job, functools.partial(_delete, batches=batches))
        _write_ledger(ledger, pa.table({"doc_id": lost}), Done(0, 0, len(lost), 0))
    return _read_ledger(ledger)


def _delete(target: Target, batches: list[list[str]]) -> None:
    for doc_ids in batches:
        target.delete(doc_ids)


def _rows(job: ExportJob, lookups: Lookups, stored: pa.Table, name: str) -> pa.Table:
    """Return the rows of a file of vectors with the passages that they are of."""
    doc_ids, vectors = matrix_of(stored, job.vectors.folder / name)
    numbers = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), job.layout.dimension)
    columns = {"doc_id": stored["doc_id"], "vector": numbers}
    if job.passages is not None and lookups.passages is not None and doc_ids:
        rows, found = lookups.passages.find(doc_ids)
        passages = job.passages.take(rows.astype(np.int64), ("doc_id", *job.layout.payload.names))
        if not found.all() or passages["doc_id"].to_pylist() != doc_ids:
            raise CorruptFileError(
                f"{job.passages.folder} does not have the passages of the vectors in {job.vectors.folder / name}; "
                f"run `readapt ingest` and `readapt embed` again"
            )
        columns |= {each: passages[each] for each in job.layout.payload.names}
    return pa.table(columns).cast(job.layout.schema)


def _digests(rows: pa.Table, stored: pa.Table) -> NDArray[np.uint64]:
    """Return 8 bytes per row that change when what is sent does: the text by its content hash, the vector without one."""
    has_hash = "content_hash" in stored.column_names
    hashes = stored["content_hash"].to_pylist() if has_hash else [None] * rows.num_rows
    covered = {"doc_id", "vector"} | ({"title", "text"} if has_hash else set())
    others = rows.select([name for name in rows.column_names if name not in covered]).to_pylist()
    raw = [each.tobytes() for each in matrix(rows)]
    parts = (
        hashlib.blake2b((content or raw[at]) + repr(other).encode("utf-8", "surrogatepass"), digest_size=_DIGEST_BYTES)
        for at, (content, other) in enumerate(zip(hashes, others or [{}] * rows.num_rows, strict=True))
    )
    return np.frombuffer(b"".join(each.digest() for each in parts), np.uint64)


def _insist(job: ExportJob, work: Callable[[Target], None]) -> None:
    """Do something with the target; try again if the database does not answer, since nothing is lost by that."""
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            with open_target(job.address) as target:
                work(target)
            return
        except TargetError as error:
            if attempt == _ATTEMPTS:
                raise
            wait_s = _FIRST_WAIT_S * 2 ** (attempt - 1)
            logger.warning("export: %s; trying again in %.0f s", error, wait_s)
            time.sleep(wait_s)


def _write_ledger(file: Location, table: pa.Table, done: Done) -> None:
    table = table.replace_schema_metadata({METADATA_KEY: json.dumps(vars(done))})
    with file.open_output() as stream:
        pq.write_table(table, stream, compression="zstd")


def _read_ledger(file: Location) -> Done:
    return Done(**read_footer(file).metadata)
