"""Build one FAISS index in memory from vectors, and search it with ties broken by doc_id.

In: vectors with their doc_ids, or queries. Out: the index, or the best passages of each query. A flat index takes 4
bytes of memory per number of a vector.
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
"""FAISS without its type stubs, which do not know how Python calls its constructors."""
DELETED = ""
"""doc_id of a deleted vector, which searches no longer find."""
_TRAINING_ROWS = 65_536
_TRAINING_ROWS_PER_LIST = 64
_RUN_ROWS = 128
_LEAST_TOGETHER = 8
"""Number of queries from which torch searches flat vectors faster than FAISS, which is slow on some CPUs.

Two cores of an AMD EPYC (Zen 4) search 1,000,000 vectors of 768 numbers for 64 queries in 6.3 s with FAISS and in .9 s
with torch, for one query in .2 s."""
_BLOCK_ROWS = 4096


@dataclass(frozen=True)
class IndexShard:
    """An index shard in memory: an index, and the doc_id of each of its vectors."""

    index: Any
    """A FAISS index or a DeviceIndex."""
    doc_ids: NDArray[np.object_]
    """[N], the doc_id of each vector; DELETED if its passage was deleted."""
    hashes: bytes = b""
    """16 bytes per vector: the hash of its passage's content. Empty if no hash is known."""
    trained: str | None = None
    """Id of the training of its lists and codes. Shards of one training can be merged. None if unknown."""
    words: tuple[WordIndex, ...] = ()
    """BM25 scores of its passages, in parts whose rows follow each other; empty without BM25."""

    @functools.cached_property
    def _deleted(self) -> NDArray[np.bool_]:
        return np.asarray(self.doc_ids == DELETED)

    @functools.cached_property
    def _any_deleted(self) -> bool:
        return bool(self._deleted.any())

    def search(self, queries: NDArray[np.float32], top_k: int) -> Hits:
        """Return the k best passages of this shard for each query, ties by doc_id.

        An approximate search may find fewer than k, since it looks at few lists or since deleted vectors took places.
        Such a query is searched again, deeper each time, until it has k results or all vectors.

        Args:
            queries: [Q, D].
            top_k: k; fewer are returned if the shard has fewer.

        Raises:
            InputError: the dimensions differ, top_k is under 1, or a query holds NaN or infinity.
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
        """Return the k best passages among some rows, ties by doc_id; an approximate index may find fewer.

        The fewer rows are given, the more lists are probed and the more of a graph is visited.

        Args:
            queries: [Q, D].
            top_k: k.
            rows: row numbers in the shard, rising; none of them is deleted.

        Raises:
            InputError: as in `search`.
        """
        check_queries(queries, self.index.d)
        if isinstance(self.index, DeviceIndex):
            return self.index.search(queries, top_k, rows)
        chosen = np.zeros(self.index.ntotal, bool)
        chosen[rows] = True
        selector = _untyped.IDSelectorBitmap(np.packbits(chosen, bitorder="little"))
        return self._best(self.index, _among(self.index, selector, len(chosen) / max(1, len(rows))), queries, top_k)

    def _best(self, index: Any, parameters: Any, queries: NDArray[np.float32], top_k: int) -> Hits:
        """Return the k best results of one search depth, with ties broken by doc_id.

        FAISS breaks ties in any order. So k + 1 results are requested, and twice as many again while results beyond
        the last one may still tie with the k-th, or while deleted vectors take places of the best k.
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
    """Return whether no two results of a query tie, so that FAISS's order is final."""
    return bool((scores[:, 1:] < scores[:, :-1]).all())


def _ever_further(index: Any) -> Iterator[tuple[Any, Any]]:
    """Yield an index and search parameters, each of a deeper search than the one yielded earlier.

    With inverted lists, nprobe doubles until all lists are probed. A graph searches with efSearch >= k by itself,
    but no link may lead to some of its vectors, so its stored vectors are scanned.
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
    """Return search parameters that probe `num_lists` lists; other threads search the index, so it is unchanged."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexRefine):
        below = _probing(index.base_index, num_lists)
        return _untyped.IndexRefineSearchParameters(k_factor=index.k_factor, base_index_params=below)
    if isinstance(index, faiss.IndexPreTransform):
        return _untyped.SearchParametersPreTransform(index_params=_probing(index.index, num_lists))
    return _untyped.SearchParametersIVF(nprobe=num_lists)


