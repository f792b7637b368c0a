"""Kinds of FAISS index: which there are, what each costs, and which suits a corpus.

Enters: a kind, the number of vectors and their dimension, and what the user wants of memory and recall.
Leaves: an `IndexSpec`, a FAISS factory string and the search parameter that trades time for recall.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from readapt_ray.errors import InputError

Storage = Literal["float32", "float16", "int8"]
_ELEMENT_BYTES = {"float32": 4, "float16": 2, "int8": 1}
_QUANTIZERS = {"float32": "Flat", "float16": "SQfp16", "int8": "SQ8"}

_FLAT_BELOW = 1_000
"""Vectors of a shard under which every kind is flat: there is nothing to win."""
_EXACT_UP_TO = 200_000
"""Vectors up to which `auto` is exact: some 10 ms a query on one core."""
_GRAPH_UP_TO = 5_000_000
"""Vectors up to which `auto` builds graphs; beyond, building them takes too long."""
_HNSW_LINKS = 32
_RERANKED = 8
"""Candidates a result that are ranked again by the finer vectors."""
_MAX_LISTS = 65_536
_VECTORS_PER_LIST = 39
"""Below this many training vectors per list FAISS warns."""
TRAINING_BYTES = 8 << 30
"""Bytes of float32 vectors that inverted lists and codes are trained on at most, in one task."""
_FLAT_SHARD_BYTES = 512 << 20
_SEARCHED_SHARD_BYTES = 8 << 30
_SEARCHED_SHARD_ROWS = (1 << 20, 4 << 20)
"""Vectors in a shard of an approximate index, at least and at most: each more shard is one more graph or set of lists."""
_CPU_BYTES = 4 << 30
"""Memory of a shard for which its task takes another CPU."""
_CPU_ROWS = 1 << 18
"""Vectors of an approximate shard for which its task takes another CPU: most of its time is spent on adding them."""


@dataclass(frozen=True, kw_only=True)
class IndexKind:
    """One kind of index that can be asked for."""

    name: str
    factory: str
    """FAISS factory string; {vectors} is how vectors are stored, {lists} and {codes} are chosen by size."""
    is_exact: bool
    """Whether it finds what exact search finds, when vectors are stored in float32."""
    depth: str | None = None
    """FAISS search parameter that buys recall with time."""
    refined: bool = False
    """Whether finer vectors are kept beside the codes to rank again, unless asked otherwise."""


KINDS: tuple[IndexKind, ...] = (
    IndexKind(name="flat", factory="Flat", is_exact=True),
    IndexKind(name="ivf-flat", factory="IVF{lists},{vectors}", is_exact=False, depth="nprobe"),
    IndexKind(name="ivf-pq", factory="IVF{lists},PQ{codes}x8", is_exact=False, depth="nprobe", refined=True),
    IndexKind(name="hnsw", factory="HNSW{links},{vectors}", is_exact=False, depth="efSearch"),
    IndexKind(name="rabitq", factory="IVF{lists},RaBitQ", is_exact=False, depth="nprobe", refined=True),
)


def index_kind(name: str) -> IndexKind:
    """Return the row of a kind.

    Raises:
        InputError: there is none of that name.
    """
    for kind in KINDS:
        if kind.name == name:
            return kind
    raise InputError(f"kind = {name!r}; it must be one of auto, {', '.join(kind.name for kind in KINDS)}")


@dataclass(frozen=True, kw_only=True)
class IndexOptions:
    """What the user asked for."""

    kind: str = "flat"
    storage: Storage = "float32"
    """How vectors are stored in flat, ivf-flat and hnsw, and what ivf-pq and rabitq rank again by."""
    refine: bool = True
    """Whether ivf-pq and rabitq keep vectors to rank again by."""
    code_bytes: int | None = None
    """Bytes of a code of ivf-pq; by default a quarter of the dimension."""
    factory: str | None = None
    """A FAISS factory string to take as it is."""
    depth: int | None = None
    """nprobe or efSearch; by default the least that reaches the recall."""
    min_recall: float = 0.95
    """Share of the 10 best, and of the 100 best, that must be found."""
    is_lossless: bool = False
    """Whether the vectors came in the storage's own precision, or a lower one."""


@dataclass(frozen=True, kw_only=True)
class IndexSpec:
    """How a shard is made."""

    factory: str
    depth: str | None
    """nprobe, efSearch or none."""
    is_exact: bool
    """Whether it needs no measuring."""
    reranked: int = 1
    """Candidates a result that a refined index ranks again."""


def index_spec(options: IndexOptions, num_vectors: int, dimension: int) -> IndexSpec:
    """Return how to make an index of so many vectors, cut into shards or not.

    Raises:
        InputError: the kind is unknown, or `code_bytes` does not divide the dimension.
    """
    if options.factory is not None:
        depth = "nprobe" if "IVF" in options.factory else "efSearch" if "HNSW" in options.factory else None
        reranked = _RERANKED if "Refine" in options.factory or "RFlat" in options.factory else 1
        return IndexSpec(factory=options.factory, depth=depth, is_exact=options.factory == "Flat", reranked=reranked)
    kind = index_kind(options.kind)
    vectors = _QUANTIZERS[options.storage]
    if kind.is_exact or num_vectors < _FLAT_BELOW:
        return IndexSpec(factory=vectors, depth=None, is_exact=options.storage == "float32" or options.is_lossless)
    codes = options.code_bytes or _default_codes(dimension)
    if kind.name == "ivf-pq" and dimension % codes:
        raise InputError(
            f"code_bytes = {codes} does not divide the {dimension} numbers of a vector; give one that does"
        )
    factory = kind.factory.format(lists=_lists(num_vectors, dimension), codes=codes, links=_HNSW_LINKS, vectors=vectors)
    if kind.refined and options.refine:
        return IndexSpec(factory=f"{factory},Refine({vectors})", depth=kind.depth, is_exact=False, reranked=_RERANKED)
    return IndexSpec(factory=factory, depth=kind.depth, is_exact=False)


