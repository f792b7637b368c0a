"""Search some shards of an index in memory, with or without a filter; without Ray.

If few passages pass the filter, the search is exact for the vectors that the index holds: it reads back the vectors of
these passages, a block at a time, and scores each. If many pass, FAISS searches among them; a query for which it finds
fewer than k passages is searched exactly.
"""

import bisect
import copy
import functools
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from readapt_ray.errors import InputError
from readapt_ray.retrieval.bm25 import query_blocks, search_words
from readapt_ray.retrieval.device_index import DeviceIndex
from readapt_ray.retrieval.exact import Hits, TopK, joined, search_exact
from readapt_ray.retrieval.faiss_build import faiss
from readapt_ray.retrieval.index_files import ShardRecord, read_shard, read_words
from readapt_ray.retrieval.index_shard import DELETED, IndexShard, merged, on_device, search_shards
from readapt_ray.retrieval.kept_columns import KeptColumns
from readapt_ray.serving.doc_filter import DocFilter
from readapt_ray.sources.splitting import parent_of
from readapt_ray.storage import Location
from readapt_ray.weights.ordered_map import ordered_map

READ_AT_ONCE = 4
"""Number of shards that a slice reads at once."""
_BLOCK_ROWS = 16384
_SCANNED_ROWS = 32768
"""Maximum number of rows of a shard that a filtered search compares one by one."""
_EXACT_FACTORY = re.compile(r"((IVF|HNSW|NSG)\w*,)?Flat|HNSW\d*|.+,(RFlat|Refine\(Flat\))")


@dataclass(frozen=True)
class SearchableShard:
    """A shard that can be filtered by doc_id and by column."""

    shard: IndexShard
    columns: KeptColumns | None = None
    """Columns of its passages, to filter by; None without a corpus."""
    is_split: bool = False
    """Whether passages are parts of documents. A document's id then names all of its passages."""
    order: NDArray[np.int64] = field(init=False)
    """Rows that are not deleted, in the order of `ids`."""
    ids: NDArray[np.object_] = field(init=False)
    """doc_ids of the rows in `order`, ascending."""

    def __post_init__(self) -> None:
        """Sort the doc_ids, and build the map that inverted lists need to read vectors back (8 bytes per vector)."""
        order = np.argsort(self.shard.doc_ids, kind="stable")
        object.__setattr__(self, "order", order[np.count_nonzero(self.shard.doc_ids == DELETED) :])
        object.__setattr__(self, "ids", self.shard.doc_ids[self.order])
        is_on_device = isinstance(self.shard.index, DeviceIndex)
        if not is_on_device and (lists := faiss.try_extract_index_ivf(self.shard.index)) is not None:
            lists.make_direct_map()

    def rows(self, wanted: DocFilter) -> NDArray[np.int64]:
        """Return the indices of the rows of this shard that pass a filter, ascending; deleted rows never pass.

        If ingest split documents, the id of a document matches all of its passages.

        Raises:
            InputError: the filter names a column that does not exist, or values that this column cannot hold.
        """
        passing = [] if wanted.within is None else [self.rows(wanted.within)]
        if wanted.prefix is not None:
            passing.append(self._rows_of_prefix(wanted.prefix))
        if wanted.doc_ids is not None:
            passing.append(self._rows_of_ids(wanted.doc_ids))
        if wanted.conditions:
            if self.columns is None:
                raise InputError("this server has no corpus beside the index, so there are no columns to filter by")
            passing.append(np.flatnonzero(self.columns.passing(wanted.conditions)))
        if not passing:
            return np.sort(self.order)
        return functools.reduce(functools.partial(np.intersect1d, assume_unique=True), passing)

    def _rows_of_prefix(self, prefix: str) -> NDArray[np.int64]:
        size = len(prefix)
        first = bisect.bisect_left(self.ids, prefix, key=lambda doc_id: doc_id[:size])
        last = bisect.bisect_right(self.ids, prefix, key=lambda doc_id: doc_id[:size])
        return np.sort(self.order[first:last])

    def _rows_of_ids(self, doc_ids: tuple[str, ...]) -> NDArray[np.int64]:
        names = np.array([*doc_ids, *(self._pieces(doc_ids) if self.is_split else ())], dtype=object)
        places = np.minimum(np.searchsorted(self.ids, names), len(self.ids) - 1)
        return np.unique(self.order[places[self.ids[places] == names]]) if len(self.ids) else self.order

    def _pieces(self, doc_ids: tuple[str, ...]) -> Iterator[str]:
        """Yield the doc_ids of all passages in this shard that are parts of these documents."""
        firsts, ends = (np.searchsorted(self.ids, np.array([each + mark for each in doc_ids], object)) for mark in "#$")
        for doc_id, first, end in zip(doc_ids, firsts, ends, strict=True):  # "$" is the character after "#"
            yield from (each for each in self.ids[first:end] if parent_of(each) == doc_id)

    def passing(self, wanted: DocFilter | None) -> NDArray[np.bool_] | None:
        """Return a mask of the rows that pass a filter, bool [N], False if deleted; None if there is no filter."""
        if wanted is None:
            return None
        passing = np.zeros(len(self.shard.doc_ids), bool)
        passing[self.rows(wanted)] = True
        return passing

    def without_vectors(self) -> "SearchableShard":
        """Return a copy without vectors, so that their memory is freed. It can be searched only by words."""
        left = copy.copy(self)
        object.__setattr__(left, "shard", replace(self.shard, index=None))
        return left


