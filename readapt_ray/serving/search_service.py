"""What the gateway does with a request, without HTTP and without Ray: choose a version, encode in batches, search.

Versions and routing are one state that is replaced as a whole between two steps of the event loop: a request is answered from
its first to its last step by the version that it began with.
"""

import asyncio
import functools
import itertools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from readapt_ray.errors import FingerprintMismatchError, InputError
from readapt_ray.records import Passage
from readapt_ray.retrieval.passage_store import PassageStore
from readapt_ray.serving import schema
from readapt_ray.serving.batching import Batcher, QueueFullError, Timing
from readapt_ray.serving.registry import Registry, Served
from readapt_ray.serving.request_tokens import InputTokenizer
from readapt_ray.serving.routing import Routing
from readapt_ray.serving.schema import RequestError
from readapt_ray.serving.telemetry import Telemetry
from readapt_ray.serving.versions import DocFilter, Found, Version

R = TypeVar("R")

logger = logging.getLogger("ray.serve")

_INLINE_CHARACTERS = 20_000
_INLINE_NUMBERS = 50_000
_INLINE_HITS = 500
_TOKENIZING_THREADS = 2
_CHECK_S = 3.0
_CHECKED_FOR_S = 1.0
_ALONGSIDE = 4
"""Searches under way that no client waits for, at most."""
_OVERLAP_DEPTH = 10
_EVERY_PASSAGE = DocFilter(prefix="")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request and a gateway may take; see `ServeConfig`."""

    batch_wait_s: float
    max_requests: int
    max_queued_tokens: int
    max_body_bytes: int
    max_inputs: int
    timeout_s: float


@dataclass(kw_only=True)
class Trace:
    """What is said of a request in the log, in the metrics, and in `Server-Timing`."""

    request_id: str = ""
    key: str = ""
    version: str = ""
    num_items: int = 0
    num_tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


class Engine:
    """Answers requests with the versions that it has now."""

    def __init__(self, limits: Limits, telemetry: Telemetry) -> None:
        self.limits = limits
        self._telemetry = telemetry
        self._registry = Registry()
        self._background: set[asyncio.Task[None]] = set()
        self._probing = False
        # Of its own, and small: long texts must not hold up what reads passages and metrics.
        self._tokenizing = ThreadPoolExecutor(_TOKENIZING_THREADS, thread_name_prefix="tokenize")
        self._readiness: asyncio.Task[schema.Readiness] | None = None
        self._checked_s = 0.0

    async def set_state(self, versions: Mapping[str, Version], routing: Routing) -> None:
        """Serve these versions, by this routing, from the next request on.

        Raises:
            InputError: the routing names a version that is not among them.
        """
        routing.check(versions)
        served = {}
        for name, version in versions.items():
            kept = self._registry.served.get(name)
            is_same = kept is not None and kept.version is version
            served[name] = kept if is_same and kept else await asyncio.to_thread(self._prepare, name, version)
        self._registry = Registry(served, routing)
        self._readiness = None

    def _prepare(self, name: str, version: Version) -> Served:
        info = version.info
        stores = {_corpus(each.version): each.store for each in self._registry.served.values()}
        store = stores.get(_corpus(version))
        if store is None and info.corpus:
            store = PassageStore.open(info.corpus, info.corpus_fingerprint)
        batcher = Batcher(
            version.encode,
            batch_tokens=info.batch_tokens,
            wait_s=self.limits.batch_wait_s,
            max_queued_tokens=self.limits.max_queued_tokens,
            num_slots=info.num_slots,
            on_batch=functools.partial(self._telemetry.batch, name, info.batch_tokens),
        )
        return Served(version, InputTokenizer(info.tokenizer, info.encoding), batcher, store)

    def models(self) -> schema.ModelList:
        """The versions that are served, the default first."""
        return self._registry.models()

    async def embed(self, body: schema.EmbeddingsRequest, trace: Trace) -> bytes:
        """An `EmbeddingsResponse` as JSON.

        Raises:
            RequestError: the request cannot be answered.
        """
        name, served = self._registry.named(body.model)
        trace.version = name
        info = served.version.info
        dimensions = body.dimensions or info.dimension
        if dimensions > info.dimension:
            raise RequestError(
                f"'dimensions' is {dimensions:,}; this model's vectors have {info.dimension:,} numbers",
                param="dimensions",
                code="invalid_value",
            )
        async with self._deadline(body.timeout_s):
            rows = await self._tokenized(served, body, trace)
            vectors = await self._encoded(served, rows, trace)
        if dimensions < info.dimension:
            vectors = vectors[:, :dimensions]
            if info.encoding.normalize:
                vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return await _written(
            vectors.size <= _INLINE_NUMBERS,
            schema.embeddings_json,
            vectors,
            as_base64=body.encoding_format == "base64",
            model=name,
            fingerprint=info.encoder_fingerprint,
            num_tokens=trace.num_tokens,
        )

    async def search(self, body: schema.SearchRequest, trace: Trace) -> bytes:
        """A `SearchResponse` as JSON.

        Raises:
            RequestError: the request cannot be answered.
        """
        name, served = self._registry.for_search(body)
        trace.version = name
        info = served.version.info
        if not info.slices:
            raise RequestError(f"version {name!r} has no index to search", status=404, code="no_index")
        async with self._deadline(body.timeout_s):
            vectors = await self._query_vectors(served, body, trace)
            found = await self._found(served, vectors, body, trace)
            passages = await self._passages(served, found) if body.with_text else {}
        self._shadow(name, body, found)
        self._probe(name, served, vectors, body, found)
        if found.missing:
            self._telemetry.partial(name)
        return await _written(
            sum(map(len, found.ranked)) <= _INLINE_HITS,
            schema.search_json,
            found.ranked,
            passages,
            model=name,
            fingerprint=info.fingerprint,
            num_tokens=trace.num_tokens,
            missing=found.missing,
        )

    async def readiness(self) -> schema.Readiness:
        """Whether every version encodes and searches, found out by doing it: once for all who ask within a second."""
        now_s = time.monotonic()
        if self._readiness is None or (self._readiness.done() and now_s > self._checked_s + _CHECKED_FOR_S):
            self._readiness = asyncio.get_running_loop().create_task(self._check_all())
        return await asyncio.shield(self._readiness)

    async def _check_all(self) -> schema.Readiness:
        served = self._registry.served
        names = list(served)
        found = await asyncio.gather(*(self._check(served[name]) for name in names))
        versions = dict(zip(names, found, strict=True))
        self._checked_s = time.monotonic()
        return schema.Readiness(ready=bool(names) and all(each.ready for each in found), versions=versions)

    async def _check(self, served: Served) -> schema.VersionHealth:
        try:
            async with asyncio.timeout(_CHECK_S):
                seconds = await served.version.check()
        except TimeoutError:
            return schema.VersionHealth(ready=False, reason=f"no answer within {_CHECK_S:.0f} s")
        except Exception as error:
            # The log has the whole story; an answer has no room for paths and tracebacks.
            logger.warning("version %s is not ready: %s", served.version.info.fingerprint, error)
            return schema.VersionHealth(ready=False, reason="its encoder or its index fails")
        return schema.VersionHealth(ready=True, encode_s=round(seconds, 4), num_vectors=served.version.info.num_vectors)

    @asynccontextmanager
    async def _deadline(self, wanted_s: float | None) -> AsyncIterator[None]:
        """Give up when the time of a request is over; what waits in a queue is dropped by that."""
        seconds = min(wanted_s or self.limits.timeout_s, self.limits.timeout_s)
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError:
            raise RequestError(
                f"no answer within {seconds:g} s", status=504, code="deadline_exceeded", retry_after_s=1
            ) from None

    async def _tokenized(
        self, served: Served, body: schema.EmbeddingsRequest | schema.SearchRequest, trace: Trace
    ) -> list[list[int]]:
        given: Any
        kind: schema.Kind
        if isinstance(body, schema.SearchRequest):
            given, kind, param = body.query, "query", "query"
        else:
            given, kind, param = body.input, body.input_type, "input"
        blocks = served.tokenizer.blocks(
            given,
            kind,
            param=param,
            truncate=body.truncate,
            max_inputs=self.limits.max_inputs,
        )
        is_one = isinstance(given, str) or isinstance(given[0], int)
        if (len(given) if is_one else sum(map(len, given))) < _INLINE_CHARACTERS:
            rows = list(itertools.chain.from_iterable(blocks))
        else:
            rows = await self._tokenized_in_turns(blocks)
        trace.num_items, trace.num_tokens = len(rows), sum(map(len, rows))
        self._telemetry.tokens(trace.version, trace.num_tokens)
        return rows

    async def _tokenized_in_turns(self, blocks: Iterator[list[list[int]]]) -> list[list[int]]:
        """The rows of all blocks; other requests have their turn between two, and a deadline ends it there."""
        rows: list[list[int]] = []
        loop = asyncio.get_running_loop()
        while (block := await loop.run_in_executor(self._tokenizing, next, blocks, None)) is not None:
            rows += block
        return rows

    async def _encoded(self, served: Served, rows: list[list[int]], trace: Trace) -> NDArray[np.float32]:
        try:
            vectors, timing = await _served_by(served.batcher.submit(rows))
        except QueueFullError as error:
            raise RequestError(
                "too much waits already; try again after the seconds in Retry-After",
                status=429,
                code="queue_full",
                retry_after_s=max(1, round(error.retry_after_s)),
            ) from None
        self._note(trace, timing)
        self._check_finite(vectors, trace)
        return vectors

    def _check_finite(self, vectors: NDArray[np.float32], trace: Trace) -> None:
        """Refuse vectors that can be neither sent nor searched: a model that overflows gives NaN for some texts."""
        broken = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if not len(broken):
            return
        self._telemetry.not_finite(trace.version, len(broken))
        logger.error("request %s: %d of %d vectors have NaN or infinity", trace.request_id, len(broken), len(vectors))
        raise RequestError(
            f"the model gave NaN or infinity for {len(broken):,} of {len(vectors):,} texts, the first at place {broken[0]}; "
            f"leave them out; a model served with dtype float16 may need bfloat16 or float32",
            status=500,
            code="not_finite",
        )

    def _note(self, trace: Trace, timing: Timing) -> None:
        trace.seconds |= {"queue": timing.queue_s, "encode": timing.encode_s}
        self._telemetry.encoded(trace.version, timing)

    async def _query_vectors(self, served: Served, body: schema.SearchRequest, trace: Trace) -> NDArray[np.float32]:
        if body.query is not None:
            rows = await self._tokenized(served, body, trace)
            return await self._encoded(served, rows, trace)
        given: Any = body.vector
        listed = given if isinstance(given[0], list) else [given]
        trace.num_items = len(listed)
        dimension = served.version.info.dimension
        for place, vector in enumerate(listed):
            if len(vector) != dimension:
                raise RequestError(
                    f"'vector[{place}]' has {len(vector):,} numbers; this index has vectors of {dimension:,}",
                    param="vector",
                    code="invalid_value",
                )
        with np.errstate(over="ignore"):
            vectors = np.array(listed, dtype=np.float32)
        if not np.isfinite(vectors).all():
            raise RequestError("'vector' has a number beyond float32", param="vector", code="invalid_value")
        return vectors

    async def _found(
        self, served: Served, vectors: NDArray[np.float32], body: schema.SearchRequest, trace: Trace
    ) -> Found:
        before_s = time.perf_counter()
        wanted = None
        if body.doc_ids is not None or body.doc_id_prefix is not None:
            wanted = DocFilter(body.doc_id_prefix, tuple(body.doc_ids or ()))
        try:
            found = await _served_by(served.version.search(vectors, body.top_k, wanted))
        except InputError as error:
            raise RequestError(str(error), code="invalid_value") from None
        trace.seconds["search"] = time.perf_counter() - before_s
        self._telemetry.searched(trace.version, trace.seconds["search"])
        return found

    async def _passages(self, served: Served, found: Found) -> dict[str, Passage]:
        wanted = {hit.doc_id for ranked in found.ranked for hit in ranked}
        return await asyncio.to_thread(served.store.find, wanted) if served.store else {}

    def _shadow(self, name: str, body: schema.SearchRequest, found: Found) -> None:
        """Let another version search along, where there is one and it keeps up."""
        registry = self._registry
        shadow = registry.routing.shadow_of(name)
        if shadow is None or body.query is None or len(self._background) >= _ALONGSIDE:
            return
        if registry.served[shadow].batcher.queued_tokens:
            return
        self._later(self._compare(name, shadow, registry.served[shadow], body, found))

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        """Do this after the answer."""
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _probe(
        self, name: str, served: Served, vectors: NDArray[np.float32], body: schema.SearchRequest, found: Found
    ) -> None:
        """Search exactly too, where that is asked for and no other probe is under way. What is filtered is exact already."""
        is_filtered = body.doc_ids is not None or body.doc_id_prefix is not None
        if is_filtered or found.missing or self._probing or not self._registry.routing.probes():
            return
        self._probing = True
        self._later(self._measure_recall(name, served, vectors, found, min(body.top_k, _OVERLAP_DEPTH)))

    async def _measure_recall(
        self, name: str, served: Served, vectors: NDArray[np.float32], answered: Found, depth: int
    ) -> None:
        try:
            async with self._deadline(None):
                exact = await served.version.search(vectors, depth, _EVERY_PASSAGE)
        except Exception as error:
            # Whatever ails a probe, the client has its answer already.
            logger.warning("recall of %s was not probed: %s", name, error)
            return
        finally:
            self._probing = False
        for mine, best in zip(answered.ranked, exact.ranked, strict=True):
            due = {hit.doc_id for hit in best}
            if due and not exact.missing:
                self._telemetry.probed(name, len(due & {hit.doc_id for hit in mine[:depth]}) / len(due))

    async def _compare(
        self, name: str, shadow: str, served: Served, body: schema.SearchRequest, answered: Found
    ) -> None:
        trace = Trace(version=shadow)
        try:
            async with self._deadline(None):
                other = await self._found(served, await self._query_vectors(served, body, trace), body, trace)
        except Exception as error:
            # Whatever ails a shadow, the client has its answer already.
            logger.warning("shadow %s did not answer: %s", shadow, error)
            return
        for mine, its in zip(answered.ranked, other.ranked, strict=True):
            top, its_top = mine[:_OVERLAP_DEPTH], its[:_OVERLAP_DEPTH]
            depth = min(_OVERLAP_DEPTH, body.top_k, max(len(top), len(its_top)))
            if depth:
                shared = {hit.doc_id for hit in top} & {hit.doc_id for hit in its_top}
                difference = (its_top[0].score - top[0].score) if top and its_top else 0.0
                self._telemetry.compared(name, shadow, len(shared) / depth, difference)


async def _served_by(call: Awaitable[R]) -> R:
    """The result of a version, which may just have been replaced by another of the same name."""
    try:
        return await call
    except FingerprintMismatchError:
        raise RequestError(
            "the version is being replaced; try again", status=503, code="version_changing", retry_after_s=1
        ) from None


async def _written(is_small: bool, write: Callable[..., bytes], *given: Any, **named: Any) -> bytes:
    """An answer as JSON, made in a thread unless it is small: megabytes would hold up everybody."""
    return write(*given, **named) if is_small else await asyncio.to_thread(write, *given, **named)


def _corpus(version: Version) -> tuple[str | None, str | None]:
    return version.info.corpus, version.info.corpus_fingerprint
