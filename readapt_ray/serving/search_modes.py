"""Search by vectors, by words, or by both, whose rankings are fused by reciprocal rank."""

import asyncio
import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from readapt_ray.retrieval.fusion import DEPTH, reciprocal_rank_fusion
from readapt_ray.retrieval.parents import first_of_each
from readapt_ray.serving.doc_filter import DocFilter
from readapt_ray.serving.schema import Mode, RequestError
from readapt_ray.serving.versions import Backend, Found, Ranked

_PASSAGES_A_DOCUMENT = 3
"""Passages that are searched per document that is wanted, where documents were split; each next search is as much deeper."""
_DEEPEST = 100


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
