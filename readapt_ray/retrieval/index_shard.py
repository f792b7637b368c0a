"""One FAISS index in memory: build it from vectors, and search it with ties broken by doc_id.

In: vectors with their doc_ids, or queries. Out: the index, or the best of each query. Memory for `flat` is 4 bytes
per number.
"""

import contextlib
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from readapt_ray.errors import InputError
from readapt_ray.retrieval.bm25 import WordIndex
from readapt_ray.retrieval.device_index import DeviceIndex
from readapt_ray.retrieval.exact import Hits, TopK, check_queries, search_exact
from readapt_ray.retrieval.faiss_build import faiss, flat_vectors, train
from readapt_ray.retrieval.index_kinds import TRAINING_BYTES

_untyped: Any = faiss
"""FAISS' own types do not know how Python calls its constructors."""
DELETED = ""
"""Stands for the doc_id of a vector that is no longer found."""
_TRAINING_ROWS = 65_536
_TRAINING_ROWS_PER_LIST = 64
_RUN_ROWS = 128
_LEAST_TOGETHER = 8
"""Queries from which on torch searches flat vectors faster than FAISS, whose matrix product is slow on some CPUs: two cores of an
AMD EPYC (Zen 4) search 1,000,000 vectors of 768 numbers for 64 queries in 6.3 s by FAISS and in .9 s by torch, for one in .2 s."""
_BLOCK_ROWS = 4096


@dataclass(frozen=True)
class IndexShard:
    """A shard in memory: an index, and the doc_id of each of its vectors."""

    index: Any
    """FAISS's, or a DeviceIndex."""
    doc_ids: NDArray[np.object_]
    """[N]; empty where a passage was deleted."""
    hashes: bytes = b""
    """16 bytes a vector, of the content of its passage; empty where nothing is known of any."""
    trained: str | None = None
    """What its lists and codes were trained as. Shards of one training can be merged; None if nothing is known."""
    words: tuple[WordIndex, ...] = ()
    """The BM25 scores of its passages, in parts whose rows follow each other; none where they are not wanted."""

    @functools.cached_property
    def _deleted(self) -> NDArray[np.bool_]:
        return np.asarray(self.doc_ids == DELETED)

    @functools.cached_property
    def _any_deleted(self) -> bool:
        return bool(self._deleted.any())

    def search(self, queries: NDArray[np.float32], top_k: int) -> Hits:
        """Return the k best of this shard, ties by doc_id.

        A query that finds less than k, because it looked at too little of the index or deleted vectors took
        places, is asked again and looks further, until it has k or all that there are.

        Raises:
            InputError: the dimensions differ, or top_k is under 1.
        """
        check_queries(queries, self.index.d)
        if isinstance(self.index, DeviceIndex):
            return self.index.search(queries, top_k)
        if len(queries) >= _LEAST_TOGETHER and (vectors := flat_vectors(self.index)) is not None:
            return search_exact(queries, self._live(vectors), top_k)
        hits = self._best(self.index, None, queries, top_k)
        num_due = min(top_k, len(self.doc_ids) - np.count_nonzero(self._deleted))
        for index, parameters in _ever_further(self.index):
            lacking = np.flatnonzero(np.count_nonzero(hits.scores > -np.inf, axis=1) < num_due)
            if not len(lacking):
                break
            found = self._best(index, parameters, queries[lacking], top_k)
            hits.scores[lacking], hits.doc_ids[lacking] = found.scores, found.doc_ids
        return hits

    def _live(self, vectors: NDArray[Any]) -> Iterator[tuple[NDArray[np.object_], NDArray[Any]]]:
        """Yield doc_ids and vectors that are not deleted, in blocks."""
        for first in range(0, len(vectors), _BLOCK_ROWS):
            block = slice(first, first + _BLOCK_ROWS)
            if self._any_deleted:
                live = ~self._deleted[block]
                yield self.doc_ids[block][live], vectors[block][live]
            else:
                yield self.doc_ids[block], vectors[block]

    def search_among(self, queries: NDArray[np.float32], top_k: int, rows: NDArray[np.int64]) -> Hits:
        """Return the k best of some rows of this shard, ties by doc_id; an approximate index may find fewer.

        The fewer rows there are, the more lists are probed and the more of a graph is visited.

        Args:
            queries: [Q, D].
            top_k: k.
            rows: rising; none of them is deleted.

        Raises:
            InputError: the dimensions differ, or top_k is under 1.
        """
        check_queries(queries, self.index.d)
        if isinstance(self.index, DeviceIndex):
            return self.index.search(queries, top_k, rows)
        chosen = np.zeros(self.index.ntotal, bool)
        chosen[rows] = True
        selector = _untyped.IDSelectorBitmap(np.packbits(chosen, bitorder="little"))
        return self._best(self.index, _among(self.index, selector, len(chosen) / max(1, len(rows))), queries, top_k)

    def _best(self, index: Any, parameters: Any, queries: NDArray[np.float32], top_k: int) -> Hits:
        """Return the k best of what one search looks at.

        FAISS breaks ties as it likes, so one more than k is asked for, and where the last place may be
        tied with the one after it, or deleted vectors took places, more, until k have an end.
        """
        best = TopK(len(queries), top_k)
        pending = np.arange(len(queries))
        wanted = top_k + 1
        scores = np.full((len(queries), 0), -np.inf, np.float32)
        doc_ids = np.empty((len(queries), 0), object)
        while len(pending):
            depth = min(wanted, self.index.ntotal)
            asked = np.ascontiguousarray(queries[pending], np.float32)
            found, rows = index.search(asked, depth, params=parameters)
            if wanted == top_k + 1 and (rows >= 0).all() and not self._any_deleted and _are_falling(found):
                return Hits(found[:, :top_k].copy(), self.doc_ids[rows[:, :top_k]])
            kept = np.where((rows < 0) | self._deleted[rows], -np.inf, found).astype(np.float32)
            scores, doc_ids = _widened(scores, doc_ids, depth)
            scores[pending], doc_ids[pending] = kept, self.doc_ids[rows]
            if depth == self.index.ntotal:
                break
            kth = -np.partition(-kept, top_k - 1, axis=1)[:, top_k - 1]
            pending = pending[(rows[:, -1] >= 0) & (kth <= found[:, -1])]
            wanted *= 2
        best.add(scores, doc_ids)
        return best.hits()


