"""Search part of an index while its passages get the vectors of a new model, as if old and new vectors were one index.

In: an index of old vectors, a bridge to them, and new vectors of some of its passages, in any order. A query is of the new
model. New vectors are compared with it as it is. Old ones are compared with what the bridge makes of it, and these scores
are brought to the scale of the others (`retrieval/calibration.py`). Each passage is searched by one of its two vectors. Words,
columns and doc_ids stay those of the old index.

New vectors are compared one by one, at the price of a flat index. Of an old shard that has lost passages FAISS searches the
others, or each is compared once few are left: a search took .4 to 2 times the time of one of the whole shard with half of it
gone, and less after that, and its recall stayed (100,000 vectors of 256 numbers; flat, IVF and HNSW). Memory is that of
the index, the new vectors, and some 200 bytes per passage. An old shard is let go once none of its vectors is searched.
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
"""Memory per passage beside its vectors: where its new vector is, before and after a move, and a doc_id to find it by."""
_BLOCK_BYTES = 256 << 20
"""Size of a block of new vectors. A block is copied when it grows, and each further block adds .2 ms to a search."""
_FEW_ROWS = 2_048
_FEW_SHARE = 8
"""Old vectors are compared one by one once so few are left, or one of so many."""
_MOST_SCANNED = 32_768
_OLD = -1


class Located(NamedTuple):
    """Passages of a file of new vectors that a shard has, and searches by their old vectors."""

    shard: int
    rows: NDArray[np.int64]
    """Rows of the shard."""
    places: NDArray[np.int64]
    """Rows of the file, rising."""

    def within(self, first: int, end: int) -> "Located":
        """Return those whose rows of the file are from `first` to before `end`, counted from `first`."""
        part = slice(*np.searchsorted(self.places, (first, end)))
        return Located(self.shard, self.rows[part], self.places[part] - first)


class Move(NamedTuple):
    """A change of a shard, worked out beforehand."""

    shard: int
    doc_ids: NDArray[np.object_]
    vectors: NDArray[np.float32]
    new_rows: NDArray[np.int64]
    """[N] of the shard after it."""
    old_rows: NDArray[np.int64]


@dataclass(frozen=True)
class _MovingShard:
    """A state of a shard, which does not change."""

    old: SearchableShard
    new_rows: NDArray[np.int64]
    """[N]: the row of each passage among the new vectors; -1 while it has none."""
    old_rows: NDArray[np.int64]
    """Rows of passages that are searched by their old vectors, rising."""
    sorted_ids: pa.Array
    """doc_ids in the order of `old.ids`."""
    blocks: tuple[IndexShard, ...] = ()
    """The new vectors. All but the last are full."""

    @property
    def num_new(self) -> int:
        return sum(len(each.doc_ids) for each in self.blocks)

    def search_old(
        self, mapped: NDArray[np.float32], top_k: int, rows: NDArray[np.int64] | None, most: float
    ) -> Iterator[Hits]:
        """Search the old vectors that still count; with rows, those."""
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
        """Search the new vectors; with rows, those of them."""
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
    """Return the memory that a slice takes more than its old vectors, once all have moved; a block grows by copying."""
    vector_bytes = (4 if factory == "Flat" else 2) * dimension
    return num_vectors * (_PLACE_BYTES + vector_bytes) + min(_BLOCK_BYTES, num_vectors * vector_bytes)


class MovingSlice:
    """Shards of an index that one process holds, and the new vectors of their passages.

    `locate` and `prepare` may run beside searches; one thread at a time calls them. `move` runs between two searches.

    Args:
        base: the shards of old vectors.
        bridge: leads to them.
        factory: FAISS factory string of the new vectors, Flat or SQfp16.

    Raises:
        CorruptFileError: a file of the bridge was cut short or altered.
        InputError: the index does not give its vectors back, or the bridge is of an older release.
    """

    def __init__(self, base: IndexSlice, bridge: Bridge, factory: str = "Flat") -> None:
        self._base, self._bridge, self._factory = base, bridge, factory
        self._calibration, self._query_map = bridge.calibration, bridge.query_map
        self.dimension = int(bridge.new_encoder["dimension"])
        self._block_vectors = max(1, _BLOCK_BYTES // (4 * self.dimension))
        self._shards = tuple(map(_unmoved, base.shards))

    @property
    def num_vectors(self) -> int:
        """Count the passages, by whichever vector they are searched."""
        return sum(len(each.old_rows) + each.num_new for each in self._shards)

    @property
    def num_reembedded(self) -> int:
        """Count the passages that are searched by their new vectors."""
        return sum(each.num_new for each in self._shards)

    def search(self, queries: NDArray[np.float32], top_k: int, wanted: DocFilter | None = None) -> Hits:
        """Return the k best of each query [Q, D] of the new model; with a filter, among the passages that pass it.

        Raises:
            InputError: the dimensions differ, or there is no such column to filter by.
        """
        best = TopK(len(queries), top_k)
        for found in self._parts(queries, top_k, wanted):
            best.merge(found.scores, found.doc_ids)
        return best.hits()

    def scan(self, queries: NDArray[np.float32], top_k: int, wanted: DocFilter) -> Iterator[Hits | None]:
        """Search with a filter, with a pause after each block but the last: None is a pause.

        A move during a pause does not change this search, which uses the vectors that were there when it began.

        Raises:
            InputError: the dimensions differ, or there is no such column to filter by.
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
        """Yield the k best of each part, on one scale."""
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
        """Find passages that are searched by their old vectors.

        Args:
            doc_ids: of a file.
            hashes: 16 bytes each, of their contents; zeros match any.

        Returns:
            Where they are, for each shard that has some; and how many have another content here, and are left out.
        """
        found, num_changed = [], 0
        for number, each in enumerate(self._shards):
            there, num_other = _located(number, each, doc_ids, hashes)
            num_changed += num_other
            if len(there.rows):
                found.append(there)
        return found, num_changed

    def prepare(self, located: Sequence[Located], vectors: NDArray[np.float32]) -> list[Move]:
        """Work out what `move` does.

        Args:
            located: passages, whose `places` are rows of the vectors.
            vectors: [M, D_new].
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
        """Search passages by their new vectors from now on, and no longer by their old ones."""
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
    is_due = shard.new_rows[rows] == _OLD
    rows, there = rows[is_due], there[is_due]
    is_same = _same(shard.old.shard.hashes, rows, hashes, there)
    rows, there = rows[is_same], there[is_same]
    _, once = np.unique(rows, return_index=True)
    once.sort()
    return Located(number, rows[once], there[once]), int(np.count_nonzero(~is_same))


def _same(mine: bytes, rows: NDArray[np.int64], its: bytes, places: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which passages have the same content, as far as both sides know it."""
    if not mine or not its:
        return np.ones(len(rows), bool)
    here = np.frombuffer(mine, np.uint64).reshape(-1, 2)[rows]
    there = np.frombuffer(its, np.uint64).reshape(-1, 2)[places]
    same: NDArray[np.bool_] = (here == there).all(axis=1) | ~here.any(axis=1) | ~there.any(axis=1)
    return same


def _added(blocks: Sequence[IndexShard], move: Move, factory: str, size: int) -> Iterator[IndexShard]:
    """Yield the blocks after a move. The last one grows in place: who holds its former state asks for its former rows."""
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
