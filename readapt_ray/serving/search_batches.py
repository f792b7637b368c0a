"""Search for many requests at once: one scan of an index for 64 queries costs little more than for one.

While a search is under way, others gather; when it is done, those that wait are the next one. A request that finds nothing
under way is searched at once.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from readapt_ray.retrieval.exact import Hits

MAX_QUERIES = 64

Search = Callable[[NDArray[np.float32], int], Awaitable[Hits]]


@dataclass(frozen=True, eq=False)
class _Waiting:
    queries: NDArray[np.float32]
    top_k: int
    found: asyncio.Future[Hits]

    def fits(self, other: "_Waiting") -> bool:
        """Return whether one search can answer both requests, each with the results that it would get alone."""
        return self.top_k == other.top_k and self.queries.shape[1:] == other.queries.shape[1:]


class SearchBatches:
    """Queue searches of one index, and make those that wait together.

    Args:
        search: finds the k best of queries [Q, D]; it is called for one batch after the other.
    """

    def __init__(self, search: Search) -> None:
        self._search = search
        self._waiting: deque[_Waiting] = deque()
        self._task: asyncio.Task[None] | None = None

    async def __call__(self, queries: NDArray[np.float32], top_k: int) -> Hits:
        """Find the k best of a request's queries. A caller that is cancelled no longer waits.

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

    def _next_batch(self) -> list[_Waiting]:
        """Take the oldest waiting request and those that fit it, in order; a request of many queries goes alone."""
        batch: list[_Waiting] = []
        num_queries, left = 0, deque[_Waiting]()
        for each in self._waiting:
            if each.found.done():
                continue
            fits = not batch or (each.fits(batch[0]) and num_queries + len(each.queries) <= MAX_QUERIES)
            (batch if fits else left).append(each)
            num_queries += len(each.queries) if fits else 0
        self._waiting = left
        return batch

    async def _answer(self, batch: list[_Waiting]) -> None:
        try:
            hits = await self._search(np.concatenate([each.queries for each in batch]), batch[0].top_k)
        except Exception as error:
            for each in batch:
                if not each.found.done():
                    each.found.set_exception(error)
            return
        first = 0
        for each in batch:
            last = first + len(each.queries)
            if not each.found.done():
                each.found.set_result(Hits(hits.scores[first:last], hits.doc_ids[first:last]))
            first = last
