"""Look up passages by doc_id, in a copy of an ingested corpus that all processes of a node map into memory.

The copy is an entry of the node's cache (`catalog/cache_entries.py`). `passages.arrow` has titles and texts,
uncompressed; `keys.npy` and `rows.npy` map the hash of each doc_id to its row. The first process makes the copy; the
others wait for it. Pages that searches read stay in the operating system's page cache; the process itself holds nothing
of the corpus. A copy is removed when the last store of it is dropped. If a process ended without that, the copy is
removed when another store is opened, or used again by a store of the same corpus.
"""

import logging
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa

from readapt_ray.artifacts import Artifact, open_artifact
from readapt_ray.catalog import cache_entries
from readapt_ray.errors import FingerprintMismatchError
from readapt_ray.records import Passage
from readapt_ray.retrieval.id_lookup import IdLookup, id_keys
from readapt_ray.retrieval.kept_columns import kept_columns
from readapt_ray.retrieval.passage_files import TEXT_COLUMNS, opened, read_batches
from readapt_ray.sources.splitting import first_piece
from readapt_ray.storage import Location

logger = logging.getLogger("readapt_ray")

_TEXTS, _KEYS, _ROWS = "passages.arrow", "keys.npy", "rows.npy"
_BYTES_PER_ROW = 16
"""Bytes per passage in `keys.npy` and `rows.npy`."""
_BATCH_BYTES = 32 << 20
"""Bytes per batch of the copy: large, so that a corpus of 100 million passages has few batches to open."""


class PassageStore:
    """Titles and texts of a corpus, found by doc_id.

    Args:
        entry: the folder of the copy.
        use: an open lock file; the copy is kept until it is closed.
        is_split: whether the passages are parts of documents; the id of a document then also finds its first passage.
    """

    def __init__(self, entry: Path, use: IO[str], *, is_split: bool = False) -> None:
        self.is_split = is_split
        weakref.finalize(self, _drop, entry, use).atexit = False  # keep the copy at exit, for the next start
        table = pa.ipc.open_file(pa.memory_map(str(entry / _TEXTS))).read_all()
        self.columns = {field.name: str(field.type) for field in table.schema if field.name not in TEXT_COLUMNS}
        """Name and Arrow type of each column by which searches can be filtered."""
        self._batches = table.to_batches()
        self._starts = np.cumsum([0, *(len(each) for each in self._batches)])
        self._lookup = IdLookup(*(np.load(entry / name, mmap_mode="r") for name in (_KEYS, _ROWS)))

    @classmethod
    def open(cls, corpus: str, fingerprint: str | None = None) -> "PassageStore":
        """Open the passages of an `ingest` artifact; copy them to this node first, unless a copy exists.

        Args:
            corpus: its folder.
            fingerprint: the fingerprint that the artifact must have; None accepts any.

        Raises:
            ArtifactMissingError: `corpus` is not an ingest artifact, or it is unfinished.
            FingerprintMismatchError: it has another fingerprint.
            CorruptFileError: a file of it cannot be read.
            StorageError: the disk of the cache has no room for the copy.
        """
        artifact = _open_corpus(corpus, fingerprint)
        files = (artifact.location / "passages").files(".parquet")
        entry = cache_entries.folder_of("passages") / artifact.fingerprint
        with cache_entries.locked(entry):
            use = cache_entries.open_use_lock(entry)
            if not _is_whole(entry):
                _copy(files, entry, artifact)
                _open_corpus(corpus, artifact.fingerprint)  # refuse a corpus that was made again meanwhile
                _note(entry)
        cache_entries.remove_unused("passages")
        return cls(entry, use, is_split="split" in artifact.manifest.details)

    def __len__(self) -> int:
        """Return the number of passages."""
        return int(self._starts[-1])

    def find(self, doc_ids: Iterable[str]) -> dict[str, Passage]:
        """Return the passages with these doc_ids, by doc_id, with their filterable columns.

        A doc_id that the corpus lacks is left out. If the corpus is split, the id of a document finds its first
        passage, which then has that id.
        """
        wanted = list(doc_ids)
        found = dict(self._found(wanted))
        if self.is_split:
            documents = {first_piece(each): each for each in wanted if each not in found}
            for passage_id, passage in self._found(list(documents)):
                found[documents[passage_id]] = passage._replace(doc_id=documents[passage_id])
        return found

    def _found(self, passage_ids: list[str]) -> Iterator[tuple[str, Passage]]:
        rows, is_there = self._lookup.find(passage_ids)
        for doc_id, row in zip(np.array(passage_ids, object)[is_there], rows[is_there].astype(np.int64), strict=True):
            number = int(np.searchsorted(self._starts, row, side="right")) - 1
            batch, place = self._batches[number], row - self._starts[number]
            passage_id, title, text = (batch[name][place].as_py() for name in TEXT_COLUMNS)
            if passage_id == doc_id:  # not another doc_id with the same hash
                columns = {name: _as_python(batch[name][place]) for name in self.columns}
                yield doc_id, Passage(doc_id, title, text, columns or None)


