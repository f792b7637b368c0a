"""Run a limited number of Ray tasks at a time, so that their results take bounded memory."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from readapt_ray.cluster import connection

T = TypeVar("T")


def run_bounded(start: Callable[[T], Any], items: Iterable[T], num_at_once: int) -> Iterator[Any]:
    """Run one Ray task per item; yield the results in the order in which the tasks end.

    If the caller stops early or an error is raised, the running tasks are cancelled.

    Args:
        start: starts the task of an item; returns the Ray reference to its result.
        items: one item per task.
        num_at_once: most tasks that run at the same time; 1 or more.

    Raises:
        ReadaptError: the error of a task, with its own type and message; a WorkerError for other errors.
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
    """Cancel Ray tasks, the last one first.

    The order matters: Ray 2.60 aborts this process if a waiting task is cancelled while it gets the CPU of a task that
    was just cancelled or that just ended.

    Args:
        running: references or streams of tasks that have not ended, in the order in which they were started.
    """
    import ray

    for each in reversed(running):
        ray.cancel(each)
