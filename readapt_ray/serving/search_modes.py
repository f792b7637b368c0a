"""Search by vectors, by words, or by both, whose rankings are fused by reciprocal rank."""

import asyncio
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from readapt_ray.retrieval.fusion import DEPTH, reciprocal_rank_fusion
from readapt_ray.retrieval.parents import first_of_each
from readapt_ray.serving.doc_filter import DocFilter
from readapt_ray.serving.schema import Mode, RequestError, invalid
from readapt_ray.serving.versions import Backend, Found, Ranked

_PASSAGES_A_DOCUMENT = 3
"""Passages that are searched per document that is wanted, where documents were split; each next search is as much deeper."""
_DEEPEST = 100
_MAX_CHARACTERS = 1 << 15
"""Of a query that is searched for its words."""


def check_mode(mode: Mode, backend: Backend) -> None:
    """Refuse a mode that the index cannot do.

    Raises:
        RequestError: it has no BM25 scores.
    """
    if mode != "dense" and not backend.info.has_words:
        message = (
            f"the index was built without BM25, so 'mode' cannot be {mode!r}; build it with `readapt index --bm25`"
        )
        raise RequestError(message, param="mode", code="no_bm25")


def word_queries(query: str | Sequence[str], *, truncate: bool, max_inputs: int) -> list[str]:
    """Return the texts whose words are searched for.

    Args:
        query: of the request.
        truncate: cut what is too long, instead of refusing it.
        max_inputs: texts at most.

    Raises:
        RequestError: a text is empty or too long, or there are too many.
    """
    texts = [query] if isinstance(query, str) else list(query)
    if len(texts) > max_inputs:
        raise invalid(f"'query' has {len(texts):,} texts; this server takes {max_inputs:,} in a request", "query")
    for place, text in enumerate(texts):
        name = "'query'" if isinstance(query, str) else f"'query[{place}]'"
        if not text.strip():
            raise RequestError(f"{name} is empty", param="query", code="empty")
        if len(text) > _MAX_CHARACTERS and not truncate:
            message = f"{name} has {len(text):,} characters; words are searched for in up to {_MAX_CHARACTERS:,}"
            raise invalid(f"{message}; send a shorter query, or leave out 'truncate'", "query")
    return [text[:_MAX_CHARACTERS] for text in texts]


def given_vectors(given: Any, dimension: int) -> NDArray[np.float32]:
    """Return the vectors of a request as [N, dimension].

    Raises:
        RequestError: one has another length, or a number beyond float32.
    """
    listed = given if isinstance(given[0], list) else [given]
    for place, vector in enumerate(listed):
        if len(vector) != dimension:
            message = f"'vector[{place}]' has {len(vector):,} numbers; this index has vectors of {dimension:,}"
            raise invalid(message, "vector")
    with np.errstate(over="ignore"):
        vectors = np.array(listed, dtype=np.float32)
    if not np.isfinite(vectors).all():
        raise invalid("'vector' has a number beyond float32", "vector")
    return vectors


async def search_documents(
    mode: Mode,
    backend: Backend,
    vectors: NDArray[np.float32],
    texts: Sequence[str],
    *,
    top_k: int,
    wanted: DocFilter | None,
) -> Found:
    """Return the best passages of each query, of documents that were split only the best one of each of the k best.

    Args:
        mode, backend, vectors, texts, wanted: as of `search_by_mode`.
        top_k: documents per query.
    """
    search = functools.partial(search_by_mode, mode, backend, vectors, texts, wanted=wanted)
    if not backend.info.is_split:
        return await search(top_k=top_k)
    depth = min(_PASSAGES_A_DOCUMENT * top_k, backend.info.num_vectors)
    while True:
        found = await search(top_k=depth)
        best = [first_of_each((hit.doc_id for hit in ranked), top_k) for ranked in found.ranked]
        lacks = any(len(own) < top_k and len(all_) == depth for own, all_ in zip(best, found.ranked, strict=True))
        if not lacks or depth == backend.info.num_vectors or depth >= _DEEPEST * top_k:
            ranked = [[all_[place] for place in own] for own, all_ in zip(best, found.ranked, strict=True)]
            return Found(ranked, found.missing)
        depth = min(_PASSAGES_A_DOCUMENT * depth, backend.info.num_vectors)


async def search_by_mode(
    mode: Mode,
    backend: Backend,
    vectors: NDArray[np.float32],
    texts: Sequence[str],
    *,
    top_k: int,
    wanted: DocFilter | None,
) -> Found:
    """Return the k best passages of each query.

    Args:
        mode: how to search.
        backend: what searches.
        vectors: [Q, D], of the queries; unused for bm25.
        texts: the queries; unused for dense.
        top_k: k.
        wanted: which passages may be found.
    """
    if mode == "dense":
        return await backend.search(vectors, top_k, wanted)
    if mode == "bm25":
        return await backend.search_words(texts, top_k, wanted)
    depth = max(top_k, DEPTH)
    both = await asyncio.gather(backend.search(vectors, depth, wanted), backend.search_words(texts, depth, wanted))
    rankings = zip(*(each.ranked for each in both), strict=True)
    fused = [reciprocal_rank_fusion([[hit.doc_id for hit in each] for each in pair], top_k) for pair in rankings]
    missing = sorted({name for each in both for name in each.missing})
    return Found([[Ranked(*each) for each in ranked] for ranked in fused], missing)
