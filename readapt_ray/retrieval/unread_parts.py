"""Find the parts of a corpus, and the files of its earlier vectors, that are unchanged and need not be read.

A part of passages is identified by the digest of its rows. A file of vectors lists the digests of the parts that hold
its passages. If the present corpus has all of these parts, every vector of the file belongs to a present passage. Only
digests are in memory.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace

from readapt_ray.retrieval.parquet_rows import ParquetRows
from readapt_ray.retrieval.shard_ledger import Origin


@dataclass(frozen=True)
class EarlierVectors:
    """The vectors of an earlier state of a corpus, and their ledger."""

    rows: ParquetRows
    file_counts: Mapping[str, Mapping[str, int]]
    """Counts of each file, by name, as far as `shards.parquet` has them."""
    origins: Mapping[str, Origin]
    """Origin of the vectors of each file, by name, as far as `shards.parquet` has it."""


@dataclass(frozen=True)
class ToRead:
    """The passages and earlier vectors that must be read and compared; all others are unchanged."""

    passages: ParquetRows
    """Parts that changed, and parts whose vectors share a file with a changed part."""
    earlier: ParquetRows
    """Files of vectors that have passages in these parts, or in parts that are gone."""
    unchanged_files: frozenset[str]
    """Files of vectors all of whose passages are unchanged. Some are in `earlier` too, if they touch such parts."""


def to_read(passages: ParquetRows, digests: Mapping[str, str], earlier: EarlierVectors) -> ToRead:
    """Choose what must be read to find which passages have an earlier vector.

    Everything must be read unless each earlier file lists its parts and had a usable vector for every passage.

    Args:
        passages: passages of the present corpus.
        digests: digest of the rows of each of its parts, by name; empty for a part without one.
        earlier: the earlier vectors.
    """
    rows, file_counts = earlier.rows, earlier.file_counts
    names = {name for name, _ in rows.counts} & file_counts.keys() & earlier.origins.keys()
    sources = {name: frozenset(earlier.origins[name].sources) for name in names}
    if len(sources) < len(rows.counts) or any(
        not each or file_counts[name]["num_left_out"] for name, each in sources.items()
    ):
        return ToRead(passages, rows, frozenset())
    there = set(digests.values()) - {""}
    unchanged_files = frozenset(name for name, each in sources.items() if each <= there)
    changed = set().union(*(each for name, each in sources.items() if name not in unchanged_files))
    settled = set().union(*sources.values()) - changed - {""}
    left = {digest for digest in digests.values() if digest not in settled}
    touched = {name for name, each in sources.items() if name not in unchanged_files or each & left}
    unread = {name for name, digest in digests.items() if digest in settled}
    return ToRead(_without(passages, unread), _without(rows, sources.keys() - touched), unchanged_files)


def _without(rows: ParquetRows, names: Set[str]) -> ParquetRows:
    return replace(rows, counts=tuple(each for each in rows.counts if each[0] not in names))
