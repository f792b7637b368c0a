"""Searches that wait are made together, and each gets what it would have found alone."""

import asyncio

import numpy as np
import pytest

from readapt_ray.retrieval.exact import Hits, search_exact
from readapt_ray.serving.search_batches import MAX_QUERIES, SearchBatches

DOC_IDS = [f"d{number:03}" for number in range(200)]
VECTORS = np.random.default_rng(0).standard_normal((200, 8)).astype(np.float32)


class Index:
    """Searches exactly, once a test lets it; queries that begin with infinity fail."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.searched: list[tuple[int, int]] = []

    async def __call__(self, queries: np.ndarray, top_k: int) -> Hits:
        self.searched.append((len(queries), top_k))
        await self.gate.wait()
        await asyncio.sleep(0)
        if np.isinf(queries[:, 0]).any():
            raise ValueError("cannot be searched")
        return search_exact(queries, [(DOC_IDS, VECTORS)], top_k)


def queries(number: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((number, 8)).astype(np.float32)


def run(requests, *, cancelled=()):
    """What each request got, and what was searched."""

    async def main():
        index = Index()
        search = SearchBatches(index)
        tasks = []
        for given, top_k in requests:
            tasks.append(asyncio.create_task(search(given, top_k)))
            await asyncio.sleep(0)
        for place in cancelled:
            tasks[place].cancel()
        await asyncio.sleep(0)
        index.gate.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        again = await search(queries(1), 3)
        assert again.doc_ids.shape == (1, 3)
        return found, index.searched[:-1]

    return asyncio.run(main())


def test_what_waits_is_one_search_and_each_gets_its_own():
    requests = [(queries(1 + number % 3, number), 5) for number in range(12)]
    found, searched = run(requests)
    assert searched == [(1, 5), (23, 5)]
    for (given, top_k), hits in zip(requests, found, strict=True):
        alone = search_exact(given, [(DOC_IDS, VECTORS)], top_k)
        assert hits.doc_ids.tolist() == alone.doc_ids.tolist()
        np.testing.assert_allclose(hits.scores, alone.scores, atol=1e-5)


def test_a_search_has_up_to_64_queries_of_one_kind_and_all_who_wait_have_their_part():
    sizes = [(1, 5), (40, 5), (1, 7), (30, 5), (20, 5), (100, 5), (1, 7)]
    found, searched = run([(queries(number), top_k) for number, top_k in sizes])
    assert searched == [(1, 5), (64, 5), (2, 7), (64, 5), (62, 5)]
    assert [hits.doc_ids.shape for hits in found] == sizes
    assert max(number for number, _ in searched) <= MAX_QUERIES


def test_a_small_request_does_not_wait_for_all_of_a_large_one():
    async def main():
        index = Index()
        index.gate.set()
        search, done = SearchBatches(index), []

        async def ask(number):
            hits = await search(queries(number, number), 5)
            done.append((number, len(index.searched)))
            return hits

        found = await asyncio.gather(*(ask(number) for number in (2048, 1)))
        assert done == [(1, 2), (2048, 33)]
        for number, hits in zip((2048, 1), found, strict=True):
            alone = search_exact(queries(number, number), [(DOC_IDS, VECTORS)], 5)
            assert hits.doc_ids.tolist() == alone.doc_ids.tolist()
        large = asyncio.create_task(search(queries(2048), 5))
        for _ in range(3):
            await asyncio.sleep(0)
        large.cancel()
        before = len(index.searched)
        await search(queries(1), 5)
        assert len(index.searched) <= before + 2

    asyncio.run(main())


def test_more_requests_than_a_search_has_room_for_are_all_answered():
    found, searched = run([(queries(2), 5)] * 100)
    assert searched[1:] == [(64, 5)] * 3 + [(6, 5)]
    assert all(hits.doc_ids.shape == (2, 5) for hits in found)


def test_who_went_away_is_not_searched_for():
    found, searched = run([(queries(1), 5)] * 4, cancelled=[1, 3])
    assert searched == [(1, 5), (1, 5)]
    assert [isinstance(each, asyncio.CancelledError) for each in found] == [False, True, False, True]


def test_a_failure_is_told_to_all_of_its_search_and_the_next_goes_on():
    found, searched = run([(queries(1), 5), (np.full((1, 8), np.inf, np.float32), 5), (queries(1), 5), (queries(1), 6)])
    assert searched == [(1, 5), (2, 5), (1, 6)]
    assert [type(each) for each in found] == [Hits, ValueError, ValueError, Hits]


@pytest.mark.parametrize("dimensions", [(8, 4)])
def test_queries_of_another_dimension_are_searched_apart(dimensions):
    found, searched = run([(queries(1), 5), (queries(1), 5), (np.ones((1, dimensions[1]), np.float32), 5)])
    assert searched == [(1, 5)] * 3
    assert isinstance(found[0], Hits) and isinstance(found[1], Hits) and isinstance(found[2], Exception)
