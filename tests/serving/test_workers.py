"""The one thread of a worker, and its health; without Ray."""

import asyncio
import functools
import threading

import numpy as np
import pytest

from readapt_ray.errors import WorkerError
from readapt_ray.retrieval.index_shard import on_device
from readapt_ray.serving import compute_thread, index_slice, workers
from readapt_ray.serving.app import version_spec
from readapt_ray.serving.compute_thread import ComputeThread
from readapt_ray.serving.doc_filter import DocFilter
from readapt_ray.serving.search_batches import SearchBatches
from readapt_ray.serving.slice_plan import planned_slices


def worker() -> ComputeThread:
    return ComputeThread(lambda: None)


def test_a_proof_that_waits_behind_long_work_is_no_failure_and_is_not_asked_twice(monkeypatch):
    monkeypatch.setattr(compute_thread, "_PROOF_WAIT_S", 0.05)
    over, proven = threading.Event(), []

    async def run():
        compute = worker()

        async def prove():
            await compute(proven.append, True)

        work = asyncio.create_task(compute(over.wait, 300))
        for _ in range(3):
            await compute.check(prove)
        assert proven == []
        monkeypatch.setattr(compute_thread, "_MAX_WORK_S", 0.01)
        with pytest.raises(WorkerError, match="one piece of work has been under way for more than"):
            await compute.check(prove)
        monkeypatch.setattr(compute_thread, "_PROOF_WAIT_S", 300.0)
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


def replica(version) -> workers.IndexReplica:
    """An index replica of 25 passages, without Ray."""
    index = object.__new__(workers.IndexReplica.func_or_class)
    index._compute, index._slice, index._fingerprint = worker(), version.slices["index-0"], "f"
    index._search = SearchBatches(functools.partial(index._compute, index._slice.search))
    return index


def test_searches_have_their_turn_between_the_blocks_of_a_scan(version, monkeypatch):
    """A scan of 25 vectors in blocks of 5, and a search that comes while the first block is under way."""
    monkeypatch.setattr(index_slice, "_BLOCK_ROWS", 5)
    queries = np.ones((1, version.info.dimension), np.float32)
    index = replica(version)
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


def test_searches_have_their_turn_between_the_blocks_of_a_search_for_words(version):
    """Forty texts are three blocks; a search for vectors that comes with them is done after the first."""
    index, done = replica(version), []
    texts = ["array shape", "lock a thread"] * 20

    async def search(name, found):
        ranked = await found
        done.append(name)
        return ranked

    async def run():
        vectors = np.ones((1, version.info.dimension), np.float32)
        by_words, by_vector = index.search_words("f", texts, 3, None), index.search("f", vectors, 3, None)
        return await asyncio.gather(search("words", by_words), search("search", by_vector))

    by_words, _ = asyncio.run(run())
    assert done == ["search", "words"]
    assert len(by_words) == 40 and by_words[0] == by_words[38] and by_words[1] == by_words[39] != by_words[0]


def test_an_index_process_that_has_a_gpu_holds_its_vectors_there(world, monkeypatch):
    """A stand-in for the GPU: what is to go to "cuda" goes to the CPU's memory."""
    config = world.config(index_actors=1)
    spec, (part,) = version_spec("tiny", config), planned_slices(config)
    asked, found = [], {}

    def placed(shards, device):
        asked.append(device)
        return [on_device(shards, "cpu")]

    monkeypatch.setattr(index_slice, "_placed", placed)
    monkeypatch.setattr(workers, "cores_per_process", lambda num_processes: 1)
    queries = np.random.default_rng(0).normal(size=(70, world.encoder.dimension)).astype(np.float32)
    for num_gpus in (0, 1):
        monkeypatch.setattr("readapt_ray.cluster.on_worker.check_gpus", lambda held=num_gpus: held)
        replica = workers.IndexReplica.func_or_class(spec, part.shards, 1)
        (shard,) = {type(each.shard.index).__name__ for each in replica._slice.shards}
        assert shard == ("DeviceIndex" if num_gpus else "IndexFlatIP"), shard
        assert asyncio.run(replica.check(replica._fingerprint)) == part.num_vectors
        found[num_gpus] = [
            asyncio.run(replica.search(replica._fingerprint, queries, 5, wanted))
            for wanted in (None, DocFilter(prefix=""))
        ]
    assert asked == ["cuda"]
    for mine, its in zip(found[1], found[0], strict=True):
        assert [[hit.doc_id for hit in row] for row in mine] == [[hit.doc_id for hit in row] for row in its]


def test_a_full_batch_of_different_texts_is_timed_at_the_start(world):
    timed = []

    class Recording:
        encoding, batch_tokens = world.encoder.encoding, 512

        def encode_ids(self, rows):
            timed.append(rows)
            return world.encoder.encode_ids(rows)

    ids = world.encoder.tokenize(["Is this encoder well?"], "query")[0]
    assert workers.tokens_per_s(Recording(), ids) > 0
    first, batch = timed
    assert first == [ids]
    assert sum(map(len, batch)) == 512 and len({tuple(row) for row in batch}) == len(batch)
