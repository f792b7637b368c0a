import asyncio
import heapq
import random
import selectors

import numpy as np
import pytest

from readapt_ray.serving.batching import Batcher, QueueFullError, RequestTooLargeError


class Encoder:
    """Gives each row its first id and its length as a vector; a batch waits until a test lets it go."""

    def __init__(self, *, is_open: bool = True) -> None:
        self.batches: list[list[list[int]]] = []
        self.gate = asyncio.Event()
        self.cancelled = 0
        if is_open:
            self.gate.set()

    async def __call__(self, rows):
        self.batches.append(rows)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        await asyncio.sleep(0)
        if any(row[0] < 0 for row in rows):
            raise ValueError("a poisoned row")
        return np.array([[row[0], len(row)] for row in rows], np.float32)


async def settle() -> None:
    """Let every task run as far as it can."""
    for _ in range(20):
        await asyncio.sleep(0)


def batcher(encoder, **changes) -> Batcher:
    options = {"batch_tokens": 100, "wait_s": 0.0, "max_queued_tokens": 10_000}
    return Batcher(encoder, **(options | changes))


def rows(number: int, count: int, length: int = 10) -> list[list[int]]:
    return [[number] * length for _ in range(count)]


def test_requests_that_wait_are_encoded_together_and_each_gets_its_own():
    async def run():
        encoder = Encoder(is_open=False)
        queue = batcher(encoder)
        tasks = [asyncio.create_task(queue.submit(rows(number, 1 + number % 2))) for number in range(1, 7)]
        await settle()
        assert [len(batch) for batch in encoder.batches] == [2]
        encoder.gate.set()
        for number, (vectors, timing) in enumerate(await asyncio.gather(*tasks), start=1):
            assert vectors.tolist() == [[number, 10]] * (1 + number % 2)
            assert timing.queue_s >= 0
            assert timing.encode_s > 0
        # The first found the encoder free; the other five wait together: 7 rows of 10 tokens are under 100.
        assert [len(batch) for batch in encoder.batches] == [2, 7]
        assert queue.queued_tokens == 0

    asyncio.run(run())


def test_no_batch_is_over_the_budget_and_a_longer_row_goes_alone():
    async def run():
        encoder = Encoder()
        queue = batcher(encoder)
        await asyncio.gather(queue.submit(rows(1, 37, 9)), queue.submit(rows(2, 1, 250)), queue.submit(rows(3, 20, 30)))
        for batch in encoder.batches:
            assert len(batch) == 1 or sum(map(len, batch)) <= 100
        assert sum(map(len, encoder.batches)) == 58
        # 37 * 9 + 250 + 20 * 30 tokens fill at least 4 + 1 + 6 batches; greedy filling may cost a few more.
        assert len(encoder.batches) <= 14

    asyncio.run(run())


def test_one_row_overtakes_the_rest_of_a_thousand():
    async def run():
        encoder = Encoder(is_open=False)
        queue = batcher(encoder)
        large = asyncio.create_task(queue.submit(rows(1, 1000)))
        await settle()
        small = asyncio.create_task(queue.submit(rows(2, 1)))
        await settle()
        encoder.gate.set()
        await small
        assert len(encoder.batches) <= 3
        assert not large.done()
        vectors, _ = await large
        assert vectors.shape == (1000, 2)

    asyncio.run(run())


def test_a_large_request_goes_on_although_small_ones_never_end():
    async def run():
        encoder = Encoder()
        queue = batcher(encoder)
        large = asyncio.create_task(queue.submit(rows(1, 200)))
        ended = False

        async def ask_again_and_again():
            while not ended:
                await queue.submit(rows(2, 5))

        clients = [asyncio.create_task(ask_again_and_again()) for _ in range(9)]
        async with asyncio.timeout(300):
            await large
        ended = True
        await asyncio.gather(*clients)
        # Ten requests share: the large one has at least a twentieth of the tokens.
        until = [index for index, batch in enumerate(encoder.batches) if any(row[0] == 1 for row in batch)][-1]
        assert until < 20 * 200 * 10 / 100

    asyncio.run(run())


