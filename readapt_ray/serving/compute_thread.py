"""The one thread in which a process of a version computes, and whether it is healthy."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from readapt_ray.errors import WorkerError

_PROOF_WAIT_S = 10.0
_MAX_WORK_S = 300.0

R = TypeVar("R")


class ComputeThread:
    """Compute in one thread, so that the event loop stays free to answer health checks.

    Nothing else may compute in the process, not even at its start: OpenMP keeps threads for each thread that ever did, and
    once all together are more than the cores, they sleep between two steps instead of spinning. all-MiniLM-L6-v2 took
    12.4 ms for a question on two cores where it takes 5.8.
    """

    def __init__(self, set_up: Callable[[], None]) -> None:
        # OpenMP keeps its number of threads by thread: it must be set in the one that computes.
        self._pool = ThreadPoolExecutor(1, initializer=set_up)
        self._began_s = time.monotonic()
        self._proof: asyncio.Task[Any] | None = None

    def wait_for(self, function: Callable[..., R], *given: Any) -> R:
        """Run a function and wait for its result."""
        return self._pool.submit(function, *given).result()

    async def __call__(self, function: Callable[..., R], *given: Any) -> R:
        """Run a function and await its result."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._timed, function, *given)

    def _timed(self, function: Callable[..., R], *given: Any) -> R:
        self._began_s = time.monotonic()
        return function(*given)

    async def check(self, prove: Callable[[], Awaitable[object]]) -> None:
        """Check that the thread works; if it is busy, check that its work is not stuck. One check at a time is queued.

        Raises:
            WorkerError: what is under way takes too long.
            Exception: whatever the proof raised.
        """
        proof = self._proof = self._proof or asyncio.ensure_future(prove())
        done, _ = await asyncio.wait({proof}, timeout=_PROOF_WAIT_S)
        if done:
            self._proof = None
            proof.result()
        elif time.monotonic() - self._began_s > _MAX_WORK_S:
            raise WorkerError(f"one piece of work has been under way for more than {_MAX_WORK_S:.0f} s")


def set_torch_threads(num_threads: int) -> None:
    """Let torch compute with so many threads, in the thread that calls this."""
    import torch

    torch.set_num_threads(num_threads)


def set_faiss_threads(num_threads: int) -> None:
    """Let FAISS and torch compute with so many threads, in the thread that calls this."""
    import torch

    from readapt_ray.retrieval.faiss_build import faiss

    faiss.omp_set_num_threads(num_threads)
    torch.set_num_threads(num_threads)