def _are_falling(scores: NDArray[np.float32]) -> bool:
    """Return whether no two results of a query tie, so that FAISS's order is ours."""
    return bool((scores[:, 1:] < scores[:, :-1]).all())


def _ever_further(index: Any) -> Iterator[tuple[Any, Any]]:
    """Yield what to search and with which parameters, to look at more of an index than it is set to, and ever more.

    Inverted lists are probed twice as many, up to all. A graph takes efSearch = k at least by itself, but may
    have parts that no link leads to: its vectors are scanned.
    """
    lists = faiss.try_extract_index_ivf(index)
    if lists is not None:
        num_probed = lists.nprobe
        while num_probed < lists.nlist:
            num_probed = min(2 * num_probed, lists.nlist)
            yield index, _probing(index, num_probed)
    elif isinstance(index, faiss.IndexHNSW):
        yield index.storage, None


def _probing(index: Any, num_lists: int) -> Any:
    """Return parameters of one search that probes so many lists; the index, which others search too, is unchanged."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexRefine):
        below = _probing(index.base_index, num_lists)
        return _untyped.IndexRefineSearchParameters(k_factor=index.k_factor, base_index_params=below)
    if isinstance(index, faiss.IndexPreTransform):
        return _untyped.SearchParametersPreTransform(index_params=_probing(index.index, num_lists))
    return _untyped.SearchParametersIVF(nprobe=num_lists)


def _among(index: Any, selector: Any, factor: float) -> Any:
    """Return parameters of one search among the rows of a selector that looks at so many times more of the index."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexRefine):
        below = _among(index.base_index, selector, factor)
        return _untyped.IndexRefineSearchParameters(k_factor=index.k_factor, base_index_params=below)
    if isinstance(index, faiss.IndexPreTransform):
        return _untyped.SearchParametersPreTransform(index_params=_among(index.index, selector, factor))
    if isinstance(index, faiss.IndexIVF):
        num_lists = min(index.nlist, math.ceil(factor * index.nprobe))
        return _untyped.SearchParametersIVF(sel=selector, nprobe=num_lists)
    if isinstance(index, faiss.IndexHNSW):
        return _untyped.SearchParametersHNSW(sel=selector, efSearch=math.ceil(factor * index.hnsw.efSearch))
    return _untyped.SearchParameters(sel=selector)


