"""The ends of many Parquet files, read at once: what each says, and whether together they are what was written.

In: a folder of an artifact. Out: the rows of each file. On an object store a footer takes some three requests of 25 ms; 32 at
a time read 24,000 of them in a minute. So `ingest` writes a table of the footers of its passages, and `embed` one of its
shards: a file that the listing of its folder shows with the size in that table is not opened.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from readapt_ray.artifacts import Artifact
from readapt_ray.errors import CorpusError, CorruptFileError
from readapt_ray.retrieval.parquet_rows import ParquetRows, RowCounts
from readapt_ray.retrieval.shard_plan import PASSAGE_COLUMNS
from readapt_ray.retrieval.vector_files import Footer, read_footer
from readapt_ray.sources.parts import DIGEST, FIRST_ID
from readapt_ray.storage import Location

_THREADS = 32
_COLUMNS = ("name", "num_rows", "num_bytes", "digest", DIGEST, FIRST_ID)
_SCHEMA_KEY = b"schema"

In = TypeVar("In")
Out = TypeVar("Out")


def at_once(function: Callable[[In], Out], items: Iterable[In]) -> list[Out]:
    """Return what a function that waits for storage gives for each item, in their order."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(function, items))


def read_footers(folder: Location, names: Sequence[str]) -> list[Footer]:
    """Return what each file says of itself.

    Raises:
        CorruptFileError: one was cut short or altered, or is gone.
    """
    return at_once(lambda name: read_footer(folder / name), names)


def named_footers(folder: Location) -> dict[str, Footer]:
    """Return what each Parquet file of a folder says of itself, by name, in their order.

    Raises:
        CorruptFileError: one was cut short or altered.
    """
    names = [name for name, _ in folder.listing(".parquet")]
    return dict(zip(names, read_footers(folder, names), strict=True))


def write_table(artifact: Location, what: str, shared: Mapping[str, Footer] | None = None) -> dict[str, Footer]:
    """Write down what the footers of a folder of an artifact say, and return it.

    Of files with other columns than the first nothing is written.

    Args:
        artifact: the artifact.
        what: name of the folder.
        shared: what is known of files that an earlier artifact shares, by their names here: they are not opened.
    """
    found = _confirmed_footers(artifact / what, shared or {})
    schema = next(iter(found.values())).schema.remove_metadata()
    rows = [
        (name, each.num_rows, each.num_bytes, each.digest, each.metadata.get(DIGEST), each.metadata.get(FIRST_ID))
        for name, each in found.items()
        if each.schema == schema
    ]
    columns = dict(zip(_COLUMNS, map(list, zip(*rows, strict=True)), strict=True))
    table = pa.table(columns).replace_schema_metadata({_SCHEMA_KEY: schema.serialize().to_pybytes()})
    with _table(artifact, what).open_output() as stream:
        pq.write_table(table, stream)
    return found


def listed_footers(artifact: Location, what: str) -> dict[str, Footer]:
    """Return what `named_footers` returns, of our own metadata only the digest of the rows and the first doc_id, from the table
    of an artifact as far as the listing of the folder confirms it.

    Raises:
        CorruptFileError: a file that the table does not describe was cut short or altered.
    """
    return _confirmed_footers(artifact / what, dict(_read_table(artifact, what)))


def _confirmed_footers(folder: Location, known: Mapping[str, Footer]) -> dict[str, Footer]:
    """Return what each file says, in their order; a file that is not known with the size that it has is opened."""
    sizes = {name: int(info.size) for name, info in folder.listing(".parquet")}
    found = {name: each for name, each in known.items() if sizes.get(name) == each.num_bytes}
    unknown = [name for name in sizes if name not in found]
    found |= dict(zip(unknown, read_footers(folder, unknown), strict=True))
    return {name: found[name] for name in sizes}


def _read_table(artifact: Location, what: str) -> Iterator[tuple[str, Footer]]:
    """Yield what the table says; nothing if there is none, as in artifacts of earlier releases, or it is damaged."""
    try:
        with _table(artifact, what).open_input() as stream:
            table = pq.read_table(stream)
    except (FileNotFoundError, pa.ArrowInvalid):
        return
    schema = pa.ipc.read_schema(pa.py_buffer(table.schema.metadata[_SCHEMA_KEY]))
    columns = [table[each].to_pylist() for each in _COLUMNS if each in table.column_names]
    for name, num_rows, num_bytes, digest, *more in zip(*columns, strict=True):
        said = {key: value for key, value in zip((DIGEST, FIRST_ID), more, strict=False) if value is not None}
        yield name, Footer(num_rows, schema, num_bytes, said, digest)


def _table(artifact: Location, what: str) -> Location:
    return artifact / f"{what}.footers.parquet"


def row_counts(footers: dict[str, Footer]) -> RowCounts:
    """Name and number of rows of each file."""
    return tuple((name, footer.num_rows) for name, footer in footers.items())


def check_complete(artifact: Artifact, num_rows: int, what: str) -> None:
    """Refuse an artifact whose files hold more or fewer rows than its manifest says, such as one copied in part.

    Args:
        num_rows: in its files.
        what: they are: passages, vectors; the manifest counts them under this name.

    Raises:
        CorruptFileError: they are not as many; both numbers are named.
    """
    due = artifact.manifest.counts[f"num_{what}"]
    if num_rows != due:
        raise CorruptFileError(
            f"{artifact.location / what} holds {num_rows} {what}, and its manifest says {due}; copy the folder again and "
            f"whole, or remove it and run `readapt {artifact.manifest.stage}` again"
        )


def open_passages(passages: Location, corpus: Artifact, given: str) -> ParquetRows:
    """Open the passages of a corpus. A file whose size is not what `ingest` noted is opened, so a truncated one is found here.

    Args:
        passages: their folder.
        corpus: the artifact that holds it.
        given: what the user calls it.

    Raises:
        CorpusError: there are none, a file lacks a column, or one is there twice.
        CorruptFileError: a file was cut short, or is gone.
    """
    footers = listed_footers(corpus.location, "passages")
    for name, footer in footers.items():
        missing = [column for column in PASSAGE_COLUMNS if column not in footer.schema.names]
        if missing:
            raise CorpusError(
                f"{passages / name} lacks the columns {missing}; it has {footer.schema.names}: ingest the corpus again"
            )
    _check_no_copies(passages, footers)
    rows = ParquetRows(passages, row_counts(footers))
    check_complete(corpus, rows.num_rows, "passages")
    if rows.num_rows == 0:
        raise CorpusError(f"{given!r} has no passages; ingest a corpus that has some")
    return rows


def _check_no_copies(passages: Location, footers: dict[str, Footer]) -> None:
    """Refuse a corpus in which one file is the copy of another: their footers are equal."""
    seen: dict[str, str] = {}
    for name, footer in footers.items():
        if footer.num_rows and footer.digest in seen:
            raise CorpusError(
                f"{passages / name} is a copy of {seen[footer.digest]}, so its doc_ids occur twice; ingest the corpus again"
            )
        seen[footer.digest] = name
