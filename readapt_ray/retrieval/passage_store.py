"""Passages by doc_id, from a copy of an ingested corpus that all processes of a node map into memory.

The copy is an entry of the node's cache (`catalog/cache_entries.py`): `passages.arrow` has titles and texts, uncompressed;
`keys.npy` and `rows.npy` have the row of each doc_id by its hash. The first process makes it, the others wait for it. What
searches read stays in the operating system's page cache, and nothing of the corpus is held by a process. A copy goes when
the last store of it is dropped; the copy of a process that ended is removed when another store is opened, or when the same
one uses it again.
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
"""Of keys and rows."""
_BATCH_BYTES = 32 << 20
"""Of a batch of the copy: few enough to open a hundred million passages, small enough to make."""


class PassageStore:
    """Titles and texts of a corpus.

    Args:
        entry: the folder of its copy.
        use: keeps the copy until it is closed.
        is_split: whether the passages are parts of documents; the id of a document then also names its first passage.
    """

    def __init__(self, entry: Path, use: IO[str], *, is_split: bool = False) -> None:
        self.is_split = is_split
        weakref.finalize(self, _drop, entry, use).atexit = False  # the next start uses the copy again
        table = pa.ipc.open_file(pa.memory_map(str(entry / _TEXTS))).read_all()
        self.columns = {field.name: str(field.type) for field in table.schema if field.name not in TEXT_COLUMNS}
        """The columns that were kept, by which searches can be filtered, with the type of each."""
        self._batches = table.to_batches()
        self._starts = np.cumsum([0, *(len(each) for each in self._batches)])
        self._lookup = IdLookup(*(np.load(entry / name, mmap_mode="r") for name in (_KEYS, _ROWS)))

    @classmethod
    def open(cls, corpus: str, fingerprint: str | None = None) -> "PassageStore":
        """Open the passages of an `ingest` artifact; copy them to this node first, unless they are there.

        Args:
            corpus: its folder.
            fingerprint: of the one that is meant; None takes what is there.

        Raises:
            ArtifactMissingError: `corpus` is not one, or it is unfinished.
            FingerprintMismatchError: it is another one.
            CorruptFileError: a file of it cannot be read.
            StorageError: the disk of the cache has no room for the copy.
        """
        artifact = _open_corpus(corpus, fingerprint)
        files = (artifact.location / "passages").files(".parquet")
        entry = cache_entries.folder_of("passages") / artifact.fingerprint
        with cache_entries.locked(entry):
            use = cache_entries.in_use(entry)
            if not _is_whole(entry):
                _copy(files, entry, artifact)
                _open_corpus(corpus, artifact.fingerprint)  # nobody made it again in the meantime
                _note(entry)
        cache_entries.remove_unused("passages")
        return cls(entry, use, is_split="split" in artifact.manifest.details)

    def __len__(self) -> int:
        """Return the number of passages."""
        return int(self._starts[-1])

    def find(self, doc_ids: Iterable[str]) -> dict[str, Passage]:
        """Return the passages of these doc_ids, without those that the corpus does not have."""
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
            if passage_id == doc_id:  # and not another one with the same hash
                columns = {name: batch[name][place].as_py() for name in self.columns}
                yield doc_id, Passage(doc_id, title, text, columns or None)


def _drop(entry: Path, use: IO[str]) -> None:
    """Remove a copy unless another store has it."""
    use.close()
    cache_entries.remove_unless_used(entry)


def _open_corpus(corpus: str, fingerprint: str | None) -> Artifact:
    """Open an `ingest` artifact; refuse another one than is meant."""
    artifact = open_artifact(corpus, "ingest")
    if fingerprint not in (None, artifact.fingerprint):
        raise FingerprintMismatchError(
            f"corpus {corpus!r} has the fingerprint {artifact.fingerprint}, and {fingerprint} is meant: it was made "
            f"again; start what reads it again"
        )
    return artifact


def _is_whole(entry: Path) -> bool:
    """Return whether the files of a copy have the sizes that were noted when it was done."""
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
    # No file has 0 bytes, so the copy counts as whole only once its real sizes are noted.
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
    """Return about how many bytes a copy will have, by the footers of the corpus."""
    num_bytes = 0
    for file in files:
        with opened(file) as parquet:
            footer = parquet.metadata
        num_bytes += footer.num_rows * _BYTES_PER_ROW
        num_bytes += sum(footer.row_group(each).total_byte_size for each in range(footer.num_row_groups))
    return num_bytes


def _large_batches(files: list[Location], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Yield all passages in batches of some megabytes; titles and texts that are null are empty."""
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