def test_a_poisoned_row_fails_its_own_request_alone():
    async def run():
        encoder = Encoder(is_open=False)
        queue = batcher(encoder)
        first = asyncio.create_task(queue.submit(rows(9, 1)))
        await settle()
        good = [asyncio.create_task(queue.submit(rows(number, 2))) for number in (1, 2)]
        bad = asyncio.create_task(queue.submit([[-1] * 10, [5] * 10]))
        await settle()
        encoder.gate.set()
        await first
        for number, task in zip((1, 2), good, strict=True):
            assert (await task)[0].tolist() == [[number, 10]] * 2
        with pytest.raises(ValueError, match="poisoned"):
            await bad
        assert (await queue.submit(rows(3, 1)))[0].tolist() == [[3, 10]]

    asyncio.run(run())


def test_who_went_away_costs_nothing_more():
    async def run():
        encoder = Encoder(is_open=False)
        queue = batcher(encoder)
        running = asyncio.create_task(queue.submit(rows(1, 1)))
        await settle()
        waiting = asyncio.create_task(queue.submit(rows(2, 50)))
        await settle()
        assert queue.queued_tokens == 500
        waiting.cancel()
        await settle()
        assert queue.queued_tokens == 0
        # The batch on the way was for one client alone: it is called back.
        running.cancel()
        await settle()
        assert encoder.cancelled == 1
        encoder.gate.set()
        assert (await queue.submit(rows(3, 1)))[0].tolist() == [[3, 10]]
        assert all(row[0] != 2 for batch in encoder.batches for row in batch)

    asyncio.run(run())


def test_requests_that_end_together_do_not_stop_the_loop(monkeypatch):
    rebuilt, heapify = [], heapq.heapify
    monkeypatch.setattr(heapq, "heapify", lambda heap: rebuilt.append(len(heap)) or heapify(heap))

    async def run():
        encoder = Encoder(is_open=False)
        queue = batcher(encoder, max_queued_tokens=10**9)
        tasks = [asyncio.create_task(queue.submit(rows(1 + number, 2000, 1))) for number in range(250)]
        await settle()
        rebuilt.clear()
        for task in tasks[:-1]:
            task.cancel()
        await settle()
        assert sum(rebuilt) <= 250 * 2000, "each rebuilds the heap, which takes 20 s"
        assert queue.queued_tokens <= 2000 and len(queue._flows[None].heap) <= 4000
        encoder.gate.set()
        assert (await tasks[-1])[0].tolist() == [[250, 1]] * 2000
        assert (await queue.submit(rows(3, 1)))[0].tolist() == [[3, 10]]
        assert sum(map(len, encoder.batches)) <= 2200 and not queue._flows

    asyncio.run(run())


def test_a_batch_for_others_too_is_not_called_back():
    async def run():
        encoder = Encoder(is_open=False)
        queue = batcher(encoder)
        first = asyncio.create_task(queue.submit(rows(9, 1)))
        await settle()
        leaving, staying = (asyncio.create_task(queue.submit(rows(number, 1))) for number in (1, 2))
        await settle()
        encoder.gate.set()
        await first
        encoder.gate.clear()
        await settle()
        assert len(encoder.batches) == 2
        leaving.cancel()
        await settle()
        encoder.gate.set()
        assert (await staying)[0].tolist() == [[2, 10]]
        assert encoder.cancelled == 0

    asyncio.run(run())


def test_a_full_queue_refuses_but_one_large_request_always_gets_in():
    async def run():
        encoder = Encoder(is_open=False)
        queue = batcher(encoder, max_queued_tokens=300)
        tasks = [asyncio.create_task(queue.submit(rows(1, 1))), asyncio.create_task(queue.submit(rows(2, 90)))]
        await settle()
        with pytest.raises(QueueFullError) as caught:
            await queue.submit(rows(3, 1))
        # Nothing is known of the rate yet: a batch a second is assumed.
        assert caught.value.retry_after_s == pytest.approx(9.0)
        encoder.gate.set()
        await asyncio.gather(*tasks)
        assert (await queue.submit(rows(3, 1)))[0].shape == (1, 2)

    asyncio.run(run())