def is_flat(factory: str) -> bool:
    """Return whether a factory string makes an index that compares with every vector."""
    return factory in _QUANTIZERS.values()


def same_codes(factory: str, other: str) -> bool:
    """Return whether two factory strings make the same codes, ranked again by the same vectors, in however many lists."""
    one, two = (re.sub(r"IVF\d+", "IVF", each) for each in (factory, other))
    return one == two


def default_storage(kind: str, vector_dtype: str | None) -> Storage:
    """Return how vectors are stored where the options do not say: a flat index keeps float16 vectors as they are."""
    return "float16" if vector_dtype == "float16" and kind == "flat" else "float32"


def shard_rows(options: IndexOptions, num_vectors: int, dimension: int) -> int:
    """Return vectors per shard: as many as one task holds, in shards of one size.

    A flat shard takes 512 MiB as it is stored, so that it loads quickly. An approximate one has 4 million vectors up to
    512 numbers, and 1 million from 2,048 numbers on.
    """
    is_flat = options.factory == "Flat" or (options.factory is None and options.kind == "flat")
    if is_flat:
        most = max(1, _FLAT_SHARD_BYTES // (_ELEMENT_BYTES[options.storage] * dimension))
    else:
        least, most = _SEARCHED_SHARD_ROWS
        most = min(most, max(least, _SEARCHED_SHARD_BYTES // (4 * dimension)))
    return max(1, math.ceil(num_vectors / math.ceil(num_vectors / most))) if num_vectors else most


def shard_bytes(options: IndexOptions, dimension: int, num_rows: int) -> float:
    """Return the bytes of a shard in memory, without ids; of a factory string, as if it kept float32."""
    return num_rows * (4.0 * dimension if options.factory else vector_bytes(options, dimension))


def shard_cpus(options: IndexOptions, dimension: int, num_rows: int) -> int:
    """Return the CPUs of a task that makes a shard of an index that is trained: one per 4 GiB of it and of the copy that is
    written, and one per 262,144 vectors.
    """
    return max(1, math.ceil(max(2 * shard_bytes(options, dimension, num_rows) / _CPU_BYTES, num_rows / _CPU_ROWS)))


def _lists(num_vectors: int, dimension: int) -> int:
    """Choose the number of lists by FAISS's guidance: some four square roots, and 39 vectors per list to train on,
    which must fit one task.
    """
    trained = min(num_vectors, TRAINING_BYTES // (4 * dimension)) // _VECTORS_PER_LIST
    return max(1, min(int(4 * math.sqrt(num_vectors)), trained, _MAX_LISTS))


def _default_codes(dimension: int) -> int:
    return next(size for size in range(max(1, dimension // 4), 0, -1) if dimension % size == 0)


def vector_bytes(options: IndexOptions, dimension: int) -> float:
    """Return the bytes that a vector takes in memory, without ids."""
    stored = _ELEMENT_BYTES[options.storage] * dimension
    refined = stored if options.refine else 0
    return {
        "flat": stored,
        "ivf-flat": stored + 8,
        "hnsw": stored + 8 * _HNSW_LINKS,
        "ivf-pq": (options.code_bytes or _default_codes(dimension)) + 8 + refined,
        "rabitq": dimension / 8 + 16 + refined,
    }[options.kind]


def choose(num_vectors: int, dimension: int, *, memory_bytes: float | None, min_recall: float) -> IndexOptions:
    """Choose the kind for `auto`: the quickest kind, as the field knows them, that fits the memory.

    Exact up to 200,000 vectors or where recall 1 is asked for; then graphs, up to 5 million; then inverted
    lists, and codes where memory is short. What is chosen is still measured.

    Raises:
        InputError: nothing fits the memory; the message says what would.
    """
    candidates = list(_candidates(num_vectors, min_recall))
    for options in candidates:
        if memory_bytes is None or vector_bytes(options, dimension) * num_vectors <= memory_bytes:
            return options
    least = min(vector_bytes(options, dimension) for options in candidates) * num_vectors
    raise InputError(
        f"memory_gb = {(memory_bytes or 0) / 1e9:g} is too little for {num_vectors:,} vectors of {dimension} numbers at recall "
        f"{min_recall:g}: the smallest index takes {least / 1e9:.3g} GB; raise it, or embed with fewer --dimensions"
    )


def _candidates(num_vectors: int, min_recall: float) -> Iterator[IndexOptions]:
    storages: tuple[Storage, ...] = ("float32", "float16", "int8")
    if num_vectors <= _EXACT_UP_TO or min_recall >= 1:
        yield IndexOptions(kind="flat", min_recall=min_recall)
    if min_recall >= 1:
        return
    kinds = ["hnsw", "ivf-flat"] if num_vectors <= _GRAPH_UP_TO else ["ivf-flat"]
    for kind in kinds:
        for storage in storages:
            yield IndexOptions(kind=kind, storage=storage, min_recall=min_recall)
    yield IndexOptions(kind="ivf-pq", refine=False, min_recall=min_recall)
    yield IndexOptions(kind="rabitq", refine=False, min_recall=min_recall)
