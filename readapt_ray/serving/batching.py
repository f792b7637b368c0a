"""Encode the rows of many requests in shared batches, with fair queueing and a bounded queue.

In: the token ids of a request. Out: their vectors. Whenever the encoder is free, it gets a batch of as many rows as a
budget of tokens allows; while it is busy, rows wait. The order is start-time fair queueing (Goyal, Vin and Cheng, 1996)
with tokens in place of bytes: of n waiting requests, each gets 1/n of the tokens. So a request with one row overtakes
a request with thousands, which still makes progress. Domains that share an encoder have one flow each, and flows take
turns before requests do: many requests for one domain do not delay other domains.

A request is accepted only if, at the current rate, it and all requests that wait in its flow would be done in half of
the time that each has left. The other half is kept for later requests. Rows of cancelled requests are not encoded.
"""

import asyncio
import functools
import heapq
import itertools
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Rows = Sequence[Sequence[int]]
Encode = Callable[[list[Sequence[int]]], Awaitable[NDArray[np.float32]]]

_RATE_SMOOTHING = 0.2
_RATE_KNOWN_FOR_S = 60.0
"""Seconds for which a measured rate is trusted after the last batch that it was measured on."""
_SHARE_OF_TIME = 0.5


class QueueFullError(Exception):
    """The queue is full. `retry_after_s` is the time in seconds until there should be room, at the recent rate."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(f"the queue is full; room in about {retry_after_s:.1f} s")
        self.retry_after_s = retry_after_s


class RequestTooLargeError(Exception):
    """A request would be late even with an empty queue. `num_rows` is how many of its rows would be in time."""

    def __init__(self, num_rows: int) -> None:
        super().__init__(f"about {num_rows:,} rows could be encoded in time")
        self.num_rows = num_rows


@dataclass
class Timing:
    """The time that a request spent in the queue and in the encoder, in seconds."""

    queue_s: float = 0.0
    """From its arrival until its first row was sent to the encoder."""
    encode_s: float = 0.0
    """From then until its last vector was back."""


@dataclass(eq=False)
class _Flow:
    """The waiting requests of one domain, or of a version without domains."""

    name: str | None
    turn: float
    """Virtual time of this flow, in tokens; the flow with the smallest value is served next."""
    heap: "list[tuple[float, int, _Job, int]]" = field(default_factory=list)
    num_dead: int = 0
    """Number of rows in the heap whose request was given up."""
    virtual: float = 0.0
    """Tokens that were sent per waiting request; the rows of a new request are queued from here on."""
    waiting: "set[_Job]" = field(default_factory=set)

    @property
    def queued_tokens(self) -> int:
        return sum(each.queued_tokens for each in self.waiting)

    def first(self) -> "tuple[_Job, int]":
        """Return the request and the index of the row that is next."""
        while not self.heap[0][2].queued:
            heapq.heappop(self.heap)
            self.num_dead -= 1
        return self.heap[0][2:]

    def drop(self, job: "_Job") -> None:
        """Drop the waiting rows of a request. The heap is rebuilt only once half of it is dead, not each time."""
        self.num_dead += job.queued
        job.queued = 0
        if 2 * self.num_dead > len(self.heap):
            self.heap = [entry for entry in self.heap if entry[2].queued]
            heapq.heapify(self.heap)
            self.num_dead = 0


@dataclass(eq=False)
class _Job:
    flow: _Flow
    rows: Rows
    vectors: list[NDArray[np.float32] | None]
    done: asyncio.Future[None]
    left: int
    """Number of rows whose vectors are not back yet."""
    queued: int
    """Number of rows that wait."""
    queued_tokens: int
    """Number of tokens in the rows that wait."""
    came_s: float
    deadline_s: float
    started_s: float | None = None
    batches: set[asyncio.Task[None]] = field(default_factory=set)


class Batcher:
    """The queue of one encoder: it collects rows of many requests, and sends batches of them to the replicas.

    Args:
        encode: returns the vectors [N, D] of N rows; called for up to `num_slots` batches at once.
        batch_tokens: maximum number of tokens per batch; a longer row is sent alone.
        wait_s: seconds that a batch that is not full waits for more rows while the encoder is free.
        max_queued_tokens: maximum number of tokens that wait. If the queue is empty, it does not apply.
        num_slots: maximum number of batches in progress: one per replica.
        tokens_per_s: rate that one replica measured when it started; 0 if unknown.
        on_batch: called with the number of rows, number of tokens and seconds of each batch.
    """

    def __init__(
        self,
        encode: Encode,
        *,
        batch_tokens: int,
        wait_s: float,
        max_queued_tokens: int,
        num_slots: int = 1,
        tokens_per_s: float = 0.0,
        on_batch: Callable[[int, int, float], None] | None = None,
    ) -> None:
        self._encode = encode
        self._batch_tokens = batch_tokens
        self._wait_s = wait_s
        self._max_queued_tokens = max_queued_tokens
        self._free_slots = num_slots
        self._on_batch = on_batch
        self._numbers = itertools.count()
        self._flows: dict[str | None, _Flow] = {}
        """The flows with waiting requests, by name."""
        self._turn = 0.0
        self._queued_tokens = 0
        self._encoding_tokens = 0
        self._num_slots = num_slots
        self._first_tokens_per_s = tokens_per_s
        self._tokens_per_s = 0.0
        self._rate_seen_s = -math.inf
        self._timer: asyncio.TimerHandle | None = None
        self._owners: dict[asyncio.Task[None], list[_Job]] = {}

    @property
    def queued_tokens(self) -> int:
        """Count the tokens that wait now, without those that are being encoded."""
        return self._queued_tokens

    @property
    def _waiting(self) -> list[_Job]:
        return [job for flow in self._flows.values() for job in flow.waiting]

    async def submit(
        self, rows: Rows, *, deadline_s: float = math.inf, flow: str | None = None
    ) -> tuple[NDArray[np.float32], Timing]:
        """Encode the rows of a request in shared batches; return their vectors, [N, D], and the time that it took.

        If the caller is cancelled (the client disconnected, or the deadline passed), its waiting rows are dropped. A
        batch with rows of no other request is cancelled.

        Args:
            rows: token ids, at least one row. The vectors have the same order.
            deadline_s: when the answer must be ready, on the event loop's clock. The caller must cancel at this time.
            flow: name of the domain; its requests take turns with other domains as one. None for a version.

        Raises:
            QueueFullError: too many tokens wait, or this request or a waiting one would be late.
            RequestTooLargeError: this request would be late even alone.
            Exception: what encoding these rows raised. Other requests in the same batch are not affected.
        """
        num_tokens = sum(map(len, rows))
        loop = asyncio.get_running_loop()
        job = _Job(
            flow=self._flows.get(flow) or _Flow(flow, self._turn),
            rows=rows,
            vectors=[None] * len(rows),
            done=loop.create_future(),
            left=len(rows),
            queued=len(rows),
            queued_tokens=num_tokens,
            came_s=loop.time(),
            deadline_s=deadline_s,
        )
        self._admit(job)
        tag = job.flow.virtual
        for place, row in enumerate(rows):
            heapq.heappush(job.flow.heap, (tag, next(self._numbers), job, place))
            tag += len(row)
        job.flow.waiting.add(job)
        self._flows[flow] = job.flow
        self._queued_tokens += num_tokens
        self._pump()
        try:
            await job.done
        finally:
            self._forget(job)
        started_s = job.started_s or job.came_s
        timing = Timing(started_s - job.came_s, loop.time() - started_s)
        return np.stack([vector for vector in job.vectors if vector is not None]), timing

    def _admit(self, job: _Job) -> None:
        """Refuse a request that would be late, or that would make a waiting one late."""
        free = self._max_queued_tokens - self._queued_tokens
        # A domain may hold at most as many tokens as are free, so there is always room for another domain.
        held = 0 if job.flow.name is None else job.flow.queued_tokens
        if self._queued_tokens and held + job.queued_tokens > free:
            raise QueueFullError(self._queued_tokens / (self._tokens_per_s or self._batch_tokens))
        now_s = job.came_s
        if now_s > self._rate_seen_s + _RATE_KNOWN_FOR_S:
            # The rate measured at the start is not certain: refuse only what would be late at twice that rate.
            first_rate = self._first_tokens_per_s * self._num_slots
            if first_rate and job.queued_tokens > 2 * first_rate * (job.deadline_s - now_s):
                raise RequestTooLargeError(_num_rows_in_time(job, first_rate))
            return
        rate = self._tokens_per_s * self._num_slots
        time_s = _SHARE_OF_TIME * (job.deadline_s - now_s)
        if job.queued_tokens > rate * time_s:
            raise RequestTooLargeError(_num_rows_in_time(job, rate))
        jobs = sorted((*job.flow.waiting, job), key=lambda each: each.queued_tokens)
        other_flows = [each.queued_tokens for each in self._flows.values() if each is not job.flow]
        before, others = 0, len(jobs)
        for each in jobs:
            # Jobs take turns, and so do flows: until this job is done, each larger one gets the same number of tokens.
            own = before + others * each.queued_tokens
            done_in_s = (self._encoding_tokens + own + sum(min(own, its) for its in other_flows)) / rate
            left_s = each.deadline_s - now_s
            if _SHARE_OF_TIME * left_s < done_in_s and (each is job or done_in_s < left_s):
                raise QueueFullError(done_in_s - _SHARE_OF_TIME * left_s)
            before, others = before + each.queued_tokens, others - 1

    def _forget(self, job: _Job) -> None:
        """Drop the queued rows of a request that was answered or cancelled."""
        if not job.done.done():
            job.done.cancel()
        self._queued_tokens -= job.queued_tokens
        job.queued_tokens = 0
        job.flow.drop(job)
        self._leave(job)
        for batch in list(job.batches):
            if all(other.done.done() for other in self._owners[batch]):
                batch.cancel()

    def _leave(self, job: _Job) -> None:
        """Remove a job from its flow, and the flow if this was its last job."""
        job.flow.waiting.discard(job)
        if not job.flow.waiting and self._flows.get(job.flow.name) is job.flow:
            del self._flows[job.flow.name]

    def _pump(self) -> None:
        """Send batches while rows wait and a slot is free."""
        while self._free_slots and (waiting := self._waiting):
            oldest_s = min(job.came_s for job in waiting)
            remaining_s = self._wait_s - (asyncio.get_running_loop().time() - oldest_s)
            if self._queued_tokens < self._batch_tokens and remaining_s > 0:
                self._set_timer(remaining_s)
                return
            self._send(self._next_batch())

    def _set_timer(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(seconds, self._pump)

    def _next_batch(self) -> list[tuple[_Job, int]]:
        """Take rows in turn from each flow, and within a flow from each request, up to the budget of tokens."""
        batch: list[tuple[_Job, int]] = []
        num_jobs, num_tokens = {name: len(each.waiting) for name, each in self._flows.items()}, 0
        while self._flows:
            flow = min(self._flows.values(), key=lambda each: each.turn)
            job, place = flow.first()
            length = len(job.rows[place])
            if batch and num_tokens + length > self._batch_tokens:
                break
            heapq.heappop(flow.heap)
            batch.append((job, place))
            num_tokens += length
            job.queued -= 1
            job.queued_tokens -= length
            self._turn = flow.turn
            flow.turn += length
            flow.virtual += length / num_jobs[flow.name]
            if not job.queued:
                self._leave(job)
        self._queued_tokens -= num_tokens
        return batch

    def _send(self, batch: list[tuple[_Job, int]]) -> None:
        self._free_slots -= 1
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        num_tokens = sum(len(job.rows[place]) for job, place in batch)
        self._encoding_tokens += num_tokens
        task = loop.create_task(self._run(batch))
        self._owners[task] = list(dict.fromkeys(job for job, _ in batch))
        for job in self._owners[task]:
            job.started_s = job.started_s or now_s
            job.batches.add(task)
        task.add_done_callback(functools.partial(self._finished, num_tokens))

    def _finished(self, num_tokens: int, task: asyncio.Task[None]) -> None:
        self._free_slots += 1
        self._encoding_tokens -= num_tokens
        for job in self._owners.pop(task):
            job.batches.discard(task)
        self._pump()

    async def _run(self, batch: list[tuple[_Job, int]]) -> None:
        try:
            await self._encode_rows(batch)
        except Exception as error:
            by_job: dict[_Job, list[tuple[_Job, int]]] = {}
            for pair in batch:
                by_job.setdefault(pair[0], []).append(pair)
            if len(by_job) == 1:
                _fail(batch[0][0], error)
                return
            # One request caused the error. Encode each alone, so that only this one fails.
            for pairs in by_job.values():
                try:
                    await self._encode_rows(pairs)
                except Exception as alone:
                    _fail(pairs[0][0], alone)

    async def _encode_rows(self, batch: list[tuple[_Job, int]]) -> None:
        wanted = [(job, place) for job, place in batch if not job.done.done()]
        if not wanted:
            return
        rows = [job.rows[place] for job, place in wanted]
        num_tokens = sum(map(len, rows))
        clock = asyncio.get_running_loop().time
        before_s = clock()
        vectors = await self._encode(rows)
        seconds = clock() - before_s
        self._note_rate(num_tokens, seconds, clock())
        if self._on_batch:
            self._on_batch(len(rows), num_tokens, seconds)
        for (job, place), vector in zip(wanted, vectors, strict=True):
            job.vectors[place] = vector
            job.left -= 1
            if not job.left and not job.done.done():
                job.done.set_result(None)

    def _note_rate(self, num_tokens: int, seconds: float, now_s: float) -> None:
        """Update the rate from a batch that is at least half full; smaller ones take longer per token."""
        if 2 * num_tokens >= self._batch_tokens:
            rate, is_known = num_tokens / max(seconds, 1e-6), now_s < self._rate_seen_s + _RATE_KNOWN_FOR_S
            self._tokens_per_s += (_RATE_SMOOTHING if is_known else 1.0) * (rate - self._tokens_per_s)
            self._rate_seen_s = now_s
            if not is_known:
                self._give_up_what_is_too_large(now_s)

    def _give_up_what_is_too_large(self, now_s: float) -> None:
        """Fail waiting requests that were accepted before the rate was known, and would be late even alone.

        One batch may have been slow by chance, so they fail only if they would be late at twice its rate.
        """
        rate = self._tokens_per_s * self._num_slots
        for job in self._waiting:
            if job.queued_tokens > 2 * rate * (job.deadline_s - now_s):
                _fail(job, RequestTooLargeError(_num_rows_in_time(job, rate)))


def _num_rows_in_time(job: _Job, rate: float) -> int:
    """Return how many rows of a request would be accepted at a rate in tokens per second."""
    time_s = _SHARE_OF_TIME * (job.deadline_s - job.came_s)
    return int(len(job.rows) * rate * time_s / sum(map(len, job.rows)))


def _fail(job: _Job, error: Any) -> None:
    if not job.done.done():
        job.done.set_exception(error)
