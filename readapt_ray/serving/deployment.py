"""The Ray Serve deployment: one replica holds a retriever, and an index and a corpus where there are any.

Requests are tokenised on their own, encoded together with those that wait beside them, and
searched on their own. Everything that computes runs in a thread, so that a replica answers
`/healthz` while it encodes.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from numpy.typing import NDArray
from ray import serve
from starlette.exceptions import HTTPException

from readapt_ray.catalog.models import find_model, load_tokenizer
from readapt_ray.catalog.retrievers import Encoding
from readapt_ray.errors import FingerprintMismatchError, InputError
from readapt_ray.retrieval.encoder import Encoder
from readapt_ray.retrieval.exact import Hits
from readapt_ray.retrieval.passage_store import PassageStore
from readapt_ray.retrieval.templates import Kind, TextTokenizer
from readapt_ray.retrieval.vector_index import VectorIndex, search_shards
from readapt_ray.serving import schema
from readapt_ray.serving.schema import RequestError

logger = logging.getLogger("ray.serve")

_NO_LIMIT_TOKENS = 1 << 40


@dataclass(frozen=True, kw_only=True)
class ReplicaOptions:
    """What a replica is started with; all of it was checked before."""

    retriever: str
    name: str
    encoding: Encoding
    dtype: str
    fingerprint: str
    """Of the encoder, as the index has it: a node whose model folder differs is found out."""
    index: str | None
    corpus: str | None
    batch_tokens: int | None
    max_batch: int
    batch_wait_s: float
    max_body_bytes: int
    num_threads: int


app = FastAPI(title="readapt_ray", docs_url=None, redoc_url=None)


@app.exception_handler(RequestError)
async def _refuse(_: Request, error: RequestError) -> JSONResponse:
    return JSONResponse(error.body, status_code=error.status)


@app.exception_handler(RequestValidationError)
async def _refuse_body(_: Request, error: RequestValidationError) -> JSONResponse:
    return JSONResponse(schema.describe_validation(list(error.errors())), status_code=400)


@app.exception_handler(HTTPException)
async def _refuse_route(request: Request, error: HTTPException) -> JSONResponse:
    message = f"{request.method} {request.url.path[:200]}: {error.detail}"
    return JSONResponse(schema.error_body(message, status=error.status_code), status_code=error.status_code)


@app.middleware("http")
async def _guard(request: Request, answer: Any) -> Any:
    """Answer what nobody foresaw with a number that the log knows, and nothing else."""
    try:
        return await answer(request)
    except Exception:
        number = uuid.uuid4().hex[:12]
        logger.exception("request %s failed", number)
        body = schema.error_body(f"internal error; the server's log has it under {number}", status=500)
        return JSONResponse(body, status_code=500)


# Ray Serve pickles the app where the class is decorated, so whatever its methods use stands above it.
def _floats(vector: NDArray[np.float32]) -> list[float]:
    return [float(number) for number in vector]


def _called(param: str, given: str | Sequence[str], place: int) -> str:
    return f"'{param}'" if isinstance(given, str) else f"'{param}[{place}]'"


def _usage(rows: Sequence[Sequence[int]]) -> schema.Usage:
    num_tokens = sum(map(len, rows))
    return schema.Usage(prompt_tokens=num_tokens, total_tokens=num_tokens)


@serve.deployment
@serve.ingress(app)
class Replica:
    """Embeds and searches."""

    def __init__(self, options: ReplicaOptions) -> None:
        import faiss
        import torch

        torch.set_num_threads(options.num_threads)
        faiss.omp_set_num_threads(options.num_threads)
        model = find_model(options.retriever)
        self._options = options
        self._encoder = Encoder.load(
            model, encoding=options.encoding, dtype=options.dtype, batch_tokens=options.batch_tokens
        )
        if self._encoder.fingerprint != options.fingerprint:
            raise FingerprintMismatchError(
                f"{options.retriever!r} has other weights on this node than where the server was started; "
                f"put the same files on all nodes, or give a URI"
            )
        unlimited = {"max_query_tokens": _NO_LIMIT_TOKENS, "max_passage_tokens": _NO_LIMIT_TOKENS}
        self._whole = TextTokenizer(load_tokenizer(model), options.encoding.model_copy(update=unlimited))
        self._shards = list(VectorIndex.open(options.index).shards()) if options.index else None
        self._store = PassageStore.open(options.corpus) if options.corpus else None
        self._created = int(time.time())
        self._encode_together.set_max_batch_size(options.max_batch)
        self._encode_together.set_batch_wait_timeout_s(options.batch_wait_s)

    @app.post("/v1/embeddings")
    async def embeddings(self, body: schema.EmbeddingsRequest, request: Request) -> schema.EmbeddingsResponse:
        """The vectors of texts."""
        self._check_request(request, body.model)
        if body.dimensions not in (None, self._encoder.dimension):
            raise RequestError(
                f"'dimensions' is {body.dimensions}; this model's vectors have {self._encoder.dimension} numbers",
                param="dimensions",
                code="invalid_value",
            )
        rows = await asyncio.to_thread(self._tokenize, body.input, body.input_type, "input", body.truncate)
        vectors = await self._encode_together(rows)
        as_json = schema.to_base64 if body.encoding_format == "base64" else _floats
        data = [schema.Embedding(index=index, embedding=as_json(vector)) for index, vector in enumerate(vectors)]
        return schema.EmbeddingsResponse(data=data, model=self._options.name, usage=_usage(rows))

    @app.post("/v1/search")
    async def search(self, body: schema.SearchRequest, request: Request) -> schema.SearchResponse:
        """The best passages for queries."""
        self._check_request(request, body.model)
        if self._shards is None:
            raise RequestError("this server has no index; start it with one to search", status=404, code="no_index")
        rows = await asyncio.to_thread(self._tokenize, body.query, "query", "query", body.truncate)
        vectors = await self._encode_together(rows)
        data = await asyncio.to_thread(self._find, vectors, body.top_k)
        return schema.SearchResponse(data=data, model=self._options.name, usage=_usage(rows))

    @app.get("/v1/models")
    async def models(self) -> schema.ModelList:
        """The model that is served."""
        served = schema.ServedModel(
            id=self._options.name,
            created=self._created,
            dimension=self._encoder.dimension,
            fingerprint=self._options.fingerprint,
            max_query_tokens=self._options.encoding.max_query_tokens,
            max_passage_tokens=self._options.encoding.max_passage_tokens,
        )
        return schema.ModelList(data=[served])

    @app.get("/healthz")
    async def healthz(self) -> schema.Health:
        """Whether this process answers."""
        num_vectors = sum(len(shard.doc_ids) for shard in self._shards or ())
        return schema.Health(model=self._options.name, fingerprint=self._options.fingerprint, num_vectors=num_vectors)

    @serve.batch  # type: ignore[untyped-decorator]
    async def _encode_together(self, requests: list[list[list[int]]]) -> list[NDArray[np.float32]]:
        """The vectors of several requests' token ids, [N, D] each."""
        rows = [row for request in requests for row in request]
        vectors = await asyncio.to_thread(self._encoder.encode_ids, rows)
        ends = np.cumsum([len(request) for request in requests])
        return np.split(vectors, ends[:-1])

    def _check_request(self, request: Request, model: str | None) -> None:
        if int(request.headers.get("content-length") or 0) > self._options.max_body_bytes:
            raise RequestError(
                f"the body is over {self._options.max_body_bytes:,} bytes; send fewer or shorter texts", status=413
            )
        if model is not None and model != self._options.name:
            raise RequestError(
                f"no model {model[:200]!r} here; this server has {self._options.name!r}",
                status=404,
                param="model",
                code="model_not_found",
            )

    def _tokenize(self, given: str | Sequence[str], kind: Kind, param: str, truncate: bool) -> list[list[int]]:
        """Token ids of each text.

        Raises:
            RequestError: a text is empty, too long, or not Unicode.
        """
        texts = [given] if isinstance(given, str) else list(given)
        for place, text in enumerate(texts):
            if not text.strip():
                raise RequestError(f"{_called(param, given, place)} is empty; leave it out", param=param, code="empty")
        try:
            rows = self._whole.ids(texts, kind)
        except InputError:
            raise RequestError(
                f"'{param}' holds text that is not valid Unicode", param=param, code="invalid_value"
            ) from None
        limits = {
            "query": self._options.encoding.max_query_tokens,
            "passage": self._options.encoding.max_passage_tokens,
        }
        if truncate:
            return self._encoder.tokenize(texts, kind)
        for place, row in enumerate(rows):
            if len(row) > limits[kind]:
                raise RequestError(
                    f"{_called(param, given, place)} has {len(row):,} tokens; a {kind} may have {limits[kind]:,}; "
                    f'shorten it, or send "truncate": true to have it cut',
                    param=param,
                    code="context_length_exceeded",
                )
        return rows

    def _find(self, vectors: NDArray[np.float32], top_k: int) -> list[schema.SearchResult]:
        found: Hits = search_shards(self._shards or (), vectors, top_k)
        ranked = [found.of_query(index, str(index)) for index in range(len(vectors))]
        passages = self._store.find({doc.doc_id for docs in ranked for doc in docs}) if self._store else {}
        return [
            schema.SearchResult(
                index=index,
                hits=[
                    schema.Hit(
                        rank=rank,
                        doc_id=doc.doc_id,
                        score=doc.score,
                        title=passages[doc.doc_id].title if doc.doc_id in passages else None,
                        text=passages[doc.doc_id].text if doc.doc_id in passages else None,
                    )
                    for rank, doc in enumerate(docs, start=1)
                ],
            )
            for index, docs in enumerate(ranked)
        ]
