"""Measure how long one query takes alone: encoding it, and searching vectors or words in memory exactly.

In: an encoder, queries, and vectors or an index of words. Out: medians in milliseconds. It costs a query's time for each
query, twice for the first, which warms the model up.
"""

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from readapt_ray.errors import InputError
from readapt_ray.retrieval.bm25 import WordIndex, search_words
from readapt_ray.retrieval.encoder import Encoder
from readapt_ray.retrieval.exact import search_exact
from readapt_ray.retrieval.query_maps import QueryMap


class Latency(NamedTuple):
    """Medians over queries, in milliseconds."""

    encode_ms: float
    search_ms: float


def query_latency(
    encoder: Encoder,
    queries: Sequence[str],
    doc_ids: Sequence[str],
    vectors: NDArray[np.float32],
    *,
    top_k: int = 10,
    query_map: QueryMap | None = None,
) -> Latency:
    """Time queries one by one.

    Args:
        encoder: on its device.
        queries: texts; at least one.
        doc_ids: of the vectors.
        vectors: float32 [N, D].
        top_k: passages per query.
        query_map: of a bridge to the vectors, timed with the encoding.

    Raises:
        InputError: no query was given.
    """
    _check(queries)
    encoder.encode([queries[0]], "query")
    spent = []
    for text in queries:
        started = time.perf_counter()
        vector = encoder.encode([text], "query")
        vector = vector if query_map is None else query_map(vector)
        encoded = time.perf_counter()
        search_exact(vector, [(doc_ids, vectors)], top_k)
        spent.append((encoded - started, time.perf_counter() - encoded))
    encode_ms, search_ms = (1000 * np.median(spent, axis=0)).tolist()
    return Latency(encode_ms, search_ms)


def words_latency(
    parts: Sequence[WordIndex], doc_ids: NDArray[np.object_], queries: Sequence[str], *, top_k: int = 10
) -> float:
    """Time searches by words one by one; the median in milliseconds.

    Args:
        parts: indexes whose rows follow each other.
        doc_ids: of all rows.
        queries: texts; at least one.
        top_k: passages per query.

    Raises:
        InputError: no query was given.
    """
    _check(queries)
    spent = []
    for text in queries:
        started = time.perf_counter()
        search_words(parts, doc_ids, [text], top_k)
        spent.append(time.perf_counter() - started)
    return 1000 * float(np.median(spent))


def _check(queries: Sequence[str]) -> None:
    if not queries:
        raise InputError("no query to time; give at least one")
