"""Search for many requests at once: one scan of an index for 64 queries costs little more than for one.

While a search is under way, others gather; when it is done, those that wait are the next one. A request that finds nothing
under way is searched at once. A request of many queries is searched in pieces: of each search, those that wait get equal
parts.
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
    """Those that were not searched yet."""
    top_k: int
    found: asyncio.Future[Hits]
    parts: list[Hits] = field(default_factory=list)
    """Results of the queries before them."""

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

    def _next_batch(self) -> list[tuple[_Waiting, int]]:
        """Give the oldest waiting request, and those that fit it, equal numbers of the queries of a search."""
        self._waiting = deque(each for each in self._waiting if not each.found.done())
        fitting = [each for each in self._waiting if each.fits(self._waiting[0])][:MAX_QUERIES]
        batch, room = [], MAX_QUERIES
        # What the small ones leave of their part is for the large ones.
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