def _widened(
    scores: NDArray[np.float32], doc_ids: NDArray[np.object_], width: int
) -> tuple[NDArray[np.float32], NDArray[np.object_]]:
    shape = (len(scores), width - scores.shape[1])
    return (
        np.concatenate([scores, np.full(shape, -np.inf, np.float32)], axis=1),
        np.concatenate([doc_ids, np.empty(shape, object)], axis=1),
    )


def merged(shards: Iterable[IndexShard]) -> list[IndexShard]:
    """Merge shards that were trained together, so that a query pays for one index and not for each shard.

    Merged they are what FAISS would have made of all their vectors at once. Graphs cannot be merged and stay as they are.
    Memory peaks at one shard above the whole.
    """
    groups: dict[str | None, list[IndexShard]] = {}
    for shard in shards:
        can = shard.trained is not None and _can_merge(shard.index)
        group = groups.setdefault(shard.trained if can else f"alone-{len(groups)}", [])
        if group:
            _merge(group[0].index, shard.index)
        group.append(replace(shard, index=None) if group else shard)
    return [_joined(group[0].index, group) for group in groups.values()]


def on_device(shards: Sequence[IndexShard], device: str) -> IndexShard:
    """Return one shard of the vectors of flat shards, which are copied to a device; at least one of them holds vectors.

    Raises:
        InputError: a shard is not flat, or its numbers have less than 16 bits; or they do not fit the device.
    """
    vectors = [flat_vectors(each.index) for each in shards]
    flat = [each for each in vectors if each is not None]
    if len(flat) < len(vectors):
        kind = type(faiss.downcast_index(shards[[each is None for each in vectors].index(True)].index)).__name__
        raise InputError(
            f"an index of kind {kind} is not searched on a GPU; only flat ones of float32 or float16 vectors are"
        )
    doc_ids = np.concatenate([each.doc_ids for each in shards])
    return _joined(DeviceIndex(flat, doc_ids, doc_ids != DELETED, device), shards)


def _joined(index: Any, shards: Sequence[IndexShard]) -> IndexShard:
    """Return one shard of an index that holds the vectors of several, in their order."""
    return IndexShard(
        index,
        np.concatenate([each.doc_ids for each in shards]),
        b"".join(each.hashes for each in shards) if all(len(each.hashes) for each in shards) else b"",
        shards[0].trained,
        tuple(part for each in shards for part in each.words),
    )


def _can_merge(index: Any) -> bool:
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexRefine):
        return _can_merge(index.base_index) and _can_merge(index.refine_index)
    if isinstance(index, faiss.IndexPreTransform):
        return _can_merge(index.index)
    return isinstance(index, faiss.IndexIVF | faiss.IndexFlatCodes)


