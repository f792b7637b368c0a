"""Lock a root, so that only one process at a time changes its generations."""

import contextlib
from collections.abc import Iterator

from readapt_ray import generations, leases
from readapt_ray.errors import ArtifactConflictError
from readapt_ray.generations import FOLDER_NAME, Generation
from readapt_ray.progress import ProgressReporter
from readapt_ray.storage import Location

LOCK_NAME = "refreshing.json"


@contextlib.contextmanager
def locked(root: Location) -> Iterator[leases.Lease]:
    """Hold the lock of a root during the `with` block. The lock of a killed process is taken over.

    After an error the lock file `refreshing.json` stays, but the next process can take it over at once.

    Raises:
        ArtifactConflictError: another process refreshes or cleans the root, or another program wrote the lock file.
    """
    file = root / LOCK_NAME
    if leases.is_foreign(file):
        raise ArtifactConflictError(
            f"{file} is there, and readapt did not write it; move it away, or give another folder"
        )
    before = leases.wait_until_dead(file, root)
    fields = {"stage": "refresh", "seconds_before": 0.0}
    with leases.Lease(file, root, ProgressReporter("refresh"), before=before, fields=fields) as lease:
        yield lease
    file.delete()


def publish(root: Location, there: list[Generation], new: Generation, lock: leases.Lease) -> Generation:
    """Make a generation the present one by writing `refresh.json`: the generations `there`, then the new one.

    Raises:
        ArtifactConflictError: another process has taken over the lock. Then nothing is written.
    """
    lock.confirm()
    generations.write(root, [*there, new])
    return new


def next_number(root: Location, there: list[Generation]) -> int:
    """Return the number of the next generation.

    If `refresh.json` was removed, there are folders of generations that no list names. They must be neither resumed nor
    overwritten, so the next number is above theirs.
    """
    number = 1 + max((each.number for each in there), default=0)
    if len(there) > 1:
        return number
    numbers = [int(name) for name in (root / FOLDER_NAME).children()[1] if name.isdecimal()]
    latest = max(numbers, default=0)
    return latest + 1 if latest > number else number
