"""Read passages from the Parquet files of an ingested corpus.

In: the files. Out: their rows, a batch at a time, so that the corpus is never in memory as a whole.
"""

import contextlib
import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from readapt_ray.artifacts import open_artifact
from readapt_ray.errors import CorruptFileError
from readapt_ray.records import Passage
from readapt_ray.retrieval.parquet_rows import explain_damage
from readapt_ray.sources.splitting import PIECE, first_piece
from readapt_ray.storage import Location

TEXT_COLUMNS = ("doc_id", "title", "text")
_BATCH_ROWS = 16384


def read_batches(file: Location, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Read columns of a file, up to 16,384 rows at a time. A column that the file lacks is left out.

    Raises:
        CorruptFileError: the file is damaged or gone, or lacks one of TEXT_COLUMNS.
    """
    with opened(file) as parquet:
        yield from parquet.iter_batches(_BATCH_ROWS, columns=list(columns))


@contextlib.contextmanager
def opened(file: Location) -> Iterator[pq.ParquetFile]:
    """Open a file of passages, as a context manager.

    Raises:
        CorruptFileError: the file is damaged or gone, or lacks one of TEXT_COLUMNS; also for damage found inside the
            block.
    """
    with explain_damage(file), file.open_input() as stream:
        parquet = pq.ParquetFile(stream)
        if missing := set(TEXT_COLUMNS) - set(parquet.schema_arrow.names):
            raise CorruptFileError(f"{file} lacks the columns {sorted(missing)}; ingest the corpus again")
        yield parquet


@dataclass(frozen=True)
class PassageFiles:
    """The files of an ingested corpus. Each method reads all of them; use `PassageStore` for many lookups."""

    files: list[Location]
    is_split: bool = False
    """Whether the passages are parts of documents; the id of a document then also finds its first passage."""

    @classmethod
    def open(cls, corpus: str) -> "PassageFiles":
        """Open the output of `ingest`.

        Raises:
            ArtifactMissingError: `corpus` is not an ingest artifact, or it is unfinished.
        """
        artifact = open_artifact(corpus, "ingest")
        return cls((artifact.location / "passages").files(".parquet"), "split" in artifact.manifest.details)

    def missing(self, doc_ids: Iterable[str]) -> list[str]:
        """Return the doc_ids that the corpus lacks, each once, in the order given.

        If the corpus is split, the ids of documents are not missing either.

        Raises:
            CorruptFileError: a file cannot be read.
        """
        missing = pa.array(dict.fromkeys(doc_ids), pa.large_string())
        for ids in self._ids():
            there = [ids, pc.replace_substring_regex(ids, pattern=PIECE, replacement="")] if self.is_split else [ids]
            for each in there:
                missing = missing.filter(pc.invert(pc.is_in(missing, each)))
        return [str(each) for each in missing.to_pylist()]

    def documents_of(self, ids: Iterable[str]) -> dict[str, str]:
        """Return the document of each id: for a passage of a split document its parent, else the id itself.

        An id that the corpus lacks is its own document too.

        Raises:
            CorruptFileError: a file cannot be read.
        """
        found = {each: each for each in ids}
        if not self.is_split:
            return found
        wanted = pa.array(list(found), pa.string())
        documents: set[str] = set()
        for file in self.files:
            for batch in read_batches(file, ["doc_id", "parent_id"]):
                documents.update(pc.unique(batch["parent_id"].filter(pc.is_in(batch["parent_id"], wanted))).to_pylist())
                for row in batch.filter(pc.is_in(batch["doc_id"], wanted)).to_pylist():
                    found[row["doc_id"]] = row["parent_id"]
        return found | {each: each for each in documents}

    def has_any(self, passage_ids: Iterable[str]) -> bool:
        """Return whether at least one of the ids is the id of a passage. The id of a split document is not.

        Raises:
            CorruptFileError: a file cannot be read.
        """
        wanted = pa.array(set(passage_ids), pa.large_string())
        return bool(len(wanted)) and any(pc.any(pc.is_in(ids, wanted)).as_py() for ids in self._ids())

    def find(self, doc_ids: Iterable[str]) -> dict[str, Passage]:
        """Return the passages with these doc_ids, by doc_id. A doc_id that the corpus lacks is left out.

        If the corpus is split, the id of a document finds its first passage, which then has that id. Other columns are
        not read.

        Raises:
            CorruptFileError: a file cannot be read.
        """
        wanted = set(doc_ids)
        sought = wanted | {first_piece(each) for each in wanted} if self.is_split else wanted
        rows: dict[str, Passage] = {}
        for file in self.files if sought else ():
            for batch in read_batches(file, TEXT_COLUMNS):
                chosen = pc.is_in(batch["doc_id"].cast(pa.large_string()), pa.array(sought, pa.large_string()))
                for row in batch.filter(chosen).to_pylist():
                    rows[row["doc_id"]] = Passage(row["doc_id"], row["title"] or "", row["text"] or "")
        found = {doc_id: rows[doc_id] for doc_id in wanted & rows.keys()}
        for doc_id in wanted - rows.keys() if self.is_split else ():
            if first_piece(doc_id) in rows:
                found[doc_id] = rows[first_piece(doc_id)]._replace(doc_id=doc_id)
        return found

    def pieces_of(self, doc_ids: Iterable[str]) -> dict[str, list[Passage]]:
        """Return the passages of each document or passage, by the given id.

        The id of a document gives all its passages, in order; the id of a passage gives that passage alone. Ids that
        are not in the corpus are missing from the result.

        Raises:
            CorruptFileError: a file cannot be read.
        """
        wanted = pa.array(set(doc_ids), pa.string())
        columns = [*TEXT_COLUMNS, *(["parent_id"] if self.is_split else [])]
        own: dict[str, list[Passage]] = {}
        alone: dict[str, list[Passage]] = {}
        for file in self.files if len(wanted) else ():
            for batch in read_batches(file, columns):
                chosen = [pc.is_in(batch[name], wanted) for name in columns if name.endswith("_id")]
                for row in batch.filter(functools.reduce(pc.or_, chosen)).to_pylist():
                    passage = Passage(row["doc_id"], row["title"] or "", row["text"] or "")
                    own.setdefault(row.get("parent_id", row["doc_id"]), []).append(passage)
                    alone[row["doc_id"]] = [passage]
        found = alone | own
        return {each: found[each] for each in wanted.to_pylist() if each in found}

    def passage_ids(self, ids: Iterable[str]) -> frozenset[str]:
        """Replace each id of a split document by the ids of all its passages; other ids stay, known or not.

        Raises:
            CorruptFileError: a file cannot be read.
        """
        named = set(ids)
        wanted = pa.array(named, pa.string())
        for file in self.files if self.is_split else ():
            for batch in read_batches(file, ["doc_id", "parent_id"]):
                of_these = batch.filter(pc.is_in(batch["parent_id"], wanted))
                named.difference_update(set(of_these["parent_id"].to_pylist()) - set(of_these["doc_id"].to_pylist()))
                named.update(of_these["doc_id"].to_pylist())
        return frozenset(named)

    def _ids(self) -> Iterator[pa.Array]:
        for file in self.files:
            for batch in read_batches(file, ["doc_id"]):
                yield batch["doc_id"].cast(pa.large_string())
