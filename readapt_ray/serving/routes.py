"""Define the HTTP routes: paths, bodies and errors; `search_service.py` makes the answers."""

import functools
from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from readapt_ray.serving import api_document, cohere, schema
from readapt_ray.serving.readiness import Readiness
from readapt_ray.serving.schema import RequestError
from readapt_ray.serving.search_service import SearchService
from readapt_ray.serving.telemetry import Trace

_FOLDER = Path(__file__).parent
_ERRORS: dict[int | str, dict[str, object]] = {
    status: {"model": schema.ErrorResponse, "description": description}
    for status, description in {
        400: "The request cannot be used; the message says what is wrong.",
        401: "No valid API key.",
        403: "Without API keys only this machine is answered.",
        404: "No such model, or no index.",
        408: "The body did not come in time.",
        413: "The body is too large.",
        429: "Too much at once; Retry-After says when to come back.",
        500: "A failure; the log has it under the request's number.",
        503: "A part is down or being replaced; try again.",
        504: "The time of the request was over.",
    }.items()
}
# Pages may run only their own inline styles and scripts, and may connect only to this server.
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def build_api(service: SearchService, gather_metrics: Callable[[], Awaitable[str]]) -> FastAPI:
    """Build the FastAPI app with all routes.

    Args:
        service: answers the requests.
        gather_metrics: returns the text of `GET /metrics`.
    """
    app = FastAPI(
        title="readapt_ray",
        description="OpenAI-compatible embeddings, and search, by a retriever that was adapted to a corpus.",
        docs_url=None,
        redoc_url=None,
    )
    _add_errors(app)
    _add_work(app, service)
    _add_models(app, service)
    _add_refusals(app)
    _add_health(app, service, gather_metrics)
    _add_pages(app)
    api_document.complete(app.openapi())
    return app


def _add_work(app: FastAPI, service: SearchService) -> None:
    @app.post("/embeddings", include_in_schema=False)
    @app.post("/v1/embeddings", response_model=schema.EmbeddingsResponse, responses=_ERRORS)
    async def embeddings(body: schema.EmbeddingsRequest, request: Request) -> Response:
        """Return the vectors of texts, as in OpenAI's API."""
        return Response(await service.embed(body, _trace(request)), media_type="application/json")

    @app.post("/v1/search", response_model=schema.SearchResponse, responses=_ERRORS)
    async def search(body: schema.SearchRequest, request: Request) -> Response:
        """Find the best passages for queries, or for vectors of queries."""
        return Response(await service.search(body, _trace(request)), media_type="application/json")

    @app.post("/v2/embed", response_model=cohere.EmbedResponse, responses=_ERRORS)
    async def embed(body: cohere.EmbedRequest, request: Request) -> Response:
        """Return the vectors of texts, as in Cohere's API."""
        return Response(await service.embed_for_cohere(body, _trace(request)), media_type="application/json")

    @app.post("/tokenize", responses=_ERRORS)
    async def tokenize(body: schema.TokenizeRequest, request: Request) -> schema.TokenizeResponse:
        """Return the token ids of a text, for example to split long documents."""
        return await service.count_tokens(body, _trace(request))


def _add_models(app: FastAPI, service: SearchService) -> None:
    @app.get("/v1/models", responses={each: _ERRORS[each] for each in (401, 403, 429)})
    async def models(request: Request) -> schema.ModelList:
        """List the served versions, each for queries, for passages and for raw text without a template."""
        return service.models(_trace(request))

    @app.get("/v1/models/{model:path}", responses={each: _ERRORS[each] for each in (401, 403, 404, 429)})
    async def model(model: str, request: Request) -> schema.ServedModel:
        """Describe one served version."""
        return service.model(model, _trace(request))

    @app.get("/info", responses={each: _ERRORS[each] for each in (401, 403, 404, 429, 503)})
    async def info(request: Request) -> schema.ServerInfo:
        """Describe the default version and the limits of this server."""
        return service.info(_trace(request))


def _add_refusals(app: FastAPI) -> None:
    @app.post("/rerank", include_in_schema=False)
    @app.post("/v1/rerank", include_in_schema=False)
    @app.post("/v2/rerank", include_in_schema=False)
    async def rerank() -> Response:
        raise RequestError(
            "this server retrieves and does not rerank; send what /v1/search found to a reranker's server",
            status=404,
            code="not_supported",
        )


def _add_health(app: FastAPI, service: SearchService, gather_metrics: Callable[[], Awaitable[str]]) -> None:
    @app.get("/health", include_in_schema=False)
    @app.get("/healthz", responses={403: _ERRORS[403]})
    async def healthz() -> schema.Health:
        """Return 200 if this process answers; nothing else is checked."""
        return schema.Health()

    @app.get(
        "/readyz",
        response_model=Readiness,
        responses={403: _ERRORS[403], 503: {"model": Readiness, "description": "A version cannot work."}},
    )
    async def readyz() -> Response:
        """Return 200 if every version encodes and searches its whole index. This is tested at most once per second."""
        readiness = await service.readiness()
        return JSONResponse(readiness.model_dump(exclude_none=True), status_code=200 if readiness.ready else 503)

    @app.get("/metrics", response_class=PlainTextResponse, responses={each: _ERRORS[each] for each in (401, 403, 429)})
    async def metrics() -> str:
        """Return the Prometheus metrics of all replicas on all nodes."""
        return await gather_metrics()


def _add_pages(app: FastAPI) -> None:
    headers = {
        "content-security-policy": _POLICY,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
    }
    for path, file in (("/", "page.html"), ("/docs", "docs.html")):
        page = HTMLResponse((_FOLDER / file).read_text(encoding="utf-8"), headers=headers)
        app.add_api_route(path, functools.partial(_return, page), include_in_schema=False)


async def _return(page: Response) -> Response:
    return page


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestError)
    async def refuse(_: Request, error: RequestError) -> JSONResponse:
        return JSONResponse(error.body, status_code=error.status, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def refuse_body(_: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse(schema.describe_validation(error.errors()[0]), status_code=400)

    @app.exception_handler(Exception)
    async def fail(request: Request, _: Exception) -> JSONResponse:
        message = f"internal error; the server's log has it under {_trace(request).request_id}"
        return JSONResponse(schema.error_body(message, status=500), status_code=500)

    @app.exception_handler(HTTPException)
    async def refuse_route(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 400:
            return JSONResponse(schema.error_body(schema.NOT_AN_OBJECT), status_code=400)
        message = f"{request.method} {request.url.path[:200]}: {error.detail}"
        body = schema.error_body(message, status=error.status_code)
        return JSONResponse(body, status_code=error.status_code, headers=error.headers)


def _trace(request: Request) -> Trace:
    trace: Trace = request.state.trace
    return trace
