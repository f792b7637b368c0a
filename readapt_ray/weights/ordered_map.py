"""Map over all cores with results in order, holding no more results in memory than the cores need.

In: a function and its arguments, an iterator that is read as it is used. Out: the results in the
order of the arguments. Each thread computes by itself: what a sum gives must not depend on how many
cores share it, and torch's own threads would slow each other down.
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
    """Apply a function in threads; yield the results in order.

    Args:
        work: what is done to each item; called in threads where torch uses one core.
        items: read one at a time, as results are taken.
        num_threads: how many work at once.
        num_waiting: how many results may wait to be taken besides.

    Yields:
        The results in the order of `items`. The first error ends the work, and is raised in its place.
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
        torch.set_num_threads(before)  # threads that others start later take the number that was set last


class Budget:
    """Limit the bytes in use at once; a request for more waits. A single request is always granted."""

    def __init__(self, num_bytes: int) -> None:
        self._free = self._whole = num_bytes
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def use(self, num_bytes: int) -> Iterator[None]:
        """Hold some of the bytes while the block runs."""
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
