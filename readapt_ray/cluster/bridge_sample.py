"""Draw a sample of passages with their old vectors, and encode it with the new model.

In: vectors of a corpus. Out: for each passage of the sample, the vectors of both models. The sample is drawn in runs of
32 neighbouring rows, since reading one vector reads its whole row group of about 1,000. New vectors are written to
`vectors/part-00000.parquet` and so on, 512 per file; a file that exists is not encoded again. The doc_ids of the whole
corpus are read once. Texts and vectors of the sample are held in memory.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from readapt_ray.artifacts import Artifact
from readapt_ray.catalog.encoding import Encoding
from readapt_ray.catalog.models import OpenModel
from readapt_ray.cluster.query_vectors import TextPiece, encode_pieces
from readapt_ray.errors import CorruptFileError
from readapt_ray.retrieval.footers import listed_footers, row_counts
from readapt_ray.retrieval.parquet_rows import ParquetRows
from readapt_ray.retrieval.shard_ledger import open_vectors
from readapt_ray.retrieval.vector_files import (
    VECTOR_COLUMNS,
    RowRange,
    iterate_vectors,
    matrix_of,
    read_footer,
    write_vectors,
)
from readapt_ray.seeds import random_generator
from readapt_ray.storage import Location

_RUN_ROWS = 32
_PIECE_ROWS = 512
_READ_ROWS = 65536


@dataclass(frozen=True)
class NewEncoder:
    """The new model and its encoding."""

    model: OpenModel
    encoding: Encoding
    description: dict[str, Any]
    """The entry `encoder` of manifests: fingerprint, dtype and so on."""


def old_sample(old: Artifact, size: int, seed: int) -> tuple[list[str], NDArray[np.float32]]:
    """Draw a sample of the old vectors; return its doc_ids and vectors, float32 [N, D], in the order of the files.

    The same seed gives the same sample of the same files.

    Args:
        old: the output of the embed stage with the old model.
        size: number of passages to draw; all if the corpus has fewer.
        seed: seed of the draw.

    Raises:
        CorruptFileError: a file of vectors was cut short or altered, or is gone.
    """
    rows = open_vectors(old)
    doc_ids, vectors = matrix_of(rows.take(_drawn(rows.num_rows, size, seed), VECTOR_COLUMNS), rows.folder)
    return doc_ids, np.require(vectors, requirements="W")


def _drawn(num_rows: int, size: int, seed: int) -> NDArray[np.int64]:
    """Draw row numbers in runs of 32, in ascending order."""
    if size >= num_rows:
        return np.arange(num_rows)
    starts = np.arange(0, num_rows, _RUN_ROWS)
    chosen = random_generator(seed, "sample of a bridge").permutation(starts)[: -(-size // _RUN_ROWS) + 1]
    rows = (chosen[:, None] + np.arange(_RUN_ROWS)).ravel()
    return np.sort(rows[rows < num_rows][:size])


def texts_of(corpus: Artifact, doc_ids: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return titles and texts of passages, in the order of `doc_ids`; a missing title is "".

    The doc_ids of the whole corpus are read.

    Raises:
        CorruptFileError: a file of passages was cut short or altered, or lacks a passage.
    """
    folder = corpus.location / "passages"
    passages = ParquetRows(folder, row_counts(listed_footers(corpus.location, "passages")))
    wanted, rows = pa.array(doc_ids, pa.string()), np.full(len(doc_ids), -1, np.int64)
    for first in range(0, passages.num_rows, _READ_ROWS):
        there = np.arange(first, min(first + _READ_ROWS, passages.num_rows))
        places = pc.index_in(passages.take(there, ("doc_id",))["doc_id"], value_set=wanted)
        found = places.is_valid().to_numpy(zero_copy_only=False)
        rows[places.drop_null().to_numpy()] = there[found]
    if (rows < 0).any():
        lost = doc_ids[int(np.flatnonzero(rows < 0)[0])]
        raise CorruptFileError(
            f"{folder} has no passage {lost!r}, which has a vector; ingest and embed the corpus again"
        )
    table = passages.take(rows, ("title", "text"))
    return [title or "" for title in table["title"].to_pylist()], table["text"].to_pylist()


def new_sample(
    doc_ids: Sequence[str],
    corpus: Artifact,
    encoder: NewEncoder,
    target: Location,
    *,
    check: Callable[[int], None],
    progress: Callable[[int, int], None],
) -> NDArray[np.float32]:
    """Encode a sample of passages with the new model, and return the vectors; a stopped run resumes.

    Writes 512 vectors per file. A file that exists is not encoded again, and its model is not checked: the caller must
    clear `target` if the sample or the model changed.

    Args:
        doc_ids: doc_ids of the sample, in the same order in every run.
        corpus: corpus with the texts of these passages.
        encoder: the new model.
        target: folder for the files of vectors.
        check: called with the dimension of each new file's vectors, before the file is written; raises an error if it
            does not fit. Not called if no file is missing.
        progress: called with the number of passages done, and of all passages.

    Returns:
        All vectors, read from the files: float32 [N, D], in the order of the doc_ids.

    Raises:
        CorruptFileError: the corpus lacks a passage, or the files lack a vector of the sample.
    """
    import ray

    names = [f"part-{first // _PIECE_ROWS:05d}.parquet" for first in range(0, len(doc_ids), _PIECE_ROWS)]
    cut = [doc_ids[first : first + _PIECE_ROWS] for first in range(0, len(doc_ids), _PIECE_ROWS)]
    there = {name for name, _ in target.listing(".parquet")}
    missing = [number for number, name in enumerate(names) if name not in there]
    done = sum(len(each) for each, name in zip(cut, names, strict=True) if name in there)
    progress(done, len(doc_ids))
    if missing:
        titles, texts = texts_of(corpus, [each for number in missing for each in cut[number]])
        pieces, first = [], 0
        for number in missing:
            last = first + len(cut[number])
            pieces.append(TextPiece(texts[first:last], titles[first:last]))
            first = last
        encoded = encode_pieces(pieces, encoder.model, encoder.encoding, encoder.description)
        for number, reference in zip(missing, encoded, strict=True):
            vectors = ray.get(reference)
            check(vectors.shape[1])
            metadata = {"encoder": {**encoder.description, "dimension": vectors.shape[1]}}
            write_vectors(target / names[number], cut[number], vectors, dtype="float32", metadata=metadata)
            done += len(vectors)
            progress(done, len(doc_ids))
    return _read(target, names, doc_ids)


def _read(target: Location, names: Sequence[str], doc_ids: Sequence[str]) -> NDArray[np.float32]:
    ranges = [RowRange(name, 0, read_footer(target / name).num_rows) for name in names]
    chunks = list(iterate_vectors(target, ranges))
    written = pa.array([doc_id for ids, _ in chunks for doc_id in ids], pa.string())
    order = pc.index_in(pa.array(doc_ids, pa.string()), value_set=written)
    if order.null_count:
        raise CorruptFileError(
            f"{target} lacks vectors of the sample; remove the folder and run `readapt bridge` again"
        )
    matrix: NDArray[np.float32] = np.concatenate([matrix for _, matrix in chunks])[order.to_numpy()]
    return matrix
