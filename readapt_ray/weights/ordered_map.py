"""Apply a function to items in threads, with results in order and few of them in memory at once.

In: a function, and an iterator of items that is read as needed. Out: the results in the order of the
items. Each thread gives torch one core: the result of a sum must not depend on how many cores share it,
and threads of torch would compete with ours.
"""

import collections
import contextlib
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered_map(
    work: Callable[[Item], Result], items: Iterable[Item], *, num_threads: int, num_waiting: int = 0
) -> Generator[Result]:
    """Apply a function to items in threads, and yield the results in the order of the items.

    Work begins when the first result is taken. If the generator is closed early, items that have not begun are dropped.

    Args:
        work: the function; it is called in threads in which torch uses one core.
        items: the items, read one at a time as results are taken.
        num_threads: how many items are worked on at once.
        num_waiting: how many more results may wait to be taken.

    Yields:
        The results in the order of `items`. An error of `work` is raised in place of its result and ends the work.
    """
    with _threads(num_threads) as pool:
        pending: collections.deque[Future[Result]] = collections.deque()
        try:
            for item in items:
                pending.append(pool.submit(work, item))
                if len(pending) >= num_threads + num_waiting:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for each in pending:
                each.cancel()


@contextlib.contextmanager
def _threads(num_threads: int) -> Iterator[ThreadPoolExecutor]:
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)  # threads that start later take the number that any thread set last


class Budget:
    """A limit on the bytes that threads use at once. A request above the limit waits until it is alone."""

    def __init__(self, num_bytes: int) -> None:
        self._free = self._whole = num_bytes
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def use(self, num_bytes: int) -> Iterator[None]:
        """Wait until `num_bytes` are free, and hold them during the `with` block; more than the limit counts as all."""
        held = min(num_bytes, self._whole)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= held)
            self._free -= held
        try:
            yield
        finally:
            with self._changed:
                self._free += held
                self._changed.notify_all()
