"""Send a file of vectors to a target, or delete rows that a corpus no longer has, and record this in a ledger.

In: the number of a file. Out: its rows in the target, then a ledger such as `rows/part-00000.parquet`, with doc_id and
a digest of what was sent per row. A file with a ledger is done, so a killed export resumes with the next file. A later
export compares its rows with these ledgers, and sends only new and changed ones. Memory: one file of vectors and its
passages.
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

from readapt_ray.dead_rows import name_without_mark
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
    """The facts of an export that all of its tasks share."""

    address: Address
    fingerprint: str
    """Fingerprint of the export; its first 8 digits are in the names of files that a target writes."""
    layout: Layout
    vectors: ParquetRows
    passages: ParquetRows | None
    """Passages of the corpus; None if no payload is sent."""
    previous: ParquetRows | None
    """Ledgers of the earlier export that this one updates; None if there is none."""
    output: Location
    """Folder of the export, in which the ledgers are written."""
    batch_rows: int
    """Number of rows per request to the database."""


@dataclass(frozen=True, kw_only=True)
class Lookups:
    """Lookups by doc_id over all rows of an export."""

    passages: IdLookup | None
    """Row number of each passage in the corpus; None if no payload is sent."""
    before: IdLookup | None
    """Digest of each row that the earlier export sent; None without an earlier export."""
    now: IdLookup | None
    """All doc_ids that have a vector now, to find deletions; None without an earlier export."""


@dataclass(frozen=True)
class Done:
    """Counts of the rows of one file of vectors, or of one ledger of an earlier export."""

    num_rows: int
    """Number of vectors in the file; 0 for a ledger."""
    num_sent: int
    """Number of rows that were sent: new and changed ones."""
    num_deleted: int
    """Number of rows that were deleted; 0 for a file of vectors."""
    num_new: int
    """Number of rows whose doc_id the earlier export lacks; without an earlier export, all."""


def look_up(job: ExportJob) -> Lookups:
    """Read all doc_ids that an export needs, and build the lookups by doc_id.

    They are the doc_ids of the corpus (if a payload is sent), and for an update also the doc_ids of the vectors and the
    digests of the earlier export. Lookups that are not needed are None.
    """
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
    """Send the new and changed rows of a file of vectors, then write its ledger; send nothing if the ledger exists.

    Without an earlier export, all rows are sent. A failed request is retried up to 3 times, after 1, 2 and 4 s.

    Args:
        job: what all tasks of the export share.
        lookups: from `look_up`.
        number: position of the file in `job.vectors.counts`.

    Returns:
        The counts, which the ledger stores.

    Raises:
        CorruptFileError: the passage of a vector is not in the corpus.
        TargetError: the database cannot be reached or refuses the rows.
    """
    name, count = job.vectors.counts[number]
    ledger = job.output / ROWS / name_without_mark(name)
    if not ledger.is_file():
        stored = read_rows(job.vectors.folder / name, 0, count, (*VECTOR_COLUMNS, "content_hash"))
        rows = _rows(job, lookups, stored, name)
        digests = _digests(rows, stored)
        needs_sending, is_new = np.ones(count, bool), np.ones(count, bool)
        if lookups.before is not None:
            there, known = lookups.before.find(rows["doc_id"].to_pylist())
            needs_sending, is_new = ~known | (there != digests), ~known
        to_send = rows.filter(pa.array(needs_sending))
        part = f"{name_without_mark(name).removesuffix('.parquet')}-{job.fingerprint[:8]}"
        if to_send.num_rows:
            batches = [to_send.slice(at, job.batch_rows) for at in range(0, to_send.num_rows, job.batch_rows)]
            _with_retries(job, lambda target: target.write(part, iter(batches)))
        done = Done(count, to_send.num_rows, 0, int(is_new.sum()))
        _write_ledger(ledger, pa.table({"doc_id": rows["doc_id"], "digest": digests}), done)
    return _read_ledger(ledger)


def delete_lost(job: ExportJob, lookups: Lookups, number: int) -> Done:
    """Delete the rows of an earlier ledger that have no vector now, then write a ledger; do nothing if that exists.

    Call it only if the job has an earlier export. A failed request is retried as in `send_file`.

    Args:
        job: what all tasks of the export share.
        lookups: from `look_up`.
        number: position of the ledger in `job.previous.counts`.

    Returns:
        The counts, which the new ledger stores.

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
            _with_retries(job, functools.partial(_delete, batches=batches))
        _write_ledger(ledger, pa.table({"doc_id": lost}), Done(0, 0, len(lost), 0))
    return _read_ledger(ledger)


def _delete(target: Target, batches: list[list[str]]) -> None:
    for doc_ids in batches:
        target.delete(doc_ids)


def _rows(job: ExportJob, lookups: Lookups, stored: pa.Table, name: str) -> pa.Table:
    """Return the rows of a file of vectors, joined with their passages."""
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
    """Return an 8-byte digest of each row. If there are content hashes, they replace title, text and vector in it."""
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


def _with_retries(job: ExportJob, work: Callable[[Target], None]) -> None:
    """Call `work` with the target; retry up to 3 times, which is safe: writing the same rows again changes nothing."""
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
