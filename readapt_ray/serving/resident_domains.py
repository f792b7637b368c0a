"""Hold the domains of one encoder process: load their factors between batches, and encode mixed batches.

Factors that are missing, damaged or slow delay or fail only their own domain. Files are read in another thread, and
layers are prepared one at a time between the batches of other domains. A failure is remembered for ten seconds, so that
many requests for a broken domain cost nothing.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from readapt_ray.errors import ReadaptError, first_line
from readapt_ray.retrieval.domain_encoder import DomainEncoder
from readapt_ray.serving.domains import DomainRow, DomainUnavailableError
from readapt_ray.weights.adapter import Adapter
from readapt_ray.weights.domain_layers import Domain, DomainUse
from readapt_ray.weights.domain_sources import DomainSource, fetched_adapters

FAILED_FOR_S = 10.0
FETCH_TIMEOUT_S = 60.0


class ResidentDomains:
    """The domains whose factors one process holds in memory.

    Args:
        encoder: encodes rows of these domains.
        compute: runs a function in the one thread that computes.
    """

    def __init__(self, encoder: DomainEncoder, compute: Callable[..., Awaitable[Any]]) -> None:
        self._encoder = encoder
        self._compute = compute
        self._loading: dict[DomainSource, asyncio.Task[Domain]] = {}
        self._failed: dict[DomainSource, tuple[float, str]] = {}
        """Time and reason of a source's last failure. Copies of the same factors are different sources."""
        self._one_at_a_time = asyncio.Lock()

    async def domain(self, source: DomainSource) -> Domain:
        """Return a domain; load its factors first unless they are in memory. Concurrent callers share one load.

        Raises:
            DomainUnavailableError: its factors cannot be used, or could not be used in the last ten seconds.
        """
        found = self._encoder.find(source)
        if found is not None:
            return found
        failed_s, reason = self._failed.get(source, (-FAILED_FOR_S, ""))
        if time.monotonic() < failed_s + FAILED_FOR_S:
            raise DomainUnavailableError(reason)
        task = self._loading.get(source)
        if task is None:
            task = self._loading[source] = asyncio.ensure_future(self._load(source))
            task.add_done_callback(lambda _: self._loading.pop(source, None))
        return await asyncio.shield(task)

    async def _load(self, source: DomainSource) -> Domain:
        files = contextlib.ExitStack()
        try:
            async with asyncio.timeout(FETCH_TIMEOUT_S):
                adapters = await asyncio.to_thread(files.enter_context, fetched_adapters(source, self._encoder.base))
            return await self._installed(source, adapters)
        except Exception as error:
            said = (
                f"{FETCH_TIMEOUT_S:g} s were not enough to read it"
                if isinstance(error, TimeoutError)
                else first_line(error)
            )
            if not isinstance(error, (ReadaptError, TimeoutError, OSError)):
                said = type(error).__name__
            reason = f"domain {source.name!r} cannot be used: {said}"
            self._failed[source] = (time.monotonic(), reason)
            raise DomainUnavailableError(reason) from error
        finally:
            await asyncio.to_thread(files.close)

    async def _installed(self, source: DomainSource, adapters: Sequence[Adapter]) -> Domain:
        """Prepare the factors layer by layer. Only one domain at a time, since each changes the model's layers."""
        async with self._one_at_a_time:
            if (domain := self._encoder.find(source)) is not None:  # another name for the same factors
                return domain
            steps = self._encoder.load(source, adapters)
            while await self._compute(_step, steps):
                pass
            domain = self._encoder.find(source)
            assert domain is not None
            return domain

    async def encode(self, rows: Sequence[DomainRow]) -> NDArray[np.float32]:
        """Return the vectors [N, D] of N rows of any domains, in the order of the rows; N is at least 1.

        Each row is encoded with its own scales. Domains that do not fit in memory together get separate forward passes.

        Raises:
            DomainUnavailableError: one of the domains cannot be used; no vector is returned then.
        """
        places: dict[DomainSource, list[int]] = {}
        for place, row in enumerate(rows):
            places.setdefault(row.source, []).append(place)
        parts: list[tuple[list[int], NDArray[np.float32]]] = []
        together: dict[DomainSource, Domain] = {}
        for source in places:
            domain = await self.domain(source)
            held = sum(each.num_bytes for each in together.values())
            if together and held + domain.num_bytes > self._encoder.max_bytes:
                parts.append(await self._encoded(rows, places, together))
                together = {}
            together[source] = domain
        parts.append(await self._encoded(rows, places, together))
        vectors = np.empty((len(rows), parts[0][1].shape[1]), dtype=np.float32)
        for chosen, made in parts:
            vectors[chosen] = made
        return vectors

    async def _encoded(
        self, rows: Sequence[DomainRow], places: dict[DomainSource, list[int]], domains: dict[DomainSource, Domain]
    ) -> tuple[list[int], NDArray[np.float32]]:
        chosen = [place for source in domains for place in places[source]]
        uses = [DomainUse(domains[rows[place].source], rows[place].scales) for place in chosen]
        encode = self._encoder.encoder.encode_ids
        return chosen, await self._compute(encode, [list(rows[place]) for place in chosen], uses)


def _step(steps: Any) -> bool:
    """Take one step; return False if there was none. (A future cannot raise StopIteration.)"""
    return next(steps, steps) is not steps
