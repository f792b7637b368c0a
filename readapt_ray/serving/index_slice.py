"""Some shards of an index in memory: searched whole, or only among some doc_ids; without Ray.

A filtered search is exact among the vectors that the index holds: it scores those of the passages that pass, a block at
a time, read back from the index.
"""

import bisect
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from readapt_ray.errors import InputError
from readapt_ray.retrieval.exact import Hits, TopK, search_exact
from readapt_ray.retrieval.faiss_build import faiss
from readapt_ray.retrieval.index_files import ShardRecord, read_shard
from readapt_ray.retrieval.index_shard import DELETED, IndexShard, merged, search_shards
from readapt_ray.serving.versions import DocFilter
from readapt_ray.storage import Location

_BLOCK_ROWS = 16384
_WHOLE = re.compile(r"((IVF|HNSW|NSG)\w*,)?Flat|HNSW\d*|.+,(RFlat|Refine\(Flat\))")


@dataclass(frozen=True)
class _SearchableShard:
    shard: IndexShard
    order: NDArray[np.int64] = field(init=False)
    """Rows that are not deleted, by rising doc_id."""
    ids: NDArray[np.object_] = field(init=False)
    """Their doc_ids, in that order."""

    def __post_init__(self) -> None:
        """Order the ids; and let inverted lists say where each vector lies (8 bytes each), to give it back."""
        order = np.argsort(self.shard.doc_ids, kind="stable")
        object.__setattr__(self, "order", order[np.count_nonzero(self.shard.doc_ids == DELETED) :])
        object.__setattr__(self, "ids", self.shard.doc_ids[self.order])
        lists = faiss.try_extract_index_ivf(self.shard.index)
        if lists is not None:
            lists.make_direct_map()

    def rows(self, wanted: DocFilter) -> NDArray[np.int64]:
        """The rows that pass a filter."""
        if wanted.prefix is not None:
            size = len(wanted.prefix)
            first = bisect.bisect_left(self.ids, wanted.prefix, key=lambda doc_id: doc_id[:size])
            last = bisect.bisect_right(self.ids, wanted.prefix, key=lambda doc_id: doc_id[:size])
            return np.sort(self.order[first:last])
        names = np.array(wanted.doc_ids, dtype=object)
        places = np.minimum(np.searchsorted(self.ids, names), len(self.ids) - 1)
        return np.unique(self.order[places[self.ids[places] == names]]) if len(self.ids) else self.order

    def chunks(self, wanted: DocFilter) -> Iterator[tuple[list[str], NDArray[np.float32]]]:
        """doc_ids and vectors [N, D] of the rows that pass, a block at a time."""
        rows = self.rows(wanted)
        for first in range(0, len(rows), _BLOCK_ROWS):
            block = rows[first : first + _BLOCK_ROWS]
            yield self.shard.doc_ids[block].tolist(), _vectors(self.shard.index, block)


def _vectors(index: Any, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    try:
        vectors: NDArray[np.float32] = index.reconstruct_batch(rows)
    except RuntimeError:
        raise InputError(
            f"an index of kind {type(index).__name__} does not give its vectors back, so it cannot be filtered by doc_id; "
            f"serve another kind"
        ) from None
    return vectors


def holds_vectors_whole(factory: str) -> bool:
    """Whether an index that FAISS made by this string gives back the very vectors that went in.

    Lists and graphs over flat vectors do, and what ranks again by flat vectors. What is given back of codes, of
    quantised numbers or of a projection is what the index already searches by: it misses nothing of that.
    """
    return _WHOLE.fullmatch(factory) is not None


class IndexSlice:
    """Shards that one process holds.

    Args:
        folder: where the shards lie.
        records: those of this slice.

    Raises:
        CorruptFileError: a file of a shard is gone, cut short or altered.
    """

    def __init__(self, folder: Location, records: Sequence[ShardRecord]) -> None:
        loaded = (read_shard(folder, record) for record in records if record.num_vectors)
        self._shards = [_SearchableShard(shard) for shard in merged(loaded)]

    @property
    def num_vectors(self) -> int:
        """Vectors in all shards that are found."""
        return sum(len(each.ids) for each in self._shards)

    def search(self, queries: NDArray[np.float32], top_k: int, wanted: DocFilter | None = None) -> Hits:
        """The k best of each query [Q, D]; a filter leaves only what passes it.

        Raises:
            InputError: the dimensions differ, or this kind of index cannot be filtered.
        """
        if wanted is None:
            return search_shards((each.shard for each in self._shards), queries, top_k)
        return next(hits for hits in self.scan(queries, top_k, wanted) if hits is not None)

    def scan(self, queries: NDArray[np.float32], top_k: int, wanted: DocFilter) -> Iterator[Hits | None]:
        """As `search` with a filter, with a pause after each block but the last: None stands for a pause.

        Raises:
            InputError: the dimensions differ, or this kind of index cannot be filtered.
        """
        best = TopK(len(queries), top_k)
        chunks = itertools.chain.from_iterable(each.chunks(wanted) for each in self._shards)
        for number, chunk in enumerate(chunks):
            if number:
                yield None
            found = search_exact(queries, [chunk], top_k)
            best.merge(found.scores, found.doc_ids)
        yield best.hits()