def _among(index: Any, selector: Any, factor: float) -> Any:
    """Return search parameters that find only rows of `selector`, with nprobe or efSearch multiplied by `factor`."""
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
    """Merge shards of one training into one, so that a query searches one index instead of many.

    The result equals the index that FAISS would make of all their vectors at once. The given indexes are used up.
    Graphs and shards whose `trained` is None cannot be merged and are returned as they are. Memory peaks at all shards
    plus one.
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
    """Copy the vectors of flat shards to a device, and return them as one shard, in the order of the shards.

    Args:
        shards: at least one of them holds vectors.
        device: torch device.

    Raises:
        InputError: a shard is not flat, its numbers have less than 16 bits, or the vectors do not fit the device.
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
    """Return one shard of an index that holds the vectors of several shards in their order."""
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
    """Return the k best passages of each query over all shards, best first, ties by doc_id.

    Exact shards give what one index with all their vectors would. If k exceeds the number of vectors, all are returned.

    Args:
        shards: may be a generator that loads one shard at a time.
        queries: [Q, D].
        top_k: k.

    Raises:
        InputError: as in `IndexShard.search`.
    """
    found = [shard.search(queries, top_k) for shard in shards]
    if len(found) == 1:
        return found[0]
    best = TopK(len(queries), top_k)
    for each in found:
        best.merge(each.scores, each.doc_ids)
    return best.hits()


def build_shard(factory: str, dimension: int, chunks: Iterable[tuple[list[str], NDArray[np.float32]]]) -> IndexShard:
    """Build an index of vectors that come in chunks. If the index must be trained, all vectors are in memory at once.

    Args:
        factory: FAISS factory string.
        dimension: D.
        chunks: doc_ids and vectors [N, D].
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

    Polysemous training, which FAISS adds to product quantization for filtering by Hamming distance, is turned off. It
    is most of the training time (1.6 seconds of a core per code byte), and no search here filters so.
    """
    index = faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
    with contextlib.suppress(RuntimeError):  # not an IVF index
        inverted_lists: Any = faiss.downcast_index(faiss.extract_index_ivf(index))
        is_quantized = isinstance(inverted_lists, faiss.IndexIVFPQ)
        if is_quantized:
            inverted_lists.do_polysemous_training = False
    return index


def num_training_rows(index: Any, num_rows: int) -> int:
    """Return how many vectors to train an index on: 64 per inverted list, at least 65,536, and at most `num_rows`.

    More than 8 GiB of float32 vectors are not used, since one task holds them; 65,536 are always allowed.
    """
    lists = faiss.try_extract_index_ivf(index)
    num_lists = int(lists.nlist) if lists is not None else 0
    wanted = max(_TRAINING_ROWS, _TRAINING_ROWS_PER_LIST * num_lists)
    return min(num_rows, wanted, max(_TRAINING_ROWS, TRAINING_BYTES // (4 * int(index.d))))


def training_rows(index: Any, num_rows: int) -> NDArray[np.int64]:
    """Return the rows to train an index on, rising, int64: about as many as `num_training_rows` says.

    They are runs of 128 rows, since neighbouring rows are read together, drawn at random but always the same.
    """
    size = num_training_rows(index, num_rows)
    if size == num_rows:
        return np.arange(num_rows)
    starts = np.arange(0, num_rows, _RUN_ROWS)
    chosen = np.random.default_rng(0).choice(starts, -(-size // _RUN_ROWS), replace=False)
    rows = (np.sort(chosen)[:, None] + np.arange(_RUN_ROWS)).ravel()
    return rows[rows < num_rows]


def training_sample(vectors: NDArray[np.float32], index: Any) -> NDArray[np.float32]:
    """Return a random sample of vectors to train an index on, as many as `num_training_rows` says, in their order.

    The vectors themselves, if all are used. The sample is always the same.
    """
    size = num_training_rows(index, len(vectors))
    if len(vectors) == size:
        return vectors
    return vectors[np.sort(np.random.default_rng(0).choice(len(vectors), size, replace=False))]
