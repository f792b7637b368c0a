"""Write an artifact of vectors again without its dead rows (rows of passages that changed or were deleted).

In: vectors, some of whose files are shared with an earlier artifact and have dead rows. Out: the same vectors, with the
same fingerprint, in another folder. A file without dead rows is shared. Each other file is written by a Ray task, which
holds it in memory.
"""

from readapt_ray.artifacts import Artifact, Workspace, produce_again
from readapt_ray.cluster import connection, on_worker
from readapt_ray.cluster.bounded_tasks import run_bounded
from readapt_ray.dead_rows import is_partly, name_without_mark
from readapt_ray.retrieval import shard_ledger
from readapt_ray.retrieval.footers import map_in_threads
from readapt_ray.retrieval.vector_files import write_live
from readapt_ray.shared_files import share
from readapt_ray.storage import Location


def num_dead(artifact: Artifact) -> int:
    """Return the number of dead rows (vectors of changed or deleted passages) in an artifact, from its manifest."""
    return int(artifact.manifest.details.get("num_dead", 0))


def compact(artifact: Artifact, output: str) -> Artifact:
    """Write the same artifact without dead rows into another folder; return it, or what is already there.

    The source stays as it is.

    Args:
        artifact: vectors, the output of the embed stage.
        output: the other folder.

    Raises:
        CorruptFileError: a file was cut short or altered.
    """

    def work(workspace: Workspace) -> None:
        source, target = (on_worker.absolute(each) / "vectors" for each in (artifact.location, workspace.location))
        there = {name for name, _ in target.listing(".parquet")}
        names = [name for name, _ in source.listing(".parquet") if name_without_mark(name) not in there]
        map_in_threads(
            lambda name: share(source / name, target / name), [each for each in names if not is_partly(each)]
        )
        _write_live([each for each in names if is_partly(each)], source, target)
        num_bytes = shard_ledger.write_compacted(artifact.location, workspace.location)
        workspace.counts |= artifact.manifest.counts | {"num_bytes": num_bytes}
        workspace.details |= artifact.manifest.details | {"num_dead": 0}

    return produce_again(artifact, output, work)


def _write_live(names: list[str], source: Location, target: Location) -> None:
    if not names:
        return
    import ray

    num_at_once = max(1, connection.connect().num_cpus)
    connection.check_seen_by_all(target)
    task = ray.remote(num_cpus=1)(write_live)
    for _ in run_bounded(lambda name: task.remote(source / name, target / name_without_mark(name)), names, num_at_once):
        pass