def search_rows(
    shard: IndexShard, queries: NDArray[np.float32], top_k: int, rows: NDArray[np.int64], *, max_scanned: float
) -> Iterator[Hits]:
    """Search only some rows of a shard, in parts; yield the k best rows per query for each part.

    The k best over all parts are the result. Places without a hit have the score -inf.

    Args:
        shard: the shard.
        queries: [Q, D].
        top_k: k.
        rows: rows to search, ascending; none of them is deleted.
        max_scanned: up to this number of rows, all are compared one by one. Among more rows FAISS searches, and a query
            for which it finds too few is compared with all. A GPU always compares all.
    """
    if len(rows) <= max_scanned and not isinstance(shard.index, DeviceIndex):
        yield from _scan(shard, queries, top_k, rows)
        return
    found = shard.search_among(queries, top_k, rows)
    lacking = np.flatnonzero(np.count_nonzero(found.scores > -np.inf, axis=1) < min(top_k, len(rows)))
    found.scores[lacking] = -np.inf
    yield found
    for each in _scan(shard, queries[lacking], top_k, rows) if len(lacking) else ():
        scores = np.full((len(queries), each.scores.shape[1]), -np.inf, np.float32)
        doc_ids = np.empty(scores.shape, object)
        scores[lacking], doc_ids[lacking] = each.scores, each.doc_ids
        yield Hits(scores, doc_ids)


def _scan(shard: IndexShard, queries: NDArray[np.float32], top_k: int, rows: NDArray[np.int64]) -> Iterator[Hits]:
    """Compare the queries with each row; yield the k best per query of each block of rows."""
    for first in range(0, len(rows), _BLOCK_ROWS):
        block = rows[first : first + _BLOCK_ROWS]
        yield search_exact(queries, [(shard.doc_ids[block].tolist(), _vectors(shard.index, block))], top_k)


def max_scanned(wanted: DocFilter) -> float:
    """Return the maximum number of rows that a filtered search compares one by one; infinity if it must be exact."""
    return math.inf if wanted.is_exact else _SCANNED_ROWS


def is_mapped(record: ShardRecord, records: Sequence[ShardRecord]) -> bool:
    """Return whether a shard is memory-mapped. Shards of a slice that were trained together are merged in memory.

    Args:
        record: the shard.
        records: all shards of its slice.
    """
    return record.trained is None or sum(each.trained == record.trained for each in records) == 1


def _loaded(folder: Location, records: Sequence[ShardRecord], words: Mapping[str, str]) -> Iterator[IndexShard]:
    """Yield the shards that are not empty, in their order; several are read at once."""

    def load(record: ShardRecord) -> IndexShard:
        shard = read_shard(folder, record, is_mapped=is_mapped(record, records), use_cache=True)
        if record.name not in words:
            return shard
        return replace(shard, words=(read_words(folder, record.name, words[record.name], use_cache=True),))

    yield from ordered_map(load, (each for each in records if each.num_vectors), num_threads=READ_AT_ONCE)


def _placed(shards: Sequence[IndexShard], device: str) -> list[IndexShard]:
    """Join all shards into one that is on a device; return [] if there are none."""
    return [on_device(shards, device)] if shards else []


