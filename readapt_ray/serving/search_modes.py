"""Search by vectors, by words, or by both, whose rankings are fused by reciprocal rank."""

import asyncio
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from readapt_ray.retrieval.fusion import DEPTH, reciprocal_rank_fusion
from readapt_ray.serving.doc_filter import DocFilter
from readapt_ray.serving.schema import Mode, RequestError
from readapt_ray.serving.versions import Backend, Found, Ranked


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
