"""Answer embedding and search requests: choose a version, tokenize, encode in batches, search.

This module knows neither HTTP nor Ray. Versions and routing are replaced together, as one object, between two steps of
the event loop. So every step of a request uses the version that the request started with.
"""

import asyncio
import functools
import importlib.metadata
import itertools
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from readapt_ray.errors import FingerprintMismatchError, InputError
from readapt_ray.records import Passage
from readapt_ray.serving import answers, cohere, domains, schema
from readapt_ray.serving.batching import QueueFullError, RequestTooLargeError
from readapt_ray.serving.doc_filter import doc_filter
from readapt_ray.serving.hit_texts import texts_of
from readapt_ray.serving.options import Limits
from readapt_ray.serving.readiness import CachedCall, Readiness, check_versions
from readapt_ray.serving.schema import RequestError, invalid
from readapt_ray.serving.search_modes import check_mode, search_documents, word_queries
from readapt_ray.serving.shadow_and_probe import SideSearches
from readapt_ray.serving.takeover import next_registry
from readapt_ray.serving.telemetry import Telemetry, Trace
from readapt_ray.serving.versions import INLINE_HITS, Backend, Found, Registry, Routing, Version

R = TypeVar("R")

logger = logging.getLogger("ray.serve")

_INLINE_CHARACTERS = 20_000
_INLINE_NUMBERS = 50_000
_TOKENIZING_THREADS = 2


@dataclass(frozen=True)
class _Embedded:
    vectors: NDArray[np.float32]
    fingerprint: str
    """Fingerprint of the encoder."""


