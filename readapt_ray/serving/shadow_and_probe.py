"""Run searches that no client waits for: compare a shadow version with the answer, and measure recall.

They start after the search of the client, a few at a time. If one fails, this is only logged.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from readapt_ray.serving.doc_filter import DocFilter, doc_filter
from readapt_ray.serving.schema import SearchRequest
from readapt_ray.serving.telemetry import Telemetry, Trace
from readapt_ray.serving.versions import Found, Registry, Version
from readapt_ray.sources.splitting import parent_of

logger = logging.getLogger("ray.serve")

_MAX_SEARCHES = 4
_DEPTH = 10
_EVERY_PASSAGE = DocFilter(is_exact=True)

Search = Callable[[Version, SearchRequest, Trace], Awaitable[tuple[NDArray[np.float32], Found]]]


class SideSearches:
    """The shadow searches and recall probes of one gateway.

    Args:
        search: searches with one version; returns the vectors of the queries and the results.
        timeout_s: seconds after which a search is cancelled.
        telemetry: counts the results.
    """

    def __init__(self, search: Search, timeout_s: float, telemetry: Telemetry) -> None:
        self._search = search
        self._timeout_s = timeout_s
        self._telemetry = telemetry
        self._probing = False
        self.tasks: set[asyncio.Task[None]] = set()
        """Searches in progress."""

    def shadow(
        self, registry: Registry, name: str, body: SearchRequest, found: Found, *, within: DocFilter | None
    ) -> None:
        """Repeat some searches with the shadow version in the background, and count how far the results agree.

        Only searches by text are repeated: a random share of them (`Routing.shadow_share`), and none while texts wait
        for the shadow version's encoder or four side searches run.

        Args:
            registry: the versions that are served, and the routing that names the shadow version.
            name: the version that answered.
            body: the request.
            found: the answer.
            within: the filter of the client's API key; None for no restriction.
        """
        shadow = registry.routing.draw_shadow(name)
        if shadow is None or body.query is None or len(self.tasks) >= _MAX_SEARCHES:
            return
        if not registry.versions[shadow].batcher.queued_tokens:
            trace = Trace(version=shadow, within=within)
            self._start(self._compare(name, trace, registry.versions, body, found))

    def probe(
        self,
        registry: Registry,
        name: str,
        vectors: NDArray[np.float32],
        body: SearchRequest,
        found: Found,
        *,
        within: DocFilter | None,
    ) -> None:
        """Repeat some searches by exact search in the background, to measure recall.

        Only dense searches with no filter and no missing parts are repeated: a random share of them
        (`Routing.recall_probe`), and only one at a time. Up to 10 best passages are compared.

        Args:
            registry: the versions that are served.
            name: the version that answered.
            vectors: vectors of the queries.
            body: the request.
            found: the answer.
            within: the filter of the client's API key. A search with one is not repeated.
        """
        if (
            body.mode != "dense"
            or doc_filter(body, within)
            or found.missing
            or self._probing
            or not registry.routing.draw_probe()
        ):
            return
        self._probing = True
        self._start(self._measure_recall(name, registry.versions[name], vectors, found, min(body.top_k, _DEPTH)))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _measure_recall(
        self, name: str, version: Version, vectors: NDArray[np.float32], answered: Found, depth: int
    ) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                exact = await version.backend.search(vectors, depth, _EVERY_PASSAGE)
        except Exception as error:
            logger.warning("recall of %s was not probed: %s", name, error or type(error).__name__)
            return
        finally:
            self._probing = False
        id_of = _id_of(version)
        for mine, best in zip(answered.ranked, exact.ranked, strict=True):
            expected = {id_of(hit.doc_id) for hit in best}
            if expected and not exact.missing:
                self._telemetry.probed(name, len(expected & {id_of(hit.doc_id) for hit in mine[:depth]}), len(expected))

    async def _compare(
        self, name: str, trace: Trace, versions: Mapping[str, Version], body: SearchRequest, answered: Found
    ) -> None:
        shadow = trace.version
        try:
            async with asyncio.timeout(self._timeout_s):
                _, other = await self._search(versions[shadow], body, trace)
        except Exception as error:
            logger.warning("shadow %s did not answer: %s", shadow, error or type(error).__name__)
            return
        my_id, its_id = _id_of(versions[name]), _id_of(versions[shadow])
        for mine, its in zip(answered.ranked, other.ranked, strict=True):
            top, its_top = mine[:_DEPTH], its[:_DEPTH]
            depth = min(_DEPTH, body.top_k, max(len(top), len(its_top)))
            if depth:
                shared = {my_id(hit.doc_id) for hit in top} & {its_id(hit.doc_id) for hit in its_top}
                difference = (its_top[0].score - top[0].score) if top and its_top else 0.0
                self._telemetry.compared(name, shadow, len(shared), depth, difference)


def _id_of(version: Version) -> Callable[[str], str]:
    """Return a function from passage id to the id that clients see, which is the document's if documents were split."""
    return parent_of if version.info.is_split else str