def test_a_batch_waits_for_more_only_as_long_as_it_was_told():
    async def run():
        encoder = Encoder()
        queue = batcher(encoder, wait_s=0.2)
        before = asyncio.get_running_loop().time()
        tasks = [asyncio.create_task(queue.submit(rows(1, 1)))]
        await asyncio.sleep(0.05)
        tasks.append(asyncio.create_task(queue.submit(rows(2, 1))))
        await asyncio.gather(*tasks)
        assert asyncio.get_running_loop().time() - before == pytest.approx(0.2)
        assert [len(batch) for batch in encoder.batches] == [2]
        before = asyncio.get_running_loop().time()
        await queue.submit(rows(1, 10))
        assert asyncio.get_running_loop().time() == before, "a full batch does not wait"

    run_in_no_time(run())


def test_each_slot_has_a_batch_on_the_way():
    async def run():
        encoder = Encoder(is_open=False)
        queue = batcher(encoder, num_slots=2)
        task = asyncio.create_task(queue.submit(rows(1, 50)))
        await settle()
        assert [len(batch) for batch in encoder.batches] == [10, 10]
        encoder.gate.set()
        await task

    asyncio.run(run())


class SkippingSelector(selectors.DefaultSelector):
    """Skips the time that an event loop would wait."""

    skipped_s = 0.0

    def select(self, timeout=None):
        self.skipped_s += timeout or 0
        return super().select(0)


def run_in_no_time(main):
    """Run a coroutine on a loop whose clock shows only the time that was slept."""
    selector = SkippingSelector()
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.skipped_s
    try:
        return loop.run_until_complete(main)
    finally:
        loop.close()


class SteadyEncoder:
    """Encodes 1,000 tokens per second and slot, and takes 10 ms more per batch."""

    def __init__(self) -> None:
        self.num_tokens = 0

    async def __call__(self, rows):
        num_tokens = sum(map(len, rows))
        await asyncio.sleep(num_tokens / 1000 + 0.01)
        self.num_tokens += num_tokens
        return np.zeros((len(rows), 1), np.float32)


