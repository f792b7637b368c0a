"""Compare the results of a vector database with exact search over the same vectors.

In: some vectors of the corpus, as queries. Out: the share of the ten best results that the database finds. For the
exact search, the vectors are streamed once: in this process, or by one Ray task per piece.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from readapt_ray.artifacts import Artifact
from readapt_ray.retrieval.parquet_rows import ParquetRows
from readapt_ray.retrieval.vector_files import (
    SHARD_BYTES,
    VECTOR_COLUMNS,
    RowRange,
    cut_into_shards,
    iterate_vectors,
    matrix_of,
)
from readapt_ray.targets.target import Target

TOP_K = 10


@dataclass(frozen=True)
class Agreement:
    """Agreement of a database's ten best results with exact search."""

    num_queries: int
    """Queries that were asked."""
    overlap_at_10: float
    """Share of the ten best of exact search that the database finds; mean over the queries."""
    lowest: float
    """The same share for the worst query."""


def compare(target: Target, source: Artifact, vectors: ParquetRows, num_queries: int, *, is_small: bool) -> Agreement:
    """Measure how many of the 10 best results of exact search the database finds, with stored vectors as queries.

    The queries are evenly spaced over the corpus. Each may find itself, in both searches.

    Args:
        target: the vector database.
        source: the output of the embed stage.
        vectors: its files of vectors.
        num_queries: most queries to ask.
        is_small: run the exact search in this process instead of in Ray tasks.
    """
    rows = np.unique(np.linspace(0, vectors.num_rows - 1, min(num_queries, vectors.num_rows)).astype(np.int64))
    _, queries = matrix_of(vectors.take(rows, VECTOR_COLUMNS), vectors.folder)
    queries = queries.copy()  # torch needs a writable array
    exact = _exact_here(vectors, queries) if is_small else _exact_on_ray(source, vectors, queries)
    found = target.search(queries, TOP_K)
    shares = [len(set(due) & set(got)) / len(due) for due, got in zip(exact, found, strict=True)]
    return Agreement(len(shares), round(float(np.mean(shares)), 4), round(min(shares), 4))


def _exact_here(vectors: ParquetRows, queries: NDArray[np.float32]) -> Sequence[list[str]]:
    from readapt_ray.retrieval.exact import search_exact

    ranges = [RowRange(name, 0, count) for name, count in vectors.counts]
    hits = search_exact(queries, iterate_vectors(vectors.folder, ranges), TOP_K)
    return [[str(name) for name in names] for names in hits.doc_ids]


def _exact_on_ray(source: Artifact, vectors: ParquetRows, queries: NDArray[np.float32]) -> Sequence[list[str]]:
    import ray

    from readapt_ray.cluster import connection
    from readapt_ray.cluster.search_pieces import Pieces
    from readapt_ray.retrieval.merged_rows import merge_rows, ordered_ties

    num_cpus = max(1, connection.connect().num_cpus)
    rows_per_piece = max(1, min(SHARD_BYTES // (4 * queries.shape[1]), -(-vectors.num_rows // num_cpus)))
    contents = [tuple(each) for each in cut_into_shards(vectors.counts, rows_per_piece)]
    pieces = Pieces(source, contents, on_gpus=False, num_at_once=num_cpus)
    best = merge_rows(pieces.search([ray.put(queries)], TOP_K), len(queries), TOP_K)
    distinct, codes = np.unique(best.rows, return_inverse=True)
    names = pieces.names(distinct)
    _, codes = ordered_ties(best.scores, codes.reshape(best.rows.shape), names, TOP_K)
    found = names.to_pylist()
    return [[found[code] for code in row if found[code] is not None] for row in codes]
