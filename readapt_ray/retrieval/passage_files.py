"""Read some passages, or all, from the Parquet files of an ingested corpus.

Enters: the files. Leaves: their rows, a batch at a time; nothing of a corpus stays in memory.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from readapt_ray.errors import CorruptFileError
from readapt_ray.records import Passage
from readapt_ray.storage import Location

_BATCH_ROWS = 16384


def read_batches(file: Location, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Yield these columns of a file, some thousand rows at a time.

    Raises:
        CorruptFileError: the file is cut short, or lacks a column of `Passage`.
    """
    with opened(file) as parquet:
        yield from parquet.iter_batches(_BATCH_ROWS, columns=list(columns))


@contextlib.contextmanager
def opened(file: Location) -> Iterator[pq.ParquetFile]:
    """Open a file of passages.

    Raises:
        CorruptFileError: the file is cut short, or lacks a column of `Passage`.
    """
    try:
        with file.open_input() as stream:
            parquet = pq.ParquetFile(stream)
            if missing := set(Passage._fields) - set(parquet.schema_arrow.names):
                raise CorruptFileError(f"{file} lacks the columns {sorted(missing)}; ingest the corpus again")
            yield parquet
    except pa.ArrowInvalid as error:
        raise CorruptFileError(f"{file} is not a whole Parquet file ({error}); ingest the corpus again") from error


def missing_ids(files: Iterable[Location], doc_ids: Iterable[str]) -> list[str]:
    """Return those of the doc_ids that no file has a passage for, each once, in their order.

    Raises:
        CorruptFileError: a file cannot be read.
    """
    missing = pa.array(dict.fromkeys(doc_ids), pa.large_string())
    for file in files:
        for batch in read_batches(file, ["doc_id"]):
            missing = missing.filter(pc.invert(pc.is_in(missing, batch["doc_id"].cast(pa.large_string()))))
    return [str(each) for each in missing.to_pylist()]


def find_passages(files: Iterable[Location], doc_ids: Iterable[str]) -> dict[str, Passage]:
    """Return the passages of these doc_ids, by reading all files once; `PassageStore` is for many such questions.

    Raises:
        CorruptFileError: a file cannot be read.
    """
    wanted = pa.array(set(doc_ids), pa.large_string())
    found: dict[str, Passage] = {}
    for file in files:
        for batch in read_batches(file, Passage._fields) if len(wanted) else ():
            rows = batch.filter(pc.is_in(batch["doc_id"].cast(pa.large_string()), wanted)).to_pylist()
            found |= {row["doc_id"]: Passage(row["doc_id"], row["title"] or "", row["text"] or "") for row in rows}
    return found
