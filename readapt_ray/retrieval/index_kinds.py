"""Choose the kind of FAISS index for a corpus, and compute its memory and the size of its shards.

In: a kind, the number of vectors and their dimension, and the memory and recall that the user wants.
Out: an `IndexSpec`: a FAISS factory string, and the search parameter that trades time for recall.
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
"""Below this many vectors every kind becomes flat, since another kind would not be faster."""
_EXACT_UP_TO = 200_000
"""Most vectors for which `auto` is exact: some 10 ms per query on one core."""
_GRAPH_UP_TO = 5_000_000
"""Most vectors for which `auto` builds graphs. With more, building takes too long."""
_HNSW_LINKS = 32
_RERANKED = 8
"""Candidates per result that a refined index ranks again by its finer vectors."""
_MAX_LISTS = 65_536
_VECTORS_PER_LIST = 39
"""Fewest training vectors per list: with fewer, FAISS warns."""
TRAINING_BYTES = 8 << 30
"""Most bytes of float32 vectors to train inverted lists and codes on, in one task."""
_FLAT_SHARD_BYTES = 512 << 20
_SEARCHED_SHARD_BYTES = 8 << 30
_SEARCHED_SHARD_ROWS = (1 << 20, 4 << 20)
"""Least and most vectors in a shard of an approximate index. Each shard adds a graph or set of lists to search."""
_CPU_BYTES = 4 << 30
"""Bytes of shard memory per CPU of the task that builds it."""
_CPU_ROWS = 1 << 18
"""Vectors of an approximate shard per CPU of the task that builds it. Adding vectors takes most of its time."""


@dataclass(frozen=True, kw_only=True)
class IndexKind:
    """One kind of index that a user can choose."""

    name: str
    factory: str
    """FAISS factory string. {vectors} is the storage of vectors; {lists} and {codes} are chosen by size."""
    is_exact: bool
    """Whether its results equal exact search, if vectors are stored in float32."""
    depth_parameter: str | None = None
    """FAISS search parameter that trades time for recall; None for an exact kind."""
    refined: bool = False
    """Whether finer vectors are kept beside the codes by default, to rank results again."""


KINDS: tuple[IndexKind, ...] = (
    IndexKind(name="flat", factory="Flat", is_exact=True),
    IndexKind(name="ivf-flat", factory="IVF{lists},{vectors}", is_exact=False, depth_parameter="nprobe"),
    IndexKind(name="ivf-pq", factory="IVF{lists},PQ{codes}x8", is_exact=False, depth_parameter="nprobe", refined=True),
    IndexKind(name="hnsw", factory="HNSW{links},{vectors}", is_exact=False, depth_parameter="efSearch"),
    IndexKind(name="rabitq", factory="IVF{lists},RaBitQ", is_exact=False, depth_parameter="nprobe", refined=True),
)


def index_kind(name: str) -> IndexKind:
    """Return the kind of index with a name. `auto` is not a kind: `choose` replaces it.

    Raises:
        InputError: no kind has that name.
    """
    for kind in KINDS:
        if kind.name == name:
            return kind
    raise InputError(f"kind = {name!r}; it must be one of auto, {', '.join(kind.name for kind in KINDS)}")


@dataclass(frozen=True, kw_only=True)
class IndexOptions:
    """The index that the user wants."""

    kind: str = "flat"
    storage: Storage = "float32"
    """Type of the vectors in flat, ivf-flat and hnsw, and of those by which ivf-pq and rabitq rank again."""
    refine: bool = True
    """Whether ivf-pq and rabitq also keep vectors, to rank their results again."""
    code_bytes: int | None = None
    """Bytes per code of ivf-pq; by default a quarter of the dimension."""
    factory: str | None = None
    """A FAISS factory string to use unchanged; None builds one from the other options."""
    depth: int | None = None
    """nprobe or efSearch; by default the least that reaches `min_recall`."""
    min_recall: float = 0.95
    """Least recall at 10 and at 100."""
    is_lossless: bool = False
    """Whether `storage` keeps the vectors as the encoder wrote them, without rounding."""


@dataclass(frozen=True, kw_only=True)
class IndexSpec:
    """How to build a shard."""

    factory: str
    depth_parameter: str | None
    """Name of its search parameter, nprobe or efSearch; None without one."""
    is_exact: bool
    """Whether its search is exact, so that its recall is not measured."""
    reranked: int = 1
    """Candidates per result that a refined index ranks again; 1 without refinement."""


def index_spec(options: IndexOptions, num_vectors: int, dimension: int) -> IndexSpec:
    """Return how to build an index of `num_vectors` vectors, whether or not it is cut into shards.

    Below 1,000 vectors every kind becomes flat. A `factory` in the options is used unchanged.

    Args:
        options: the index that the user wants; its kind is not `auto`.
        num_vectors: vectors of all shards together.
        dimension: numbers in a vector.

    Raises:
        InputError: the kind is unknown, or `code_bytes` does not divide the dimension.
    """
    if options.factory is not None:
        parameter = "nprobe" if "IVF" in options.factory else "efSearch" if "HNSW" in options.factory else None
        reranked = _RERANKED if "Refine" in options.factory or "RFlat" in options.factory else 1
        return IndexSpec(
            factory=options.factory, depth_parameter=parameter, is_exact=options.factory == "Flat", reranked=reranked
        )
    kind = index_kind(options.kind)
    vectors = _QUANTIZERS[options.storage]
    if kind.is_exact or num_vectors < _FLAT_BELOW:
        return IndexSpec(
            factory=vectors, depth_parameter=None, is_exact=options.storage == "float32" or options.is_lossless
        )
    codes = options.code_bytes or _default_codes(dimension)
    if kind.name == "ivf-pq" and dimension % codes:
        raise InputError(
            f"code_bytes = {codes} does not divide the {dimension} numbers of a vector; give one that does"
        )
    factory = kind.factory.format(lists=_lists(num_vectors, dimension), codes=codes, links=_HNSW_LINKS, vectors=vectors)
    if kind.refined and options.refine:
        return IndexSpec(
            factory=f"{factory},Refine({vectors})",
            depth_parameter=kind.depth_parameter,
            is_exact=False,
            reranked=_RERANKED,
        )
    return IndexSpec(factory=factory, depth_parameter=kind.depth_parameter, is_exact=False)


def is_flat(factory: str) -> bool:
    """Return whether a factory string is Flat, SQfp16 or SQ8: a query is compared with every vector."""
    return factory in _QUANTIZERS.values()


def same_codes(factory: str, other: str) -> bool:
    """Return whether two factory strings are equal but for the number of inverted lists.

    True for `IVF100,PQ96x8` and `IVF200,PQ96x8`, and for equal strings.
    """
    one, two = (re.sub(r"IVF\d+", "IVF", each) for each in (factory, other))
    return one == two


def default_storage(kind: str, vector_dtype: str | None) -> Storage:
    """Return the default storage of an index: a flat one keeps float16 vectors; all others store float32.

    Args:
        kind: name of the kind.
        vector_dtype: dtype of the vectors to index; None if unknown.
    """
    return "float16" if vector_dtype == "float16" and kind == "flat" else "float32"


def shard_rows(options: IndexOptions, num_vectors: int, dimension: int) -> int:
    """Return the vectors per shard: as many as one task holds, so that all shards have about the same size.

    A flat shard takes at most 512 MiB, so that it loads quickly. An approximate one has at most 4 million vectors of up
    to 512 numbers, and 1 million of 2,048 numbers or more. Shards may be smaller, since all get about the same number.

    Args:
        options: a `factory` other than `Flat` counts as approximate.
        num_vectors: vectors of the whole index; with 0, the largest size is returned.
        dimension: numbers in a vector.
    """
    is_flat = options.factory == "Flat" or (options.factory is None and options.kind == "flat")
    if is_flat:
        most = max(1, _FLAT_SHARD_BYTES // (_ELEMENT_BYTES[options.storage] * dimension))
    else:
        least, most = _SEARCHED_SHARD_ROWS
        most = min(most, max(least, _SEARCHED_SHARD_BYTES // (4 * dimension)))
    return max(1, math.ceil(num_vectors / math.ceil(num_vectors / most))) if num_vectors else most


def shard_bytes(options: IndexOptions, dimension: int, num_rows: int) -> float:
    """Return the bytes of a shard in memory, without ids. With a user's factory string, assume float32 vectors."""
    return num_rows * (4.0 * dimension if options.factory else vector_bytes(options, dimension))


