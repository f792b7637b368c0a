"""Send the files of an export to a vector database, in Ray tasks, one per file; a small export from this process.

One task reads the doc_ids of the corpus. Its arrays are in Ray's object store, once per node.
"""

from collections.abc import Callable, Iterator

from readapt_ray.cluster import connection
from readapt_ray.cluster.bounded_tasks import run_bounded
from readapt_ray.storage import Location
from readapt_ray.targets.sending import ROWS, Done, ExportJob, delete_lost, look_up, send_file

_SMALL_BYTES = 64 << 20
"""An export with at most this size of float32 vectors is sent without Ray."""


def is_small(job: ExportJob) -> bool:
    """Return whether the export is sent from this process, without Ray: at most 64 MiB of float32 vectors."""
    return job.vectors.num_rows * job.layout.dimension * 4 <= _SMALL_BYTES


def send_all(job: ExportJob, *, max_writers: int, report: Callable[[int], None]) -> Done:
    """Send new rows to the database and delete lost ones, except those that an earlier run recorded as done.

    Args:
        job: the vectors, the database and the layout of its rows.
        max_writers: most tasks that write at the same time.
        report: called with the number of rows done so far.

    Raises:
        TargetError: the database cannot be reached or refuses something.
    """
    total = Done(0, 0, 0, 0)
    for done in _here(job) if is_small(job) else _on_ray(job, max_writers):
        total = Done(*(getattr(total, name) + value for name, value in vars(done).items()))
        report(total.num_rows)
    return total


def _here(job: ExportJob) -> Iterator[Done]:
    lookups = look_up(job)
    for number in range(len(job.vectors.counts)):
        yield send_file(job, lookups, number)
    for number in range(len(job.previous.counts) if job.previous else 0):
        yield delete_lost(job, lookups, number)


def _on_ray(job: ExportJob, max_writers: int) -> Iterator[Done]:
    num_cpus = connection.connect().num_cpus
    folders = [job.output / ROWS, *([Location(job.address.folder)] if job.address.folder else [])]
    for folder in folders:
        connection.check_seen_by_all(folder)
    import ray

    num_at_once = max(1, min(max_writers, num_cpus))
    shared = ray.put(job)
    lookups = ray.remote(num_cpus=1)(look_up).remote(shared)
    send, delete = ray.remote(num_cpus=1)(send_file), ray.remote(num_cpus=1)(delete_lost)
    numbers = range(len(job.vectors.counts))
    yield from run_bounded(lambda number: send.remote(shared, lookups, number), numbers, num_at_once)
    numbers = range(len(job.previous.counts) if job.previous else 0)
    yield from run_bounded(lambda number: delete.remote(shared, lookups, number), numbers, num_at_once)