class SearchService:
    """Answers the requests of one gateway with the versions that are served now."""

    def __init__(self, limits: Limits, telemetry: Telemetry) -> None:
        self.limits = limits
        self._telemetry = telemetry
        self._request_slots = domains.RequestSlots(limits.max_requests)
        self._registry = Registry()
        self._readiness = CachedCall(functools.partial(check_versions, {}, {}))
        self.side_searches = SideSearches(self._searched, limits.timeout_s, telemetry)
        # A separate small pool: long texts must not delay the threads that read passages and metrics.
        self._tokenizing = ThreadPoolExecutor(_TOKENIZING_THREADS, thread_name_prefix="tokenize")

    async def set_state(
        self,
        backends: Mapping[str, Backend],
        routing: Routing,
        missing: Mapping[str, str] | None = None,
        *,
        must_be_whole: bool = False,
    ) -> None:
        """Serve these versions with this routing, from the next request on (see `next_registry`)."""
        self._registry = await next_registry(
            self._registry,
            backends,
            routing,
            missing=missing or {},
            limits=self.limits,
            telemetry=self._telemetry,
            must_be_whole=must_be_whole,
        )
        by_encoder = {id(each.batcher): (name, each) for name, each in reversed(list(self._registry.versions.items()))}
        down = self._registry.missing
        self._readiness = CachedCall(functools.partial(check_versions, dict(reversed(by_encoder.values())), down))

    def models(self, trace: Trace) -> schema.ModelList:
        """List the versions that the API key of a request may use, the default first."""
        return self._registry.models(trace.domains)

    def info(self, trace: Trace) -> schema.ServerInfo:
        """Describe the default version and the limits, with the field names of text-embeddings-inference.

        Raises:
            RequestError: the API key may not use the default version, or no version is up.
        """
        model = self._registry.model(schema.DEFAULT_MODEL, trace.domains)
        return schema.ServerInfo(
            version=importlib.metadata.version("readapt-ray"),
            model_id=model.id,
            model_sha=model.encoder_fingerprint,
            max_input_length=max(model.max_query_tokens, model.max_passage_tokens),
            max_client_batch_size=self.limits.max_inputs,
            max_concurrent_requests=self.limits.max_requests,
            auto_truncate=self.limits.truncate,
        )

    def model(self, name: str, trace: Trace) -> schema.ServedModel:
        """Describe the version of this name.

        Raises:
            RequestError: no version has this name, it is not up, or the API key may not use it.
        """
        return self._registry.model(name, trace.domains)

    async def readiness(self) -> Readiness:
        """Test whether every version encodes and searches; a result of the last second is reused."""
        return await self._readiness.result()

    async def embed(self, body: schema.EmbeddingsRequest, trace: Trace) -> bytes:
        """Encode the texts of a request, and return an `EmbeddingsResponse` as JSON.

        Raises:
            RequestError: the request cannot be answered.
        """
        made = await self._embedded(body, trace, param="input")
        return await _written(
            made.vectors.size <= _INLINE_NUMBERS,
            answers.embeddings_json,
            made.vectors,
            as_base64=body.encoding_format == "base64",
            model=trace.version,
            fingerprint=made.fingerprint,
            num_tokens=trace.num_tokens,
        )

    async def embed_for_cohere(self, body: cohere.EmbedRequest, trace: Trace) -> bytes:
        """Encode the texts of a request in Cohere's form, and return a `cohere.EmbedResponse` as JSON.

        Raises:
            RequestError: the request cannot be answered.
        """
        made = await self._embedded(body.as_embeddings_request(), trace, param="texts")
        return await _written(
            made.vectors.size <= _INLINE_NUMBERS,
            cohere.embed_json,
            made.vectors,
            body,
            trace.request_id,
            trace.num_tokens,
        )

    async def _embedded(self, body: schema.EmbeddingsRequest, trace: Trace, *, param: str) -> _Embedded:
        name, version, kind_of_model = self._registry.resolve_model(body.model, trace.domains)
        trace.version = name
        info = version.info
        scales = domains.scales_of(version.backend, body.knowledge_scale, self.limits.knowledge_scales)
        dimensions = body.dimensions or info.dimension
        if dimensions > info.dimension:
            field = "output_dimension" if param == "texts" else "dimensions"  # Cohere's word
            raise invalid(f"{field!r} is {dimensions:,}; this model's vectors have {info.dimension:,} numbers", field)
        self._check_token_ids(body, info.encoder_fingerprint)
        kind = schema.KIND_OF_INPUT_TYPE[body.input_type] if body.input_type else kind_of_model
        if kind == "passage" and info.passages_by:
            message = (
                f"version {name!r} encodes queries alone: its passages are encoded by {info.passages_by!r}; ask for "
                f"'query', or another version"
            )
            raise invalid(message, "input_type")
        truncate = self.limits.truncate if body.truncate is None else body.truncate
        async with self._deadline(version, body.timeout_s) as deadline_s:
            rows: Sequence[Sequence[int]] = await self._tokenized(
                version, body.input, kind, trace, param=param, truncate=truncate
            )
            rows = await domains.load_and_mark_rows(version.backend, rows, scales)
            vectors = await self._encoded(version, rows, trace, deadline_s)
        if dimensions < info.dimension:
            vectors = vectors[:, :dimensions]
            if info.encoding.normalize:
                vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return _Embedded(vectors, domains.encoder_fingerprint_at(version.backend, scales))

    def _check_token_ids(self, body: schema.EmbeddingsRequest, encoder_fingerprint: str) -> None:
        """Refuse token ids that may come from another tokenizer: they would mean a different text here."""
        is_text = isinstance(body.input, str) or isinstance(body.input[0], str)
        if is_text or self.limits.accept_token_ids or body.fingerprint == encoder_fingerprint:
            return
        raise RequestError(
            "'input' holds token ids, which mean other words to each tokenizer; send text (LangChain: "
            "check_embedding_ctx_length=False). Ids of this model's own tokenizer need its encoder_fingerprint as 'fingerprint'",
            param="input",
            code="token_ids_refused",
        )

    async def count_tokens(self, body: schema.TokenizeRequest, trace: Trace) -> schema.TokenizeResponse:
        """Tokenize a text, even one over the limit, with template and special tokens; return the ids and their number.

        Raises:
            RequestError: no such model; the text is empty, far too long or not Unicode; or the deadline passed.
        """
        name, version, kind_of_model = self._registry.resolve_model(body.model, trace.domains)
        trace.version = name
        kind = schema.KIND_OF_INPUT_TYPE[body.input_type] if body.input_type else kind_of_model
        tokenize = functools.partial(version.tokenizer.all_ids, body.prompt, kind, param="prompt")
        async with self._deadline(version, body.timeout_s):
            ids = await asyncio.get_running_loop().run_in_executor(self._tokenizing, tokenize)
        limit = version.tokenizer.max_tokens(kind)
        return schema.TokenizeResponse(count=len(ids), max_model_len=limit, tokens=ids)

    async def search(self, body: schema.SearchRequest, trace: Trace) -> bytes:
        """Find the best passages for each query, and return a `SearchResponse` as JSON.

        Raises:
            RequestError: the request cannot be answered.
        """
        registry = self._registry
        name, version = registry.for_search(body, trace.domains)
        if body.knowledge_scale is not None:
            scales = domains.scales_of(version.backend, body.knowledge_scale, self.limits.knowledge_scales)
            name = domains.index_name_at_scale(registry.versions, name, scales, trace.domains)
            version = registry.versions[name]
        trace.version = name
        if not version.info.slices:
            raise RequestError(f"version {name!r} has no index to search", status=404, code="no_index")
        async with self._deadline(version, body.timeout_s, functools.partial(self._why_late, name)) as deadline_s:
            vectors, found = await self._searched(version, body, trace, deadline_s)
            passages = await _passages(version, found) if body.with_text else {}
        self.side_searches.shadow(registry, name, body, found, within=trace.within)
        self.side_searches.probe(registry, name, vectors, body, found, within=trace.within)
        if found.missing:
            self._telemetry.partial(name)
        return await _written(
            sum(map(len, found.ranked)) <= INLINE_HITS,
            answers.search_json,
            found.ranked,
            passages,
            model=name,
            fingerprint=version.info.fingerprint,
            num_tokens=trace.num_tokens,
            missing=found.missing,
            is_split=version.info.is_split,
        )

    @asynccontextmanager
    async def _deadline(
        self, version: Version, wanted_s: float | None, why_late: Callable[[], Awaitable[str]] | None = None
    ) -> AsyncIterator[float]:
        """Cancel the block and raise an error (504) at the request's deadline; yield it (on the event loop's clock).

        Args:
            version: the version that answers; a domain holds one of its request slots meanwhile.
            wanted_s: timeout in seconds that the request asks for; None for the server's own.
            why_late: returns what is broken, or "" if nothing is; for the error message.
        """
        seconds = min(wanted_s or self.limits.timeout_s, self.limits.timeout_s)
        try:
            deadline_s = asyncio.get_running_loop().time() + seconds
            async with asyncio.timeout_at(deadline_s):
                with self._request_slots.held_by(version.backend):
                    yield deadline_s
        except TimeoutError:
            broken = await why_late() if why_late else ""
            advice = broken or "send fewer texts at a time, or start the server with a higher --timeout-s"
            message = f"no answer within {seconds:g} s; {advice}"
            raise RequestError(message, status=504, code="deadline_exceeded", retry_after_s=1) from None

    async def _why_late(self, name: str) -> str:
        """Return what is broken in a version, or "" if nothing is; the log has details."""
        found = (await self.readiness()).versions.get(name)
        return f"version {name!r} is {found.reason}" if found and not found.ready else ""

    async def _tokenized(
        self, version: Version, given: Any, kind: schema.Kind, trace: Trace, *, param: str, truncate: bool
    ) -> list[list[int]]:
        blocks = version.tokenizer.blocks(
            given, kind, param=param, truncate=truncate, max_inputs=self.limits.max_inputs
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
        """Tokenize block by block in the pool: other requests run in between, and a deadline can stop it."""
        rows: list[list[int]] = []
        loop = asyncio.get_running_loop()
        while (block := await loop.run_in_executor(self._tokenizing, next, blocks, None)) is not None:
            rows += block
        return rows

    async def _encoded(
        self, version: Version, rows: Sequence[Sequence[int]], trace: Trace, deadline_s: float
    ) -> NDArray[np.float32]:
        try:
            flow = domains.flow_of(version.backend)
            vectors, timing = await _by_this_version(version.batcher.submit(rows, deadline_s=deadline_s, flow=flow))
        except RequestTooLargeError as error:
            advice = (
                f"send at most {error.num_rows:,} such texts at a time" if error.num_rows else "send a shorter text"
            )
            raise RequestError(
                f"{len(rows):,} texts of {trace.num_tokens:,} tokens would not be encoded in time at the present rate; {advice}, "
                f"or start the server with more replicas or a higher --timeout-s",
                status=413,
                code="request_too_large",
            ) from None
        except QueueFullError as error:
            raise RequestError(
                "the queue is full; try again after the seconds in Retry-After",
                status=429,
                code="queue_full",
                retry_after_s=max(1, round(error.retry_after_s)),
            ) from None
        except domains.DomainUnavailableError as error:  # prepared on one replica, encoded on another
            raise domains.domain_down(error) from None
        trace.seconds |= {"queue": timing.queue_s, "encode": timing.encode_s}
        self._telemetry.encoded(trace.version, timing)
        self._check_finite(vectors, trace)
        return vectors

    def _check_finite(self, vectors: NDArray[np.float32], trace: Trace) -> None:
        """Refuse vectors with NaN or infinity, which a model gives for some texts when its numbers overflow."""
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

    async def _searched(
        self, version: Version, body: schema.SearchRequest, trace: Trace, deadline_s: float = math.inf
    ) -> tuple[NDArray[np.float32], Found]:
        """Encode the queries and search; return their vectors and the results."""
        check_mode(body.mode, version.backend)
        texts = []
        if body.query is not None and body.mode != "dense":
            texts = word_queries(body.query, truncate=body.truncate, max_inputs=self.limits.max_inputs)
        if body.query is None:
            vectors = _given_vectors(body.vector, version.info.dimension)
            trace.num_items = len(vectors)
        elif body.mode == "bm25":
            vectors = np.zeros((len(texts), 0), np.float32)
            trace.num_items = len(texts)
        else:
            rows = await self._tokenized(version, body.query, "query", trace, param="query", truncate=body.truncate)
            marked = await domains.load_and_mark_rows(version.backend, rows)
            vectors = await self._encoded(version, marked, trace, deadline_s)
        before_s = time.perf_counter()
        wanted = doc_filter(body, trace.within)
        try:
            search = search_documents(body.mode, version.backend, vectors, texts, top_k=body.top_k, wanted=wanted)
            found = await _by_this_version(search)
        except InputError as error:
            raise RequestError(str(error), code="invalid_value") from None
        trace.seconds["search"] = time.perf_counter() - before_s
        self._telemetry.searched(trace.version, trace.seconds["search"])
        return vectors, found


def _given_vectors(given: Any, dimension: int) -> NDArray[np.float32]:
    """Return the vectors of a request as float32 [N, dimension]."""
    listed = given if isinstance(given[0], list) else [given]
    for place, vector in enumerate(listed):
        if len(vector) != dimension:
            message = f"'vector[{place}]' has {len(vector):,} numbers; this index has vectors of {dimension:,}"
            raise invalid(message, "vector")
    with np.errstate(over="ignore"):
        vectors = np.array(listed, dtype=np.float32)
    if not np.isfinite(vectors).all():
        raise invalid("'vector' has a number beyond float32", "vector")
    return vectors


async def _passages(version: Version, found: Found) -> dict[str, Passage]:
    return await asyncio.to_thread(texts_of, version.store, found.ranked) if version.store else {}


async def _by_this_version(call: Awaitable[R]) -> R:
    """Await a call to a version; answer 503 if another version of the same name has just replaced it."""
    try:
        return await call
    except FingerprintMismatchError:
        message = "the version is being replaced; try again"
        raise RequestError(message, status=503, code="version_changing", retry_after_s=1) from None


async def _written(is_small: bool, write: Callable[..., bytes], *given: Any, **named: Any) -> bytes:
    """Write an answer as JSON; a large one in a thread, since it would block the event loop."""
    return write(*given, **named) if is_small else await asyncio.to_thread(write, *given, **named)
