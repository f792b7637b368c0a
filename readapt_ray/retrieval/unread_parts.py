"""Which parts of a corpus, and which files of its earlier vectors, need not be read, since nothing in them changed.

A part of passages is known by the digest of its rows, and a file of vectors by the digests of the parts that hold its
passages. If all of these are in the corpus as it is now, each of its vectors belongs to a passage that is there. In memory:
the digests.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace

from readapt_ray.retrieval.parquet_rows import ParquetRows
from readapt_ray.retrieval.shard_ledger import Origin


@dataclass(frozen=True)
class EarlierVectors:
    """Vectors of an earlier state of a corpus."""

    rows: ParquetRows
    known: Mapping[str, Mapping[str, int]]
    """The counts of each file, as far as `shards.parquet` says."""
    origins: Mapping[str, Origin]
    """Where the vectors of each file come from, as far as `shards.parquet` says."""


@dataclass(frozen=True)
class ToRead:
    """The passages and the earlier vectors that are to be compared, and what is known of the others."""

    passages: ParquetRows
    """Parts that changed, and those that have vectors in one file with them."""
    earlier: ParquetRows
    """Files of vectors that have passages in these parts."""
    whole: frozenset[str]
    """Files of vectors each of whose passages is there as it was; some of them are to be read for the parts that they touch."""


def to_read(passages: ParquetRows, digests: Mapping[str, str], earlier: EarlierVectors) -> ToRead:
    """Return what is to be read to find which passages have an earlier vector.

    All of it is read unless every earlier file says where its passages are, and every passage had a vector.

    Args:
        passages: of the corpus as it is now.
        digests: of the rows of its parts, by name; empty for a part without one.
        earlier: the earlier vectors.
    """
    rows, known = earlier.rows, earlier.known
    names = {name for name, _ in rows.counts} & known.keys() & earlier.origins.keys()
    sources = {name: frozenset(earlier.origins[name].sources) for name in names}
    if len(sources) < len(rows.counts) or any(
        not each or known[name]["num_left_out"] for name, each in sources.items()
    ):
        return ToRead(passages, rows, frozenset())
    there = set(digests.values()) - {""}
    whole = frozenset(name for name, each in sources.items() if each <= there)
    changed = set().union(*(each for name, each in sources.items() if name not in whole))
    settled = set().union(*sources.values()) - changed - {""}
    left = {digest for digest in digests.values() if digest not in settled}
    touched = {name for name, each in sources.items() if name not in whole or each & left}
    unread = {name for name, digest in digests.items() if digest in settled}
    return ToRead(_without(passages, unread), _without(rows, sources.keys() - touched), whole)


def _without(rows: ParquetRows, names: Set[str]) -> ParquetRows:
    return replace(rows, counts=tuple(each for each in rows.counts if each[0] not in names))
