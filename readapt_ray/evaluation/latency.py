"""Measure the latency of single queries: encoding, and exact search of vectors or words in memory.

In: an encoder, queries, and vectors or a BM25 index. Out: medians in milliseconds. The first query is encoded twice,
since the first time warms the model up.
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
    """Measure the median time of encoding a query and of searching for it, one query at a time.

    Args:
        encoder: the encoder of queries, on its device.
        queries: texts; at least one.
        doc_ids: doc_ids of the N vectors.
        vectors: float32 [N, D].
        top_k: passages per query.
        query_map: the map of a bridge to the vectors, if one is used; its time counts as encoding.

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
    """Measure the median time of a BM25 search in milliseconds, one query at a time.

    Args:
        parts: indexes whose rows follow each other.
        doc_ids: doc_ids of the rows of all parts.
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
