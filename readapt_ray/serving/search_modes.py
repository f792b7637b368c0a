"""Search by vectors, by words, or by both; both rankings are fused by reciprocal rank."""

import asyncio
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from readapt_ray.retrieval.fusion import DEPTH, reciprocal_rank_fusion
from readapt_ray.retrieval.parents import first_of_each
from readapt_ray.serving.doc_filter import DocFilter
from readapt_ray.serving.schema import MAX_HITS, Mode, RequestError, invalid
from readapt_ray.serving.versions import Backend, Found, Ranked, in_thread_if_large
from readapt_ray.sources.splitting import parent_of

_PASSAGES_PER_DOCUMENT = 3
"""If documents were split, passages to find per wanted document. If that is too few, each next search is deeper by this
factor."""
_DEEPEST = 100
_MAX_CHARACTERS = 1 << 15
"""Maximum number of characters of a query whose words are searched for."""


def check_mode(mode: Mode, backend: Backend) -> None:
    """Refuse a mode that the index does not support; `dense` is always supported.

    Raises:
        RequestError: the mode needs BM25 scores, and the index has none.
    """
    if mode != "dense" and not backend.info.has_words:
        message = (
            f"the index was built without BM25, so 'mode' cannot be {mode!r}; build it with `readapt index --bm25`"
        )
        raise RequestError(message, param="mode", code="no_bm25")


def word_queries(query: str | Sequence[str], *, truncate: bool, max_inputs: int) -> list[str]:
    """Return the texts of a request for a search by words (BM25); each has at most 32,768 characters.

    Args:
        query: a query or a list of queries.
        truncate: cut longer queries, instead of refusing them.
        max_inputs: maximum number of queries.

    Raises:
        RequestError: a text is empty or (without `truncate`) too long, or there are too many.
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


async def search_documents(
    mode: Mode,
    backend: Backend,
    vectors: NDArray[np.float32],
    texts: Sequence[str],
    *,
    top_k: int,
    wanted: DocFilter | None,
) -> Found:
    """Return the k best passages per query; if documents were split, the best passage of each of the k best documents.

    Split documents may take several searches, each deeper, for queries that lack documents. The parts of the index that
    did not answer are in `missing`.

    Args:
        mode, backend, vectors, texts, wanted: as for `search_by_mode`, but bm25 needs `vectors` too: one row per query,
            of any dimension.
        top_k: number of passages per query, or of documents if they were split.
    """
    most = min(backend.info.num_vectors, _DEEPEST * top_k, MAX_HITS)
    fuses_documents = mode == "hybrid" and backend.info.is_split
    depth = max(top_k, DEPTH) if fuses_documents else top_k
    depth = min(_PASSAGES_PER_DOCUMENT * depth, most) if backend.info.is_split else depth
    found: list[list[Ranked]] = [[] for _ in vectors]
    left, missing = np.arange(len(vectors)), set[str]()
    while len(left):
        lacking = []
        for part in _pieces(left, max(depth, DEPTH) if mode == "hybrid" else depth):
            asked = [texts[place] for place in part] if texts else []
            its = await search_by_mode(mode, backend, vectors[part], asked, top_k=depth, wanted=wanted)
            missing.update(its.missing)
            for place, passages in zip(part, its.ranked, strict=True):
                found[place] = _documents(passages, top_k) if backend.info.is_split else passages
                may_lack = fuses_documents or len(passages) == depth
                if len(found[place]) < top_k and may_lack and depth < most:
                    lacking.append(place)
        left, depth = np.array(lacking, np.int64), min(_PASSAGES_PER_DOCUMENT * depth, most)
    return Found(found, sorted(missing))


def _pieces(places: NDArray[np.int64], depth: int) -> Iterator[NDArray[np.int64]]:
    """Split queries into pieces that each find at most `MAX_HITS` passages, since these are Python objects at first."""
    size = max(1, MAX_HITS // max(1, depth))
    yield from (places[first : first + size] for first in range(0, len(places), size))


def _documents(passages: Sequence[Ranked], top_k: int) -> list[Ranked]:
    """Return the best passage of each of the k best documents, best first."""
    return [passages[place] for place in first_of_each((each.doc_id for each in passages), top_k)]


async def search_by_mode(
    mode: Mode,
    backend: Backend,
    vectors: NDArray[np.float32],
    texts: Sequence[str],
    *,
    top_k: int,
    wanted: DocFilter | None,
) -> Found:
    """Search once, and return the k best passages per query; `hybrid` returns only the best passage per split document.

    `hybrid` fuses the 100 best of both rankings, or the k best if k is larger, by reciprocal rank. Its scores are the
    fused ones.

    Args:
        mode: how to search.
        backend: searches by vectors or words.
        vectors: vectors of the queries, float32 [Q, D]; unused for bm25.
        texts: the queries; unused for dense.
        top_k: k.
        wanted: filter that passages must pass; None for all passages.
    """
    if mode == "dense":
        return await backend.search(vectors, top_k, wanted)
    if mode == "bm25":
        return await backend.search_words(texts, top_k, wanted)
    depth = max(top_k, DEPTH)
    both = await asyncio.gather(backend.search(vectors, depth, wanted), backend.search_words(texts, depth, wanted))
    fused = _fused_documents if backend.info.is_split else _fused
    ranked = await in_thread_if_large(len(vectors) * depth, fused, [each.ranked for each in both], top_k)
    return Found(ranked, sorted({name for each in both for name in each.missing}))


def _fused(both: Sequence[list[list[Ranked]]], top_k: int) -> list[list[Ranked]]:
    """Fuse the two rankings of each query by reciprocal rank."""
    rankings = ([[hit.doc_id for hit in each] for each in of_query] for of_query in zip(*both, strict=True))
    return [[Ranked(*each) for each in reciprocal_rank_fusion(of_query, top_k)] for of_query in rankings]


def _fused_documents(both: Sequence[list[list[Ranked]]], top_k: int) -> list[list[Ranked]]:
    """Fuse the two rankings of documents, as `readapt search` does; return each with its best-ranked passage."""
    found = []
    for of_query in zip(*both, strict=True):
        rankings, passages = [], dict[str, tuple[int, str]]()
        for each in of_query:
            best = [each[place].doc_id for place in first_of_each((hit.doc_id for hit in each), len(each))]
            rankings.append([parent_of(doc_id) for doc_id in best])
            for rank, doc_id in enumerate(best):
                passages[parent_of(doc_id)] = min(passages.get(parent_of(doc_id), (rank, doc_id)), (rank, doc_id))
        fused = reciprocal_rank_fusion(rankings, top_k)
        found.append([Ranked(passages[document][1], score) for document, score in fused])
    return found