def _merge(index: Any, other: Any) -> None:
    """Append the vectors of another index to this one."""
    index, other = faiss.downcast_index(index), faiss.downcast_index(other)
    if isinstance(index, faiss.IndexRefine):
        _merge(index.base_index, other.base_index)
        _merge(index.refine_index, other.refine_index)
        index.ntotal = index.base_index.ntotal
    elif isinstance(index, faiss.IndexPreTransform):
        _merge(index.index, other.index)
        index.ntotal = index.index.ntotal
    elif isinstance(index, faiss.IndexIVF):
        index.nprobe = max(index.nprobe, other.nprobe)
        index.merge_from(other, index.ntotal)
    else:
        index.merge_from(other)


def search_shards(shards: Iterable[IndexShard], queries: NDArray[np.float32], top_k: int) -> Hits:
    """Return the k best over all shards: the same as from one index that holds all their vectors.

    Each shard may be let go before the next is loaded. k over the number of vectors gives all of them.
    """
    found = [shard.search(queries, top_k) for shard in shards]
    if len(found) == 1:
        return found[0]
    best = TopK(len(queries), top_k)
    for each in found:
        best.merge(each.scores, each.doc_ids)
    return best.hits()


def build_shard(factory: str, dimension: int, chunks: Iterable[tuple[list[str], NDArray[np.float32]]]) -> IndexShard:
    """Return an index of the vectors [N, D] that come in chunks with their doc_ids; one that must be trained holds them
    all.

    Args:
        factory: FAISS factory string.
        dimension: D.
        chunks: doc_ids and vectors.
    """
    index = new_index(factory, dimension)
    doc_ids: list[str] = []
    parts: list[NDArray[np.float32]] = []
    for names, vectors in chunks:
        parts.append(np.ascontiguousarray(vectors, np.float32))
        doc_ids.extend(names)
        if index.is_trained:
            index.add(parts.pop())
    if parts:
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        train(index, training_sample(whole, index))
        index.add(whole)
    return IndexShard(index, np.array(doc_ids, dtype=object))


def new_index(factory: str, dimension: int) -> Any:
    """Return the untrained FAISS index of a factory string, for inner products.

    FAISS would also order the codes of product quantization for filtering by Hamming distance (polysemous codes). That is
    most of the training, 1.6 seconds of a core per code byte, and no search here filters so.
    """
    index = faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
    with contextlib.suppress(RuntimeError):  # not an IVF index
        inverted_lists: Any = faiss.downcast_index(faiss.extract_index_ivf(index))
        is_quantized = isinstance(inverted_lists, faiss.IndexIVFPQ)
        if is_quantized:
            inverted_lists.do_polysemous_training = False
    return index


def num_training_rows(index: Any, num_rows: int) -> int:
    """Return how many of so many vectors an index is trained on: 64 a list and 65,536 at least, and what fits one task."""
    lists = faiss.try_extract_index_ivf(index)
    num_lists = int(lists.nlist) if lists is not None else 0
    wanted = max(_TRAINING_ROWS, _TRAINING_ROWS_PER_LIST * num_lists)
    return min(num_rows, wanted, max(_TRAINING_ROWS, TRAINING_BYTES // (4 * int(index.d))))


def training_rows(index: Any, num_rows: int) -> NDArray[np.int64]:
    """Return the rows that an index is trained on: runs of 128, since neighbouring rows are read together."""
    size = num_training_rows(index, num_rows)
    if size == num_rows:
        return np.arange(num_rows)
    starts = np.arange(0, num_rows, _RUN_ROWS)
    chosen = np.random.default_rng(0).choice(starts, -(-size // _RUN_ROWS), replace=False)
    rows = (np.sort(chosen)[:, None] + np.arange(_RUN_ROWS)).ravel()
    return rows[rows < num_rows]


def training_sample(vectors: NDArray[np.float32], index: Any) -> NDArray[np.float32]:
    """Return what an index is trained on: 64 vectors a list, and 65,536 at least, where there are so many."""
    size = num_training_rows(index, len(vectors))
    if len(vectors) == size:
        return vectors
    return vectors[np.sort(np.random.default_rng(0).choice(len(vectors), size, replace=False))]