def shard_cpus(options: IndexOptions, dimension: int, num_rows: int) -> int:
    """Return the CPUs of a task that builds a shard of an approximate index.

    That is one per 4 GiB of the shard and its copy while it is written, or one per 262,144 vectors if that is more.
    """
    return max(1, math.ceil(max(2 * shard_bytes(options, dimension, num_rows) / _CPU_BYTES, num_rows / _CPU_ROWS)))


def _lists(num_vectors: int, dimension: int) -> int:
    """Choose the number of lists by FAISS's guidance: 4 sqrt(num_vectors), with 39 training vectors per list at least.

    The training vectors must fit one task.
    """
    trained = min(num_vectors, TRAINING_BYTES // (4 * dimension)) // _VECTORS_PER_LIST
    return max(1, min(int(4 * math.sqrt(num_vectors)), trained, _MAX_LISTS))


def _default_codes(dimension: int) -> int:
    return next(size for size in range(max(1, dimension // 4), 0, -1) if dimension % size == 0)


def vector_bytes(options: IndexOptions, dimension: int) -> float:
    """Return the bytes of memory per vector, without ids, by kind and storage; `factory` is ignored."""
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
    """Choose the kind for `auto`: the kind that is usually fastest among those that fit the memory.

    That is exact search up to 200,000 vectors or with recall 1, graphs up to 5 million vectors, and inverted lists
    above; codes if memory is short. The recall of the chosen index is still measured.

    Args:
        num_vectors: of the corpus.
        dimension: numbers in a vector.
        memory_bytes: most memory of the index; None for no limit.
        min_recall: recall at 10 and 100 that it must reach.

    Raises:
        InputError: no kind fits the memory; the message says how much the smallest takes.
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
