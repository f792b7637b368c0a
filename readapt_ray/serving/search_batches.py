"""Search for many requests in one batch: a scan of an index for 64 queries costs little more than for one.

While a search runs, other requests wait; when it ends, the waiting ones form the next batch. If no search runs, a
request is searched at once. A request with many queries is spread over several batches: all waiting requests get equal
shares of a batch.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from readapt_ray.retrieval.exact import Hits, joined

MAX_QUERIES = 64

Search = Callable[[NDArray[np.float32], int], Awaitable[Hits]]


@dataclass(eq=False)
class _Waiting:
    queries: NDArray[np.float32]
    """Queries that were not searched yet, [Q, D]."""
    top_k: int
    found: asyncio.Future[Hits]
    parts: list[Hits] = field(default_factory=list)
    """Results of the queries that were searched already."""

    def fits(self, other: "_Waiting") -> bool:
        """Return whether both requests can share a batch: they have the same top_k and the same dimension."""
        return self.top_k == other.top_k and self.queries.shape[1:] == other.queries.shape[1:]


class SearchBatches:
    """A queue of searches of one index, which runs the waiting ones together.

    Args:
        search: returns the k best per query [Q, D]; called for one batch after the other.
    """

    def __init__(self, search: Search) -> None:
        self._search = search
        self._waiting: deque[_Waiting] = deque()
        self._task: asyncio.Task[None] | None = None

    async def __call__(self, queries: NDArray[np.float32], top_k: int) -> Hits:
        """Return the k best per query [Q, D] of a request, in the order of its queries.

        Only requests with the same `top_k` and dimension share a batch. If the caller is cancelled, its queries leave
        the queue.

        Raises:
            Exception: whatever the search raised.
        """
        loop = asyncio.get_running_loop()
        mine = _Waiting(queries, top_k, loop.create_future())
        self._waiting.append(mine)
        if self._task is None:
            self._task = loop.create_task(self._search_all())
        return await mine.found

    async def _search_all(self) -> None:
        try:
            while batch := self._next_batch():
                await self._answer(batch)
        finally:
            self._task = None

    def _next_batch(self) -> list[tuple[_Waiting, int]]:
        """Form a batch from the oldest waiting request and those that fit it, with equal shares of the queries."""
        self._waiting = deque(each for each in self._waiting if not each.found.done())
        fitting = [each for each in self._waiting if each.fits(self._waiting[0])][:MAX_QUERIES]
        batch, room = [], MAX_QUERIES
        # Smallest first: what they leave of their shares goes to the larger ones.
        for number, each in enumerate(sorted(fitting, key=lambda each: len(each.queries))):
            share = min(len(each.queries), room // (len(fitting) - number))
            batch.append((each, share))
            room -= share
        return batch

    async def _answer(self, batch: list[tuple[_Waiting, int]]) -> None:
        for each, _ in batch:
            self._waiting.remove(each)
        try:
            queries = np.concatenate([each.queries[:share] for each, share in batch])
            hits = await self._search(queries, batch[0][0].top_k)
        except Exception as error:
            for each, _ in batch:
                if not each.found.done():
                    each.found.set_exception(error)
            return
        first = 0
        for each, share in batch:
            each.parts.append(Hits(hits.scores[first : first + share], hits.doc_ids[first : first + share]))
            each.queries = each.queries[share:]
            first += share
            if each.found.done():
                continue
            if len(each.queries):
                self._waiting.append(each)
            else:
                each.found.set_result(joined(each.parts))
