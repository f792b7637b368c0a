"""Compare two states of a corpus, in this process; a large corpus in Ray tasks, one per partition of the doc_ids."""

from collections.abc import Mapping

from readapt_ray.artifacts import Artifact
from readapt_ray.cluster import connection, on_worker
from readapt_ray.cluster.bounded_tasks import run_bounded
from readapt_ray.records import PASSAGE_SCHEMA
from readapt_ray.retrieval.corpus_changes import Changes, added_up, compare
from readapt_ray.retrieval.footers import listed_footers, row_counts
from readapt_ray.retrieval.parquet_rows import ParquetRows
from readapt_ray.retrieval.shard_ledger import open_vectors
from readapt_ray.retrieval.vector_files import Footer
from readapt_ray.sources.parts import DIGEST

_PART_ROWS = 16_000_000
"""Passages per partition: a task takes 500 MB of memory for each state."""


def compare_corpora(before: Artifact, now: Artifact) -> Changes:
    """Compare two outputs of ingest: count the passages that were added, changed, deleted and kept, and sample some.

    Files whose footers say that both sides have the same rows are not read; their passages count as kept.

    Args:
        before: the earlier state.
        now: the present state.

    Raises:
        CorruptFileError: a file was cut short or altered.
    """
    footers = [listed_footers(each.location, "passages") for each in (before, now)]
    old, new = (
        ParquetRows(on_worker.absolute(each.location / "passages"), row_counts(said))
        for each, said in zip((before, now), footers, strict=True)
    )
    columns = sorted({name for said in footers for name in _kept_columns(said)})
    both = set.intersection(*({each.metadata.get(DIGEST) for each in said.values()} for said in footers)) - {None}
    shared = [{name for name, each in said.items() if each.metadata.get(DIGEST) in both} for said in footers]
    old = ParquetRows(old.folder, tuple((name, count) for name, count in old.counts if name not in shared[0]))
    num_parts = -(-max(old.num_rows, new.num_rows, 1) // _PART_ROWS)
    if num_parts == 1:
        return compare(old, new, columns=columns, shared=shared[1])
    import ray

    num_at_once = connection.connect().num_cpus
    task = ray.remote(num_cpus=1)(compare)
    parts = run_bounded(
        lambda part: task.remote(old, new, part, num_parts, columns=columns, shared=shared[1]),
        range(num_parts),
        num_at_once,
    )
    return added_up(list(parts))


def _kept_columns(footers: Mapping[str, Footer]) -> set[str]:
    """Return the names of the columns that were kept from the source."""
    names = {name for footer in footers.values() for name in footer.schema.names}
    return names - {*PASSAGE_SCHEMA.names, "parent_id"}


def opened(artifact: Artifact, name: str) -> ParquetRows:
    """Return the rows of an artifact's passages or vectors, with an absolute path that tasks on any node can read.

    Row counts come from the artifact's table of footers (or its ledger of vectors); only files that are not listed
    there are opened.

    Args:
        artifact: an output of ingest or embed.
        name: folder in the artifact: "passages" or "vectors".
    """
    folder = on_worker.absolute(artifact.location / name)
    if name == "vectors":
        return ParquetRows(folder, open_vectors(artifact).counts)
    return ParquetRows(folder, row_counts(listed_footers(artifact.location, name)))