def _as_python(value: pa.Scalar) -> object:
    """Return a value of Arrow as Python's; a time that Python cannot hold (year 0, year 12023) as text."""
    try:
        return value.as_py()
    except (OverflowError, ValueError):
        if pa.types.is_list(value.type) or pa.types.is_large_list(value.type):
            return [_as_python(each) for each in value.values]
        return value.cast(pa.string()).as_py()


def _drop(entry: Path, use: IO[str]) -> None:
    """Remove a copy, unless another store uses it."""
    use.close()
    cache_entries.remove_unless_used(entry)


def _open_corpus(corpus: str, fingerprint: str | None) -> Artifact:
    """Open an `ingest` artifact; refuse one with another fingerprint."""
    artifact = open_artifact(corpus, "ingest")
    if fingerprint not in (None, artifact.fingerprint):
        raise FingerprintMismatchError(
            f"corpus {corpus!r} has the fingerprint {artifact.fingerprint}, and {fingerprint} is meant: it was made "
            f"again; start what reads it again"
        )
    return artifact


def _is_whole(entry: Path) -> bool:
    """Return whether the files of a copy have the sizes that were stored when it was complete."""
    noted = cache_entries.noted_files(entry)
    return bool(noted) and all(
        (entry / name).is_file() and (entry / name).stat().st_size == each["size_bytes"] for name, each in noted.items()
    )


def _note(entry: Path) -> None:
    sizes = {name: (entry / name).stat().st_size for name in (_TEXTS, _KEYS, _ROWS)}
    cache_entries.note_files(entry, {name: {"size_bytes": size} for name, size in sizes.items()})


def _copy(files: list[Location], entry: Path, corpus: Artifact) -> None:
    """Write the files of a copy. Call it inside `cache_entries.locked`."""
    cache_entries.remove_files(entry)
    num_bytes = _planned_bytes(files)
    # No file has 0 bytes, so the copy counts as complete only after `_note` stored its real sizes.
    cache_entries.reserve(entry, {_TEXTS: num_bytes, _KEYS: 0, _ROWS: 0}, f"a copy of the texts of {corpus.uri}")
    logger.info("copying the texts of %s to %s (about %.1f GB)", corpus.uri, entry, num_bytes / 1e9)
    keys = []
    folder = Location(str(entry))
    schema = pa.schema({**dict.fromkeys(TEXT_COLUMNS, pa.large_string()), **kept_columns(files)})
    with (folder / _TEXTS).open_output() as stream, pa.ipc.new_file(stream, schema) as writer:
        for batch in _large_batches(files, schema):
            keys.append(id_keys(batch["doc_id"].to_pylist()))
            writer.write_batch(batch)
    lookup = IdLookup.sort(np.concatenate([np.zeros(0, np.uint64), *keys]))
    for name, array in ((_KEYS, lookup.keys), (_ROWS, lookup.values)):
        with (folder / name).open_output() as stream:
            np.save(stream, array)


def _planned_bytes(files: list[Location]) -> int:
    """Estimate the bytes of a copy from the footers of the corpus."""
    num_bytes = 0
    for file in files:
        with opened(file) as parquet:
            footer = parquet.metadata
        num_bytes += footer.num_rows * _BYTES_PER_ROW
        num_bytes += sum(footer.row_group(each).total_byte_size for each in range(footer.num_row_groups))
    return num_bytes


def _large_batches(files: list[Location], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Yield all passages in batches of some 32 MiB; null titles and texts become empty."""
    gathered: list[pa.RecordBatch] = []
    for file in files:
        for batch in read_batches(file, schema.names):
            columns = [batch[field.name].cast(field.type) for field in schema]
            columns[: len(TEXT_COLUMNS)] = [each.fill_null("") for each in columns[: len(TEXT_COLUMNS)]]
            gathered.append(pa.record_batch(columns, schema=schema))
            if sum(each.nbytes for each in gathered) >= _BATCH_BYTES:
                yield pa.concat_batches(gathered)
                gathered = []
    if gathered:
        yield pa.concat_batches(gathered)
