"""The one thread of a worker, and its health; without Ray."""

import asyncio
import functools
import threading

import numpy as np
import pytest

from readapt_ray.errors import WorkerError
from readapt_ray.serving import index_slice, workers
from readapt_ray.serving.doc_filter import DocFilter
from readapt_ray.serving.index_slice import IndexSlice
from readapt_ray.serving.search_batches import SearchBatches


def worker() -> workers._Worker:
    return workers._Worker(lambda: None)


def test_a_proof_that_waits_behind_long_work_is_no_failure_and_is_not_asked_twice(monkeypatch):
    monkeypatch.setattr(workers, "_PROOF_WAIT_S", 0.05)
    over, proven = threading.Event(), []

    async def run():
        compute = worker()

        async def prove():
            await compute(proven.append, True)

        work = asyncio.create_task(compute(over.wait, 10))
        for _ in range(3):
            await compute.check(prove)
        assert proven == []
        monkeypatch.setattr(workers, "_MAX_WORK_S", 0.01)
        with pytest.raises(WorkerError, match="one piece of work has been under way for more than"):
            await compute.check(prove)
        over.set()
        await work
        await compute.check(prove)
        assert proven == [True]
        await compute.check(prove)
        assert proven == [True, True]

    asyncio.run(run())


def test_a_proof_that_fails_is_a_failure_each_time():
    async def run():
        compute = worker()

        async def prove():
            await compute(lambda: 1 / 0)

        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                await compute.check(prove)

    asyncio.run(run())


def test_searches_have_their_turn_between_the_blocks_of_a_scan(version, monkeypatch):
    """A scan of 25 vectors in blocks of 5, and a search that comes while the first block is under way."""
    monkeypatch.setattr(index_slice, "_BLOCK_ROWS", 5)
    held: IndexSlice = version.slices["index-0"]
    queries = np.ones((1, version.info.dimension), np.float32)
    index = object.__new__(workers.IndexReplica.func_or_class)
    index._compute, index._slice, index._fingerprint = worker(), held, "f"
    index._search = SearchBatches(functools.partial(index._compute, held.search))
    done = []

    async def search(name, wanted):
        found = await index.search("f", queries, 3, wanted)
        done.append(name)
        return found

    async def run():
        return await asyncio.gather(search("scan", DocFilter(prefix="")), search("search", None))

    scanned, searched = asyncio.run(run())
    assert done == ["search", "scan"]
    assert [hit.doc_id for hit in scanned[0]] == [hit.doc_id for hit in searched[0]]
