"""Read the footers of many Parquet files in parallel, and check that an artifact is complete.

In: a folder of an artifact. Out: the number of rows of each file. On an object store a footer takes some three requests
of 25 ms, so 32 threads read 24,000 footers per minute. Therefore `ingest` writes a table of the footers of its
passages, and `embed` one of its shards. A file is not opened if the listing of its folder shows the size that the table
has.
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


def map_in_threads(function: Callable[[In], Out], items: Iterable[In]) -> list[Out]:
    """Call a function that waits for storage for each item, in 32 threads, and return the results in order.

    An error of any call is raised.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(function, items))


def read_footers(folder: Location, names: Sequence[str]) -> list[Footer]:
    """Read the footer of each file, in the order of `names`, many at a time.

    Raises:
        CorruptFileError: a file was cut short or altered, or is gone.
    """
    return map_in_threads(lambda name: read_footer(folder / name), names)


def named_footers(folder: Location) -> dict[str, Footer]:
    """Read the footer of each Parquet file of a folder, by name, in the order of names.

    Raises:
        CorruptFileError: a file was cut short or altered.
    """
    names = [name for name, _ in folder.listing(".parquet")]
    return dict(zip(names, read_footers(folder, names), strict=True))


def write_table(artifact: Location, what: str, shared: Mapping[str, Footer] | None = None) -> dict[str, Footer]:
    """Write a table with the footers of a folder of an artifact, and return the footers of all its files by name.

    The table is `passages.footers.parquet` for the folder `passages`. It leaves out files whose columns differ from the
    first file's.

    Args:
        artifact: the artifact.
        what: name of the folder, which has at least one Parquet file.
        shared: footers of files that an earlier artifact shares, by their names here. They are not opened if their size
            is the same here.

    Raises:
        CorruptFileError: a file that was opened was cut short or altered.
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
    """Return the footers of a folder by name, from the table of its artifact if the sizes in the listing agree.

    Other files are opened; all are, if there is no table. A footer from the table has, of our own metadata, only the
    digest of the rows and the first doc_id.

    Args:
        artifact: the artifact.
        what: name of the folder, as in `write_table`.

    Raises:
        CorruptFileError: a file that was opened was cut short or altered.
    """
    return _confirmed_footers(artifact / what, dict(_read_table(artifact, what)))


def _confirmed_footers(folder: Location, known: Mapping[str, Footer]) -> dict[str, Footer]:
    """Return the footer of each file, in the order of the listing; open files that `known` lacks at this size."""
    sizes = {name: int(info.size) for name, info in folder.listing(".parquet")}
    found = {name: each for name, each in known.items() if sizes.get(name) == each.num_bytes}
    unknown = [name for name in sizes if name not in found]
    found |= dict(zip(unknown, read_footers(folder, unknown), strict=True))
    return {name: found[name] for name in sizes}


def _read_table(artifact: Location, what: str) -> Iterator[tuple[str, Footer]]:
    """Yield the footers in the table; none if it is damaged or missing, as in artifacts of older releases."""
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
    """Return name and number of live rows of each file."""
    return tuple((name, footer.num_rows) for name, footer in footers.items())


def check_complete(artifact: Artifact, num_rows: int, what: str) -> None:
    """Refuse an artifact whose files hold more or fewer rows than its manifest says, such as an incomplete copy.

    Args:
        artifact: the artifact.
        num_rows: rows in its files.
        what: passages or vectors: the name of their folder, and of their count in the manifest (`num_passages`).

    Raises:
        CorruptFileError: the numbers differ; the message names both.
    """
    due = artifact.manifest.counts[f"num_{what}"]
    if num_rows != due:
        raise CorruptFileError(
            f"{artifact.location / what} holds {num_rows} {what}, and its manifest says {due}; copy the folder again and "
            f"whole, or remove it and run `readapt {artifact.manifest.stage}` again"
        )


def open_passages(passages: Location, corpus: Artifact, given: str) -> ParquetRows:
    """Open the passages of a corpus, and check that no file is truncated, missing or there twice.

    Only files whose size is not the one that `ingest` stored are opened.

    Args:
        passages: the folder of the passages.
        corpus: the artifact that holds it.
        given: name of the corpus as the user gave it; used in the message.

    Raises:
        CorpusError: there are no passages, a file lacks a column, or a file is the copy of another.
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
    """Refuse a corpus in which one file is the copy of another. Copies have equal digests."""
    seen: dict[str, str] = {}
    for name, footer in footers.items():
        if footer.num_rows and footer.digest in seen:
            raise CorpusError(
                f"{passages / name} is a copy of {seen[footer.digest]}, so its doc_ids occur twice; ingest the corpus again"
            )
        seen[footer.digest] = name
