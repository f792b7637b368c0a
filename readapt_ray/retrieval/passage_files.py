"""Read some passages, or all, from the Parquet files of an ingested corpus.

Enters: the files. Leaves: their rows, a batch at a time; nothing of a corpus stays in memory.
"""

import contextlib
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
    """Yield these columns of a file, some thousand rows at a time.

    Raises:
        CorruptFileError: the file is damaged or gone, or lacks one of TEXT_COLUMNS.
    """
    with opened(file) as parquet:
        yield from parquet.iter_batches(_BATCH_ROWS, columns=list(columns))


@contextlib.contextmanager
def opened(file: Location) -> Iterator[pq.ParquetFile]:
    """Open a file of passages.

    Raises:
        CorruptFileError: the file is damaged or gone, or lacks one of TEXT_COLUMNS.
    """
    with explain_damage(file), file.open_input() as stream:
        parquet = pq.ParquetFile(stream)
        if missing := set(TEXT_COLUMNS) - set(parquet.schema_arrow.names):
            raise CorruptFileError(f"{file} lacks the columns {sorted(missing)}; ingest the corpus again")
        yield parquet


@dataclass(frozen=True)
class PassageFiles:
    """The files of an ingested corpus, which are read once per question; `PassageStore` is for many questions."""

    files: list[Location]
    is_split: bool = False
    """Whether the passages are parts of documents; the id of a document then also names its first passage."""

    @classmethod
    def open(cls, corpus: str) -> "PassageFiles":
        """Open the output of `ingest`.

        Raises:
            ArtifactMissingError: `corpus` is not one, or it is unfinished.
        """
        artifact = open_artifact(corpus, "ingest")
        return cls((artifact.location / "passages").files(".parquet"), "split" in artifact.manifest.details)

    def missing(self, doc_ids: Iterable[str]) -> list[str]:
        """Return those of the doc_ids that the corpus does not have, each once, in their order.

        Raises:
            CorruptFileError: a file cannot be read.
        """
        missing = pa.array(dict.fromkeys(doc_ids), pa.large_string())
        for ids in self._ids():
            there = [ids, pc.replace_substring_regex(ids, pattern=PIECE, replacement="")] if self.is_split else [ids]
            for each in there:
                missing = missing.filter(pc.invert(pc.is_in(missing, each)))
        return [str(each) for each in missing.to_pylist()]

    def has_any(self, passage_ids: Iterable[str]) -> bool:
        """Return whether one of these is the id of a passage; that of a document which was split is none.

        Raises:
            CorruptFileError: a file cannot be read.
        """
        wanted = pa.array(set(passage_ids), pa.large_string())
        return bool(len(wanted)) and any(pc.any(pc.is_in(ids, wanted)).as_py() for ids in self._ids())

    def find(self, doc_ids: Iterable[str]) -> dict[str, Passage]:
        """Return the passages of these doc_ids.

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

    def _ids(self) -> Iterator[pa.Array]:
        for file in self.files:
            for batch in read_batches(file, ["doc_id"]):
                yield batch["doc_id"].cast(pa.large_string())
