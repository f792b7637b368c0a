"""Search an index or vectors on Ray, one task per piece, and look up the doc_ids of row numbers.

In: references to query vectors. Out: scores and row numbers, 12 bytes per result; doc_ids are looked up later, only for
the best. A task holds one shard.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from readapt_ray.artifacts import Artifact
from readapt_ray.cluster import autoscaling, on_worker
from readapt_ray.cluster.bounded_tasks import run_bounded
from readapt_ray.retrieval.parquet_rows import ParquetRows
from readapt_ray.retrieval.shard_ledger import open_vectors
from readapt_ray.retrieval.vector_files import SHARD_BYTES, RowRange, cut_into_shards, iterate_vectors
from readapt_ray.storage import Location

if TYPE_CHECKING:
    from readapt_ray.retrieval.exact import Hits

_TASKS_PER_GPU: Final = 4
"""Most tasks per GPU. With several, a GPU that is slow or starts late gets less work."""

Content = tuple[RowRange, ...] | dict[str, Any]
"""Content of a piece: ranges of rows in files of vectors, or the record of an index shard."""


@dataclass(frozen=True)
class _Piece:
    """The part of an artifact that one task searches."""

    number: int
    first: int
    """Number of its first row among the rows of all pieces."""
    artifact: Location
    content: Content


class Pieces:
    """The pieces of an index or of vectors, which tasks search.

    The rows of all pieces are numbered through, in the order of the pieces.

    Args:
        artifact: an index, or the output of the embed stage.
        contents: what each piece holds: records of index shards, or row ranges from `vector_pieces`.
        on_gpus: whether each task of `search` has a GPU.
        num_at_once: most tasks that run at the same time.
    """

    def __init__(self, artifact: Artifact, contents: Sequence[Content], *, on_gpus: bool, num_at_once: int) -> None:
        self._on_gpus, self._room = on_gpus, num_at_once
        self._ends = np.cumsum([0, *map(_num_rows, contents)])
        place = on_worker.absolute(artifact.location)
        self._pieces = [
            _Piece(number, int(self._ends[number]), place, content) for number, content in enumerate(contents)
        ]

    def search(self, queries: Sequence[Any], top_k: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the scores and row numbers of each piece's best rows, [Q, K] each, as the tasks end (in any order).

        `merge_rows` makes one ranking of them.

        Args:
            queries: Ray references to query vectors, float32 [n, D] each; Q is the sum of all n.
            top_k: results per query and piece; an unfilled result has the row -1.
        """
        import ray

        each = {"CPU": 1, "GPU": int(self._on_gpus)}
        task = ray.remote(num_cpus=each["CPU"], num_gpus=each["GPU"])(_search_piece)
        device = "cuda" if self._on_gpus else "cpu"
        with autoscaling.requested(min(len(self._pieces), self._room), each, least=1):
            yield from run_bounded(
                lambda piece: task.remote(piece, list(queries), top_k, device), self._pieces, num_at_once=self._room
            )

    def search_words(
        self, texts: Sequence[str], sha256s: dict[str, str], top_k: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the scores and row numbers that each task found by BM25 in an index, as `search` does.

        Args:
            texts: Q queries.
            sha256s: SHA-256 of the file of BM25 scores of each index shard, by the name of the shard.
            top_k: results per query.
        """
        import ray

        task = ray.remote(num_cpus=1)(_search_words)
        yield from run_bounded(
            lambda piece: task.remote(piece, list(texts), sha256s, top_k), self._pieces, num_at_once=self._room
        )

    def names(self, rows: np.ndarray) -> pa.Array:
        """Return the doc_ids of row numbers among all pieces, in the same order; null for row -1 (no result).

        Args:
            rows: row numbers, ascending.
        """
        import ray

        task = ray.remote(num_cpus=1)(_names)
        bounds = np.searchsorted(rows, self._ends)
        asked = [
            (piece, rows[low:high] - piece.first)
            for piece, (low, high) in zip(self._pieces, itertools.pairwise(bounds), strict=True)
            if high > low
        ]
        found = dict(run_bounded(lambda arguments: task.remote(*arguments), asked, num_at_once=self._room))
        unknown = pa.nulls(int(bounds[0]), pa.string())
        return pa.concat_arrays([unknown, *(found[number] for number in sorted(found))])


def vector_pieces(vectors: Artifact, num_at_once: int, *, on_gpus: bool) -> list[Content]:
    """Cut vectors into pieces for the tasks of an exact search: tuples of row ranges.

    A task on a GPU starts a process with CUDA, which takes seconds. So a GPU gets at most four tasks, and each streams
    its vectors.

    Args:
        vectors: the output of the embed stage.
        num_at_once: number of tasks that search at the same time; there are about this many pieces, or more.
        on_gpus: whether each task has a GPU.

    Raises:
        CorruptFileError: a file of vectors was cut short or altered, or is gone.
    """
    counts = open_vectors(vectors).counts
    num_vectors = sum(count for _, count in counts)
    most = max(1, SHARD_BYTES // (4 * int(vectors.manifest.details["encoder"]["dimension"])))
    rows = min(most, max(1, -(-num_vectors // num_at_once)))
    if on_gpus:
        rows = max(rows, -(-num_vectors // (_TASKS_PER_GPU * num_at_once)))
    return [tuple(each) for each in cut_into_shards(counts, rows)]


def _num_rows(content: Content) -> int:
    return int(content["num_vectors"]) if isinstance(content, dict) else sum(each.num_rows for each in content)


def _search_piece(piece: _Piece, queries: Sequence[Any], top_k: int, device: str) -> tuple[np.ndarray, np.ndarray]:
    """Search an index shard with FAISS, or ranges of vectors exactly on a device, in a Ray task.

    Returns:
        Scores [Q, K], and row numbers among all pieces [Q, K] (-1 for no result): 12 bytes per result are sent.
    """
    import ray

    vectors = np.concatenate([ray.get(each) for each in queries])
    if isinstance(piece.content, dict):
        on_worker.faiss_on_threads(1)
        from readapt_ray.retrieval.index_files import ShardRecord, read_shard

        shard = read_shard(piece.artifact / "shards", ShardRecord(**piece.content))
        hits, doc_ids = shard.search(vectors, top_k), pa.array(shard.doc_ids, pa.string())
    else:
        import torch

        from readapt_ray.retrieval.exact import search_exact

        torch.set_num_threads(1)
        names: list[pa.Array] = []
        ranges = piece.content

        def chunks() -> Iterator[tuple[list[str], np.ndarray]]:
            for ids, matrix in iterate_vectors(piece.artifact / "vectors", ranges):
                names.append(pa.array(ids, pa.string()))
                yield ids, matrix

        hits = search_exact(vectors, chunks(), top_k, device=device)
        doc_ids = pa.concat_arrays(names)
    return _numbered(hits, doc_ids, piece)


def _search_words(
    piece: _Piece, texts: Sequence[str], sha256s: dict[str, str], top_k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Search an index shard by BM25, in a Ray task; the result is as in `_search_piece`."""
    from readapt_ray.retrieval.bm25 import search_words
    from readapt_ray.retrieval.index_files import ShardRecord, read_ids, read_words

    assert isinstance(piece.content, dict)
    record = ShardRecord(**piece.content)
    folder = piece.artifact / "shards"
    doc_ids, _ = read_ids(folder, record)
    hits = search_words([read_words(folder, record.name, sha256s[record.name])], doc_ids, texts, top_k)
    return _numbered(hits, pa.array(doc_ids, pa.string()), piece)


def _numbered(hits: "Hits", doc_ids: pa.Array, piece: _Piece) -> tuple[np.ndarray, np.ndarray]:
    """Return scores and row numbers among all pieces, [Q, K] each."""
    found = pc.index_in(pa.array(hits.doc_ids.ravel(), pa.string()), value_set=doc_ids)
    rows = found.fill_null(0).to_numpy().astype(np.int64).reshape(hits.scores.shape) + piece.first
    return hits.scores, np.where(hits.scores > -np.inf, rows, -1)


def _names(piece: _Piece, rows: np.ndarray) -> tuple[int, pa.Array]:
    """Return the number of a piece and the doc_ids of some of its rows, in a Ray task."""
    if isinstance(piece.content, dict):
        from readapt_ray.retrieval.index_files import ShardRecord, read_ids

        doc_ids, _ = read_ids(piece.artifact / "shards", ShardRecord(**piece.content))
        return piece.number, pa.array(doc_ids[rows], pa.string())
    starts = np.cumsum([0, *(each.num_rows for each in piece.content)])
    found = []
    for each, (low, high) in zip(piece.content, itertools.pairwise(starts), strict=True):
        own = rows[np.searchsorted(rows, low) : np.searchsorted(rows, high)] - low
        if len(own):
            whole = ParquetRows(piece.artifact / "vectors", ((each.name, each.start + each.num_rows),))
            found.append(whole.take(own + each.start, ("doc_id",))["doc_id"].combine_chunks())
    return piece.number, pa.concat_arrays(found)
