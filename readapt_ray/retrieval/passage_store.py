"""Passages by doc_id, from the Parquet files of an ingested corpus, without holding their texts.

In memory lie the sorted doc_ids and 8 bytes for each; a text is read with its row group when it is
asked for, and the row groups of late are kept.
"""

import bisect
import functools
import logging
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from readapt_ray.artifacts import open_artifact
from readapt_ray.errors import CorruptFileError, FingerprintMismatchError
from readapt_ray.records import Passage
from readapt_ray.retrieval.kept_columns import kept_columns
from readapt_ray.sources.splitting import PIECE
from readapt_ray.storage import Location

logger = logging.getLogger("readapt_ray")

_KEPT_ROW_GROUPS = 64


class PassageStore:
    """Titles and texts of a corpus."""

    def __init__(self, files: list[Location], *, is_split: bool = False) -> None:
        """Read the doc_ids of Parquet files with the columns of `Passage`.

        `is_split` says that the passages are parts of documents: the ids of these stand for their first passages.

        Raises:
            CorruptFileError: a file cannot be read.
        """
        self.is_split = is_split
        self._groups: list[tuple[Location, int]] = []
        ids: list[pa.Array] = [pa.array([], pa.string())]
        starts = [0]
        for file in files:
            for group, rows in enumerate(_read_ids(file)):
                self._groups.append((file, group))
                ids.append(rows)
                starts.append(starts[-1] + len(rows))
        self._starts = np.array(starts)
        doc_ids = pa.concat_arrays([each.cast(pa.large_string()) for each in ids])
        self._order = pc.sort_indices(doc_ids).to_numpy()
        self._sorted = doc_ids.take(pa.array(self._order))
        self.columns = {name: str(kind) for name, kind in kept_columns(files).items()}
        """The columns that were kept, by which searches can be filtered, with the type of each."""
        self._row_group = functools.lru_cache(maxsize=_KEPT_ROW_GROUPS)(self._read_row_group)

    @classmethod
    def open(cls, corpus: str, fingerprint: str | None = None) -> "PassageStore":
        """The passages of an `ingest` artifact.

        Args:
            corpus: its folder.
            fingerprint: of the one that is meant; None takes what lies there.

        Raises:
            ArtifactMissingError: `corpus` is not one, or it is unfinished.
            FingerprintMismatchError: it is another one.
        """
        artifact = open_artifact(corpus, "ingest")
        if fingerprint not in (None, artifact.fingerprint):
            raise FingerprintMismatchError(
                f"corpus {corpus!r} has the fingerprint {artifact.fingerprint}, and {fingerprint} is meant: it was made "
                f"again; start what reads it again"
            )
        return cls((artifact.location / "passages").files(".parquet"), is_split="split" in artifact.manifest.details)

    def __len__(self) -> int:
        """The number of passages."""
        return len(self._sorted)

    def find(self, doc_ids: Iterable[str]) -> dict[str, Passage]:
        """Those of the passages that the corpus has; none whose file has other rows by now, because it was made again."""
        found = {}
        for doc_id in doc_ids:
            place = self._place(doc_id)
            if place is None and self.is_split:
                first = self.find([f"{doc_id}#1"]).get(f"{doc_id}#1") if self.has_passage(f"{doc_id}#1") else None
                if first is not None:
                    found[doc_id] = first._replace(doc_id=doc_id)
            if place is not None:
                row = int(self._order[place])
                group = int(np.searchsorted(self._starts, row, side="right")) - 1
                passage = _passage(self._row_group(group), row - int(self._starts[group]))
                if passage is None or passage.doc_id != doc_id:
                    logger.warning(
                        "%s no longer has %r where it was: it was made again", self._groups[group][0], doc_id
                    )
                else:
                    found[doc_id] = passage
        return found

    def has_passage(self, doc_id: str) -> bool:
        """Whether a passage has this id; a document that was split is none."""
        return self._place(doc_id) is not None

    def _place(self, doc_id: str) -> int | None:
        place = bisect.bisect_left(range(len(self)), doc_id, key=lambda at: self._sorted[at].as_py())
        return place if place < len(self) and self._sorted[place].as_py() == doc_id else None

    def missing(self, doc_ids: Iterable[str]) -> list[str]:
        """Those of the doc_ids that the corpus has no passage for, each once, in their order."""
        wanted = pa.array(dict.fromkeys(doc_ids), pa.large_string())
        there = self._sorted
        if self.is_split:
            there = pa.concat_arrays([there, pc.replace_substring_regex(there, pattern=PIECE, replacement="")])
        return [str(each) for each in wanted.filter(pc.invert(pc.is_in(wanted, there))).to_pylist()]

    def _read_row_group(self, index: int) -> pa.Table:
        file, group = self._groups[index]
        with file.open_input() as stream:
            return pq.ParquetFile(stream).read_row_group(group, columns=["doc_id", "title", "text", *self.columns])


def _passage(rows: pa.Table, at: int) -> Passage | None:
    """That of a row; None where there are fewer."""
    if at >= len(rows):
        return None
    doc_id, title, text = (rows[name][at].as_py() for name in ("doc_id", "title", "text"))
    others = rows.column_names[3:]
    return Passage(doc_id, title or "", text or "", {name: rows[name][at].as_py() for name in others} or None)


def _read_ids(file: Location) -> list[pa.Array]:
    """The doc_ids of each row group."""
    try:
        with file.open_input() as stream:
            parquet = pq.ParquetFile(stream)
            missing = {"doc_id", "title", "text"} - set(parquet.schema_arrow.names)
            if missing:
                raise CorruptFileError(f"{file} lacks the columns {sorted(missing)}; ingest the corpus again")
            return [
                parquet.read_row_group(group, columns=["doc_id"])["doc_id"].combine_chunks()
                for group in range(parquet.num_row_groups)
            ]
    except pa.ArrowInvalid as error:
        raise CorruptFileError(f"{file} is not a whole Parquet file ({error}); ingest the corpus again") from error
