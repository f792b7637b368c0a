"""Run a few Ray tasks at a time, so that memory for their results stays bounded."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from readapt_ray.cluster import connection

T = TypeVar("T")


def run_bounded(start: Callable[[T], Any], items: Iterable[T], num_at_once: int) -> Iterator[Any]:
    """Start a task for each item and yield the results in the order in which tasks end.

    When the caller stops or an error is raised, the tasks that still run are cancelled.

    Args:
        start: starts the task of one item and returns Ray's reference to its result.
        items: what the tasks work on.
        num_at_once: how many run at the same time.

    Raises:
        ReadaptError: the error of a task, with its own type and message.
    """
    import ray

    waiting = list(items)
    running: list[Any] = []
    try:
        while waiting or running:
            while waiting and len(running) < num_at_once:
                running.append(start(waiting.pop(0)))
            ended, running = ray.wait(running)
            yield from ray.get(ended)
    except ray.exceptions.RayError as error:
        raise connection.cause_of(error) from None
    finally:
        cancel(running)


def cancel(running: Sequence[Any]) -> None:
    """Cancel tasks, the last one first.

    Ray 2.60 aborts this process if a task that waits is cancelled at the moment in which it gets the CPU of another one that
    was cancelled, or that ends.

    Args:
        running: references or streams of tasks that have not ended, in the order in which they were started.
    """
    import ray

    for each in reversed(running):
        ray.cancel(each)