async def ask(queue, tokens, timeout_s, row_tokens=20, flow=None):
    """How one request ended."""
    now_s = asyncio.get_running_loop().time()
    given = [[1] * min(row_tokens, tokens)] * max(1, tokens // row_tokens)
    try:
        async with asyncio.timeout(timeout_s):
            await queue.submit(given, deadline_s=now_s + timeout_s, flow=flow)
    except TimeoutError:
        return "late"
    except QueueFullError:
        return "429"
    except RequestTooLargeError:
        return "413"
    return "done"


@pytest.mark.parametrize("num_slots", [1, 4])
@pytest.mark.parametrize(
    "sizes", [[20, 200, 2000, 20_000], [20] * 50 + [10_000], [4000]], ids=["mixed", "bulk", "equal"]
)
def test_at_twice_the_capacity_what_is_accepted_is_done_in_time(num_slots, sizes):
    """Half of the work is refused at once; of the rest under 1% is late, and the encoder is never idle or wasted."""
    chance, seconds, timeout_s = random.Random(0), 1200.0, 60.0

    async def main():
        encoder = SteadyEncoder()
        queue = batcher(encoder, batch_tokens=500, max_queued_tokens=10**9, num_slots=num_slots)
        tasks, loop = [], asyncio.get_running_loop()
        while loop.time() < seconds:
            tokens = chance.choice(sizes)
            tasks.append((tokens, asyncio.create_task(ask(queue, tokens, timeout_s))))
            await asyncio.sleep(chance.expovariate(2 * 1000 * num_slots / (sum(sizes) / len(sizes))))
        return [(tokens, await task) for tokens, task in tasks]

    ended = run_in_no_time(main())
    done = sum(tokens for tokens, how in ended if how == "done")
    accepted = [how for _, how in ended if how in ("done", "late")]
    assert accepted.count("late") < 0.01 * len(accepted)
    assert done > 0.9 * 1000 * num_slots * seconds / 1.02
    if len(set(sizes)) > 1:
        small = [how for tokens, how in ended if tokens == min(sizes)]
        assert small.count("done") > 0.3 * len(small)


@pytest.mark.parametrize("max_queued_tokens", [10**9, 6000])
@pytest.mark.parametrize("sizes", [[100], [100, 2000]], ids=["small", "mixed"])
def test_floods_of_some_domains_refuse_and_delay_no_request_of_another(sizes, max_queued_tokens):
    """Two domains ask for five times what the encoder can do each, and a third for a tenth of it."""
    chance, seconds = random.Random(0), 120.0

    async def main():
        queue = batcher(SteadyEncoder(), batch_tokens=500, max_queued_tokens=max_queued_tokens)
        tasks, loop = {"a": [], "b": [], "quiet": []}, asyncio.get_running_loop()
        waited_s = []

        async def quiet():
            came_s = loop.time()
            how = await ask(queue, 200, 60.0, flow="quiet")
            waited_s.append(loop.time() - came_s)
            return how

        while loop.time() < seconds:
            for flow in ("a", "b"):
                asked = ask(queue, chance.choice(sizes), 60.0, flow=flow)
                tasks[flow].append(asyncio.create_task(asked))
            if len(tasks["quiet"]) < loop.time() / 2:
                tasks["quiet"].append(asyncio.create_task(quiet()))
            await asyncio.sleep(sum(sizes) / len(sizes) / 5000)
        return {flow: [await task for task in asked] for flow, asked in tasks.items()}, waited_s

    ended, waited_s = run_in_no_time(main())
    assert set(ended["quiet"]) == {"done"} and len(ended["quiet"]) > 50
    assert max(waited_s) < 5  # a third of 1,000 tokens per second, behind a batch of 500
    for flow in ("a", "b"):
        assert 0 < ended[flow].count("done") < len(ended[flow])
        assert ended[flow].count("late") <= 0.01 * len(ended[flow])


def test_what_can_never_be_done_in_time_is_refused_with_what_would_fit():
    async def main():
        queue = batcher(SteadyEncoder(), batch_tokens=500)
        assert await ask(queue, 5000, 60.0) == "done"
        with pytest.raises(RequestTooLargeError) as caught:
            await queue.submit([[1] * 20] * 5000, deadline_s=asyncio.get_running_loop().time() + 60)
        assert 1000 < caught.value.num_rows < 1500
        await asyncio.sleep(1)
        assert await ask(queue, 20 * caught.value.num_rows, 60.0) == "done"
        # What was learned long ago says nothing of now.
        await asyncio.sleep(3600)
        assert await ask(queue, 50_000, 60.0) == "done"

    run_in_no_time(main())


def test_what_came_before_the_rate_was_known_is_given_up_once_it_is():
    """20 s of work with 2 s left ends with the first batch, with what would fit; what fits beside it is done."""

    async def main():
        encoder = SteadyEncoder()
        queue = batcher(encoder, batch_tokens=500, max_queued_tokens=10**9)
        loop = asyncio.get_running_loop()
        small = asyncio.create_task(ask(queue, 500, 3.0))
        assert await ask(queue, 20_000, 2.0) == "413"
        assert loop.time() < 1 and encoder.num_tokens <= 1000
        assert await small == "done"
        await asyncio.sleep(3600)
        with pytest.raises(RequestTooLargeError) as caught:
            await queue.submit([[1] * 20] * 1000, deadline_s=loop.time() + 2)
        assert 40 < caught.value.num_rows <= 50

    run_in_no_time(main())


def test_a_fresh_server_refuses_what_it_can_never_do_in_time_before_any_work():
    """The rate of its start is known: 20 s of work with 2 s left is refused, what twice the rate would do is not."""

    async def main():
        encoder = SteadyEncoder()
        queue = batcher(encoder, batch_tokens=500, max_queued_tokens=10**9, tokens_per_s=1000.0)
        loop = asyncio.get_running_loop()
        for _ in range(2):
            with pytest.raises(RequestTooLargeError) as caught:
                await queue.submit([[1] * 20] * 1000, deadline_s=loop.time() + 2)
            assert caught.value.num_rows == 50 and not encoder.num_tokens
            await asyncio.sleep(3600)
        assert await ask(queue, 1900, 2.0) == "done"

    run_in_no_time(main())
