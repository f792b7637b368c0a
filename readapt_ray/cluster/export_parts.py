"""Send the files of an export: by Ray tasks, a file each, or in this process if there is little to send.

The doc_ids of the corpus are read by one task; its arrays are in Ray's object store, once per node.
"""

from collections.abc import Callable, Iterator

from readapt_ray.cluster import connection
from readapt_ray.cluster.bounded_tasks import run_bounded
from readapt_ray.storage import Location
from readapt_ray.targets.sending import ROWS, Done, ExportJob, delete_lost, look_up, send_file

_SMALL_BYTES = 64 << 20
"""Float32 vectors that are sent without starting Ray."""


def is_small(job: ExportJob) -> bool:
    """Return whether the vectors are few enough for this process."""
    return job.vectors.num_rows * job.layout.dimension * 4 <= _SMALL_BYTES


def send_all(job: ExportJob, *, max_writers: int, report: Callable[[int], None]) -> Done:
    """Send and delete what is not noted as done.

    Args:
        job: what is sent.
        max_writers: how many tasks may write at once.
        report: called with the number of rows that are done.

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
