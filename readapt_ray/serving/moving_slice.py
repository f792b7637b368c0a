"""Search a part of an index while its passages move, one by one, from vectors of an old model to vectors of a new one.

In: an index of old vectors, a bridge to them, and new vectors of some of its passages, in any order. The new model
encodes the queries. A query is compared directly with new vectors. For old vectors the bridge maps the query, and their
scores are rescaled to compare with the others (`retrieval/calibration.py`). Each passage is searched by only one of its
two vectors. Words, columns and doc_ids are the ones of the old index.

New vectors are compared one by one, at the cost of a flat index. In an old shard from which passages have moved, FAISS
searches the other passages; once few are left, they are compared one by one. With half of a shard moved, a search took
0.4 to 2 times as long as a search of the whole shard, and less after that; recall did not change (100,000 vectors of
256 numbers; flat, IVF and HNSW). Memory: the index, the new vectors, and about 200 bytes per passage. The vectors of an
old shard are freed once all of its passages have moved.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from readapt_ray.errors import InputError
from readapt_ray.retrieval.bridge import Bridge
from readapt_ray.retrieval.exact import Hits, TopK, check_queries
from readapt_ray.retrieval.index_shard import IndexShard, new_index
from readapt_ray.serving.doc_filter import DocFilter
from readapt_ray.serving.index_slice import IndexSlice, SearchableShard, max_scanned, search_rows

_PLACE_BYTES = 96
"""Bytes per passage beside its vectors: the row of its new vector, before and after a move, and a second doc_id."""
_BLOCK_BYTES = 256 << 20
"""Maximum bytes of a block of new vectors. A block is copied when it grows; each further one adds 0.2 ms per search."""
_FEW_ROWS = 2_048
_FEW_SHARE = 8
"""Old vectors are compared one by one if at most `_FEW_ROWS` are left, or one in `_FEW_SHARE` (then up to
`_MOST_SCANNED`)."""
_MOST_SCANNED = 32_768
_OLD = -1


class Located(NamedTuple):
    """Passages of a file of new vectors that one shard still searches by their old vectors."""

    shard: int
    rows: NDArray[np.int64]
    """Rows of these passages in the shard, [M]."""
    places: NDArray[np.int64]
    """Rows of these passages in the file, ascending, [M]."""

    def within(self, first: int, end: int) -> "Located":
        """Return the passages in rows `first` to `end` (exclusive) of the file, with places counted from `first`."""
        part = slice(*np.searchsorted(self.places, (first, end)))
        return Located(self.shard, self.rows[part], self.places[part] - first)


class Move(NamedTuple):
    """A prepared change of one shard: passages that get new vectors, and the state of the shard after that."""

    shard: int
    doc_ids: NDArray[np.object_]
    vectors: NDArray[np.float32]
    new_rows: NDArray[np.int64]
    """`new_rows` of the shard after the change, [N]; see `_MovingShard`."""
    old_rows: NDArray[np.int64]
    """`old_rows` of the shard after the change."""


@dataclass(frozen=True)
class _MovingShard:
    """One state of a shard. It is immutable: a move makes another state."""

    old: SearchableShard
    new_rows: NDArray[np.int64]
    """For each passage, [N], the row of its new vector in `blocks`; -1 while it has none."""
    old_rows: NDArray[np.int64]
    """Rows of the passages that are searched by their old vectors, ascending."""
    sorted_ids: pa.Array
    """The doc_ids of `old.ids`, in the same ascending order, as an Arrow array."""
    blocks: tuple[IndexShard, ...] = ()
    """Blocks of new vectors. All but the last are full."""

    @property
    def num_new(self) -> int:
        return sum(len(each.doc_ids) for each in self.blocks)

    def search_old(
        self, mapped: NDArray[np.float32], top_k: int, rows: NDArray[np.int64] | None, most: float
    ) -> Iterator[Hits]:
        """Search the old vectors of the passages that have not moved; with `rows`, only these rows."""
        if rows is None and not self.blocks:
            yield self.old.shard.search(mapped, top_k)
            return
        if rows is None:
            rows = self.old_rows
            most = _MOST_SCANNED if _FEW_SHARE * len(rows) <= len(self.new_rows) else _FEW_ROWS
        yield from search_rows(self.old.shard, mapped, top_k, rows, max_scanned=most)

    def search_new(
        self, queries: NDArray[np.float32], top_k: int, rows: NDArray[np.int64] | None, most: float
    ) -> Iterator[Hits]:
        """Search the new vectors; with `rows`, only these rows of `blocks`."""
        first = 0
        for block in self.blocks:
            end = first + len(block.doc_ids)
            if rows is None:
                yield block.search(queries, top_k)
            else:
                mine = rows[slice(*np.searchsorted(rows, (first, end)))] - first
                yield from search_rows(block, queries, top_k, mine, max_scanned=most)
            first = end


def num_bytes(num_vectors: int, dimension: int, factory: str) -> int:
    """Return the bytes that new vectors of all passages take, with the copy that is made while a block grows.

    Args:
        num_vectors: number of passages in the slice.
        dimension: dimension of the new vectors.
        factory: Flat (4 bytes per number) or SQfp16 (2 bytes).
    """
    vector_bytes = (4 if factory == "Flat" else 2) * dimension
    return num_vectors * (_PLACE_BYTES + vector_bytes) + min(_BLOCK_BYTES, num_vectors * vector_bytes)


class MovingSlice:
    """Shards of an index that one process holds, with new vectors for some of their passages.

    `locate` and `prepare` may run during searches, but only in one thread at a time. `move` must run between searches.

    Args:
        base: the shards with old vectors.
        bridge: maps queries of the new model to the old vectors.
        factory: FAISS factory string of the new vectors, Flat or SQfp16.

    Raises:
        CorruptFileError: a file of the bridge is truncated or altered.
        InputError: vectors cannot be read back from this kind of index, or the bridge is of an older release.
    """

    def __init__(self, base: IndexSlice, bridge: Bridge, factory: str = "Flat") -> None:
        self._base, self._bridge, self._factory = base, bridge, factory
        self._calibration, self._query_map = bridge.calibration, bridge.query_map
        self.dimension = int(bridge.new_encoder["dimension"])
        self._block_vectors = max(1, _BLOCK_BYTES // (4 * self.dimension))
        self._shards = tuple(map(_unmoved, base.shards))

    @property
    def num_vectors(self) -> int:
        """Count the passages, whether they are searched by old or by new vectors."""
        return sum(len(each.old_rows) + each.num_new for each in self._shards)

    @property
    def num_reembedded(self) -> int:
        """Count the passages that are searched by their new vectors."""
        return sum(each.num_new for each in self._shards)

    def search(self, queries: NDArray[np.float32], top_k: int, wanted: DocFilter | None = None) -> Hits:
        """Return the k best passages per query [Q, D] of the new model; with a filter, of those that pass it.

        Scores of old vectors are rescaled, so that they compare with scores of new ones. Places without a hit have the
        score -inf.

        Raises:
            InputError: the dimensions differ, or the filter names a column that does not exist.
        """
        best = TopK(len(queries), top_k)
        for found in self._parts(queries, top_k, wanted):
            best.merge(found.scores, found.doc_ids)
        return best.hits()

    def scan(self, queries: NDArray[np.float32], top_k: int, wanted: DocFilter) -> Iterator[Hits | None]:
        """Search with a filter, step by step: yield None between two blocks, and the k best per query at the end.

        A move between two steps does not change this search: it uses the vectors that existed when it began.

        Raises:
            InputError: the dimensions differ, or the filter names a column that does not exist.
        """
        best = TopK(len(queries), top_k)
        for number, found in enumerate(self._parts(queries, top_k, wanted)):
            if number:
                yield None
            best.merge(found.scores, found.doc_ids)
        yield best.hits()

    def search_words(self, texts: Sequence[str], top_k: int, wanted: DocFilter | None = None) -> Iterator[Hits | None]:
        """Search by BM25, as `IndexSlice.search_words`."""
        return self._base.search_words(texts, top_k, wanted)

    def _parts(self, queries: NDArray[np.float32], top_k: int, wanted: DocFilter | None) -> Iterator[Hits]:
        """Yield the k best of each part, with scores that can be compared."""
        check_queries(queries, self.dimension)
        shards = self._shards
        if any(len(each.old_rows) for each in shards):
            mapped = self._query_map(queries)
            factor, offset = self._calibration.scale(queries, mapped)
        for each in shards:
            old, new = None, None
            if wanted is not None:
                rows = each.old.rows(wanted)
                places = each.new_rows[rows]
                old, new = rows[places == _OLD], np.sort(places[places != _OLD])
            most = math.inf if wanted is None else max_scanned(wanted)
            if len(each.old_rows):
                for found in each.search_old(mapped, top_k, old, most):
                    yield Hits(found.scores * factor + offset, found.doc_ids)
            yield from each.search_new(queries, top_k, new, most)

    def locate(self, doc_ids: pa.Array, hashes: bytes) -> tuple[list[Located], int]:
        """Find the passages of a file that are in this slice and still searched by their old vectors.

        Args:
            doc_ids: doc_ids of the file.
            hashes: content hashes in the same order, 16 bytes each. Zeros match any content, and so does b"".

        Returns:
            The passages by shard, without shards that have none; and the number of passages that are left out since
            their content in the index differs.
        """
        found, num_changed = [], 0
        for number, each in enumerate(self._shards):
            there, num_other = _located(number, each, doc_ids, hashes)
            num_changed += num_other
            if len(there.rows):
                found.append(there)
        return found, num_changed

    def prepare(self, located: Sequence[Located], vectors: NDArray[np.float32]) -> list[Move]:
        """Prepare what `move` applies; the slice is not changed yet.

        Apply the moves before the next `prepare`, which starts from the state of the slice at that time.

        Args:
            located: passages to move; their `places` are rows of `vectors`.
            vectors: new vectors, float32 [M, D_new].
        """
        moves = []
        for number, rows, places in located:
            each = self._shards[number]
            new_rows = each.new_rows.copy()
            new_rows[rows] = each.num_new + np.arange(len(rows))
            old_rows = each.old_rows[new_rows[each.old_rows] == _OLD]
            moves.append(Move(number, each.old.shard.doc_ids[rows], vectors[places], new_rows, old_rows))
        return moves

    def move(self, moves: Sequence[Move]) -> None:
        """Apply prepared moves: from now on search these passages by their new vectors instead of their old ones.

        If none of a shard's passages has an old vector left, the shard's old vectors are freed.
        """
        shards = list(self._shards)
        for each in moves:
            shard = shards[each.shard]
            old = shard.old
            if not len(each.old_rows):
                old = self._base.shards[each.shard] = old.without_vectors()
            blocks = tuple(_added(shard.blocks, each, self._factory, self._block_vectors))
            shards[each.shard] = replace(shard, old=old, new_rows=each.new_rows, old_rows=each.old_rows, blocks=blocks)
        self._shards = tuple(shards)


def _unmoved(searchable: SearchableShard) -> _MovingShard:
    size = len(searchable.shard.doc_ids)
    if size:
        try:
            searchable.shard.index.reconstruct(0)
        except RuntimeError:
            raise InputError(
                f"an index of kind {type(searchable.shard.index).__name__} does not give its vectors back, so its passages cannot "
                f"move to new vectors one by one; leave new_vectors out, or serve another kind"
            ) from None
    ids = pa.array(searchable.ids, pa.string())
    return _MovingShard(searchable, np.full(size, _OLD), np.sort(searchable.order), ids)


def _located(number: int, shard: _MovingShard, doc_ids: pa.Array, hashes: bytes) -> tuple[Located, int]:
    ids = shard.old.ids
    none = np.zeros(0, np.int64)
    if not len(doc_ids) or not len(shard.old_rows):
        return Located(number, none, none), 0
    least, most = (pc.min_max(doc_ids)[name].as_py() for name in ("min", "max"))
    first, end = np.searchsorted(ids, np.array([least, most], object))
    among = shard.sorted_ids.slice(first, end + 1 - first)
    places = pc.index_in(doc_ids, value_set=among)
    there = np.flatnonzero(places.is_valid().to_numpy(zero_copy_only=False))
    rows = shard.old.order[first + places.drop_null().to_numpy()]
    is_still_old = shard.new_rows[rows] == _OLD
    rows, there = rows[is_still_old], there[is_still_old]
    is_same = _same(shard.old.shard.hashes, rows, hashes, there)
    rows, there = rows[is_same], there[is_same]
    _, once = np.unique(rows, return_index=True)
    once.sort()
    return Located(number, rows[once], there[once]), int(np.count_nonzero(~is_same))


def _same(mine: bytes, rows: NDArray[np.int64], its: bytes, places: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return for each passage whether its content hashes are equal; a missing hash (zeros) equals any."""
    if not mine or not its:
        return np.ones(len(rows), bool)
    here = np.frombuffer(mine, np.uint64).reshape(-1, 2)[rows]
    there = np.frombuffer(its, np.uint64).reshape(-1, 2)[places]
    same: NDArray[np.bool_] = (here == there).all(axis=1) | ~here.any(axis=1) | ~there.any(axis=1)
    return same


def _added(blocks: Sequence[IndexShard], move: Move, factory: str, size: int) -> Iterator[IndexShard]:
    """Yield the blocks after a move. The last one grows in place; earlier states only ask for the rows they know."""
    yield from blocks[:-1]
    last, first = blocks[-1] if blocks else None, 0
    while first < len(move.doc_ids):
        if last is None or len(last.doc_ids) == size:
            if last is not None:
                yield last
            last = IndexShard(new_index(factory, move.vectors.shape[1]), np.empty(0, object))
        taken = slice(first, first + size - len(last.doc_ids))
        doc_ids = np.concatenate([last.doc_ids, move.doc_ids[taken]])  # before the index grows: memory may run out
        last.index.add(np.ascontiguousarray(move.vectors[taken]))
        last = IndexShard(last.index, doc_ids)
        first = taken.stop
    if last is not None:
        yield last
