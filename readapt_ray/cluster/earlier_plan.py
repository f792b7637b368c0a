"""Plan which files of earlier vectors a changed corpus shares, and which passages are encoded.

In: passages, and vectors of an earlier state of the corpus. Out: data shards, and the passages that have a vector.
Unchanged parts of the corpus and their vectors are not read (`retrieval/unread_parts.py`). The driver holds one byte
per earlier vector.
"""

import itertools
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from readapt_ray.artifacts import Artifact
from readapt_ray.cluster.earlier_vectors import Changes, Joined, Matches, join_digests
from readapt_ray.cluster.embed_job import EmbedJob
from readapt_ray.retrieval.parquet_rows import ParquetRows
from readapt_ray.retrieval.shard_ledger import counts_and_origins
from readapt_ray.retrieval.shard_plan import DataShard, files_to_keep, plan_fingerprint, plan_rest
from readapt_ray.retrieval.unread_parts import EarlierVectors, ToRead, to_read


def plan_on_earlier(
    job: EmbedJob, passages: ParquetRows, digests: Mapping[str, str], artifact: Artifact
) -> tuple[list[DataShard], EmbedJob, Changes]:
    """Plan the data shards of a corpus that has earlier vectors; shards that are kept files come first.

    A kept file is a file of earlier vectors that the new artifact shares as it is. The files of the join are left in
    `join` in the job's folder.

    Args:
        job: job with all earlier vectors (`job.earlier` is set).
        passages: passages of the corpus.
        digests: digest of the rows of each part of the corpus, by name of the part; empty for a part without one.
        artifact: the earlier vectors.

    Returns:
        The shards, the job with the matches and only the earlier vectors that were read, and counts of changes.
    """
    assert job.earlier is not None
    earlier = EarlierVectors(job.earlier, *counts_and_origins(artifact.location))
    for part in (to_read(passages, digests, earlier), ToRead(passages, earlier.rows, frozenset())):
        joined = join_digests(part.passages, part.earlier, job.output / "join")
        shards, matches = planned(joined, part, earlier, digests, job.rows_per_shard)
        if part.unchanged_files <= {each.kept.name for each in shards if each.kept}:
            break  # otherwise read everything: passages of a file that is not kept must be copied one by one
    changes = _of_all(joined.changes, passages.num_rows - part.passages.num_rows, earlier.rows.num_rows)
    dimension = int(artifact.manifest.details["encoder"]["dimension"])
    plan = plan_fingerprint(shards, artifact.fingerprint)
    return shards, replace(job, earlier=part.earlier, matches=matches, dimension=dimension, plan=plan), changes


def planned(
    joined: Joined, part: ToRead, earlier: EarlierVectors, digests: Mapping[str, str], rows_per_shard: int
) -> tuple[list[DataShard], Matches]:
    """Choose the earlier files to keep, and cut the passages that are not in them into shards.

    Args:
        joined: the join of the passages and the vectors that were read.
        part: which passages and vectors were read.
        earlier: all earlier vectors; a file that the ledger does not know is not kept.
        digests: digest of each part of the corpus, by name.
        rows_per_shard: most passages per shard.

    Returns:
        The shards, kept files first, and the matches for the shards that are encoded.
    """
    kept = files_to_keep(earlier.rows.counts, earlier.file_counts, _is_live(joined, part, earlier.rows), rows_per_shard)
    matches = joined.with_kept_files({each.name for each in kept})
    there = _sources(matches, part, digests) if kept else {}
    shards = []
    for number, each in enumerate(kept):
        sources = earlier.origins[each.name].sources if each.name in part.unchanged_files else there[each.name]
        shards.append(DataShard(number, 0, (), kept=each, sources=sources))
    left = ((first, matches.without_kept_vector(first, size)) for first, size in matches.pieces(part.passages.num_rows))
    rest = plan_rest(part.passages.counts, rows_per_shard, left, number=len(kept))
    return shards + [replace(each, sources=sources_of(each, digests)) for each in rest], matches


def sources_of(shard: DataShard, digests: Mapping[str, str]) -> tuple[str, ...]:
    """Return the digests of the files of the corpus that a shard is cut from, sorted; "" for a file without one.

    Args:
        shard: a shard that is encoded; for a kept file the result is empty.
        digests: digest of each part of the corpus, by name.
    """
    return tuple(sorted({digests.get(each.name, "") for each in shard.ranges}))


def _is_live(joined: Joined, part: ToRead, earlier: ParquetRows) -> NDArray[np.bool_]:
    """Return for each earlier vector whether its passage still exists, unchanged."""
    found = np.ones(earlier.num_rows, bool)
    in_read = dict(zip((name for name, _ in part.earlier.counts), _ranges(part.earlier), strict=True))
    is_live = joined.is_live(part.passages)
    for (name, _), rows in zip(earlier.counts, _ranges(earlier), strict=True):
        if name in in_read and name not in part.unchanged_files:
            found[rows] = is_live[in_read[name]]
    return found


def _ranges(rows: ParquetRows) -> list[slice]:
    ends = np.cumsum([0, *(count for _, count in rows.counts)]).tolist()
    return [slice(*each) for each in itertools.pairwise(ends)]


def _sources(matches: Matches, part: ToRead, digests: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Return for each earlier file that was read the digests of the parts that hold its live passages."""
    ends = np.cumsum([count for _, count in part.passages.counts])
    found: dict[str, set[str]] = defaultdict(set)
    for first, size in matches.pieces(part.passages.num_rows):
        rows, files = matches.passages_and_files(first, size)
        pairs = np.unique(np.stack([np.searchsorted(ends, rows, side="right"), files]), axis=1)
        for passages, vectors in pairs.T.tolist():
            found[part.earlier.counts[vectors][0]].add(digests.get(part.passages.counts[passages][0], ""))
    return {name: tuple(sorted(found[name])) for name, _ in part.earlier.counts}


def _of_all(read: Changes, num_unread: int, num_earlier: int) -> Changes:
    """Return the changes of all passages, from those that were read; passages that were not read are unchanged."""
    num_unchanged = read.num_unchanged + num_unread
    num_deleted = num_earlier - num_unchanged - read.num_changed
    return replace(read, num_unchanged=num_unchanged, num_deleted=num_deleted)