def _vectors(index: Any, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    try:
        vectors: NDArray[np.float32] = index.reconstruct_batch(rows)
    except RuntimeError:
        raise InputError(
            f"an index of kind {type(index).__name__} does not give its vectors back, so it cannot be filtered by doc_id; "
            f"serve another kind"
        ) from None
    return vectors


def gives_exact_vectors(factory: str) -> bool:
    """Return whether the exact vectors can be read back from a FAISS index with this factory string.

    They can from inverted lists and graphs over flat vectors, and from indexes that rerank by flat vectors. Codes,
    quantized numbers and projections give back only the approximate vectors that the index searches by.
    """
    return _EXACT_FACTORY.fullmatch(factory) is not None


def _searchable(shards: Sequence[IndexShard], corpus: Sequence[Location], *, is_split: bool) -> list[SearchableShard]:
    """Return the shards with the columns of their passages."""
    columns = KeptColumns.read(corpus, [doc_id for each in shards for doc_id in each.doc_ids]) if corpus else None
    starts = itertools.accumulate((len(each.doc_ids) for each in shards), initial=0)
    return [
        SearchableShard(shard, columns.part(start, len(shard.doc_ids)) if columns else None, is_split)
        for start, shard in zip(starts, shards, strict=False)
    ]


class IndexSlice:
    """Shards of an index that one process holds.

    Args:
        folder: folder of the index, with the files of its shards.
        records: records of the shards in this slice.
        corpus: Parquet files with the passages; searches can be filtered by their columns.
        words: SHA-256 of the BM25 scores of each shard, by the shard's name; empty without BM25.
        is_split: whether passages are parts of documents.
        device: torch device to hold the vectors on, and to search on; if None, FAISS searches on the CPU.

    Raises:
        CorruptFileError: a file of a shard is missing, truncated or altered.
        InputError: the vectors do not fit the device, or the index is not flat with 16 or 32 bits per number.
    """

    def __init__(
        self,
        folder: Location,
        records: Sequence[ShardRecord],
        corpus: Sequence[Location] = (),
        words: Mapping[str, str] | None = None,
        *,
        is_split: bool = False,
        device: str | None = None,
    ) -> None:
        loaded = _loaded(folder, records, words or {})
        shards = merged(loaded) if device is None else _placed(list(loaded), device)
        self.shards = _searchable(shards, corpus, is_split=is_split)

    @classmethod
    def of(
        cls, shards: Sequence[IndexShard], corpus: Sequence[Location] = (), *, is_split: bool = False
    ) -> "IndexSlice":
        """Make a slice from shards that are already in memory.

        Args:
            shards: the shards.
            corpus: Parquet files with the passages, to filter by their columns; empty for no such filters.
            is_split: whether passages are parts of documents.
        """
        made = cls.__new__(cls)
        made.shards = _searchable(shards, corpus, is_split=is_split)
        return made

    @property
    def num_vectors(self) -> int:
        """Count the vectors in all shards, without deleted ones."""
        return sum(len(each.ids) for each in self.shards)

    def search(self, queries: NDArray[np.float32], top_k: int, wanted: DocFilter | None = None) -> Hits:
        """Return the k best passages per query [Q, D], best first; with a filter, of those that pass it.

        If fewer than k passages are found, the last places have the score -inf.

        Raises:
            InputError: the dimensions differ, top_k is under 1, this kind of index cannot be filtered, or the filter
                names a column that does not exist.
        """
        if wanted is None:
            return search_shards((each.shard for each in self.shards), queries, top_k)
        return next(hits for hits in self.scan(queries, top_k, wanted) if hits is not None)

    def search_words(self, texts: Sequence[str], top_k: int, wanted: DocFilter | None = None) -> Iterator[Hits | None]:
        """Search by BM25 in short steps: yield None after each step, and the k best passages per text at the end.

        A step is one block of texts (up to 16 texts and 4,096 characters) in one shard. Between two steps the caller
        can run other searches, or stop. Passages without any word of a text are never found.

        Raises:
            InputError: the filter names a column that does not exist, or values that this column cannot hold.
        """
        blocks = list(query_blocks(texts))
        best = [TopK(len(block), top_k) for block in blocks]
        for each in self.shards:
            passing = each.passing(wanted)
            for block, best_of_block in zip(blocks, best, strict=True):
                found = search_words(each.shard.words, each.shard.doc_ids, block, top_k, passing)
                best_of_block.merge(found.scores, found.doc_ids)
                yield None
        yield joined([each.hits() for each in best])

    def scan(self, queries: NDArray[np.float32], top_k: int, wanted: DocFilter) -> Iterator[Hits | None]:
        """Search with a filter, step by step: yield None between two blocks, and the k best per query at the end.

        Raises:
            InputError: the dimensions differ, this kind of index cannot be filtered, or the filter names a column that
                does not exist or values that it cannot hold.
        """
        best = TopK(len(queries), top_k)
        parts = itertools.chain.from_iterable(
            search_rows(each.shard, queries, top_k, each.rows(wanted), max_scanned=max_scanned(wanted))
            for each in self.shards
        )
        for number, found in enumerate(parts):
            if number:
                yield None
            best.merge(found.scores, found.doc_ids)
        yield best.hits()
