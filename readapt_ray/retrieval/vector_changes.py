"""Find which files of vectors differ from the earlier vectors that `embed --previous` reused.

A file that both artifacts share, with equal dead rows, has the same vectors, so an update of an index need not read it.
In: two ledgers. Out: the other files, before and now.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from readapt_ray.artifacts import Artifact, read_manifest
from readapt_ray.retrieval.parquet_rows import ParquetRows
from readapt_ray.retrieval.shard_ledger import counts_and_origins
from readapt_ray.storage import Location


@dataclass(frozen=True)
class ChangedFiles:
    """The files of vectors that differ between the earlier and the present artifact."""

    before: ParquetRows
    """Files of the earlier artifact that the present one does not share, or shares with other dead rows."""
    now: ParquetRows
    """Files of the present artifact that are not the same in the earlier one."""
    rows: NDArray[np.int64]
    """Number of each row of `now` among the rows of all present vectors."""


def changed_files(artifact: Artifact, vectors: ParquetRows, fingerprint: str) -> ChangedFiles | None:
    """Return the files that differ from the earlier vectors; None if the two cannot be compared by their ledgers.

    That is so if the vectors were not made with these earlier ones as `previous`, or if those are gone or were made
    again.

    Args:
        artifact: the present vectors, the output of `embed`.
        vectors: all of their files.
        fingerprint: fingerprint of the earlier vectors, those that the index to update was made from.
    """
    earlier = artifact.manifest.config.get("previous")
    if not earlier or artifact.manifest.details.get("previous") != fingerprint:
        return None
    location = Location(earlier)
    manifest = read_manifest(location)
    if manifest is None or manifest.fingerprint != fingerprint:
        return None
    before, _ = counts_and_origins(location)
    now, origins = counts_and_origins(artifact.location)
    known = sum(each["num_rows"] for each in before.values()) == manifest.counts["num_vectors"]
    if not known or any(name not in origins for name, _ in vectors.counts):
        return None
    same = {name: origins[name].kept for name, _ in vectors.counts if _is_same(origins[name].kept, before, now[name])}
    left = tuple((name, each["num_rows"]) for name, each in before.items() if name not in set(same.values()))
    changed = tuple(each for each in vectors.counts if each[0] not in same)
    is_changed = np.repeat([name not in same for name, _ in vectors.counts], [count for _, count in vectors.counts])
    return ChangedFiles(
        ParquetRows(location / "vectors", left), replace(vectors, counts=changed), np.flatnonzero(is_changed)
    )


def _is_same(kept: str, before: dict[str, dict[str, int]], now: dict[str, int]) -> bool:
    there = before.get(kept)
    return there is not None and (there["num_rows"], there["num_dead"]) == (now["num_rows"], now["num_dead"])
