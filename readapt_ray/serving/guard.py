"""Check API key, rate and size of every HTTP request before it is answered, and log it afterwards.

This is ASGI middleware. A request that it refuses is not parsed and costs no computation.
"""

import asyncio
import json
import logging
import math
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starlette.middleware.cors import CORSMiddleware

from readapt_ray.serving.keys import KeyRing
from readapt_ray.serving.options import Limits, is_loopback
from readapt_ray.serving.schema import RequestError
from readapt_ray.serving.telemetry import Telemetry, Trace

if TYPE_CHECKING:
    from readapt_ray.serving.spans import RequestSpans

logger = logging.getLogger("ray.serve")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

CLIENT_WENT_AWAY = 499
_BUFFERED_BYTES = 256 << 20
"""Maximum size of all request bodies together that a gateway holds in memory."""
_IDLE_S = 10.0
"""Maximum seconds between two parts of a body."""
_SEND_S = 60.0
"""Maximum seconds until a client has read a part of an answer."""
_MORE_BODIES = 32
"""Number of bodies beyond `max_requests` that may be read at once. With the running requests, this stays below Ray
Serve's own limit."""
_OPEN_PATHS = frozenset({"/", "/health", "/healthz", "/readyz", "/openapi.json", "/docs"})
_KNOWN_PATHS = _OPEN_PATHS | {
    "/embeddings", "/info", "/metrics", "/rerank", "/tokenize", "/v1/embeddings", "/v1/models", "/v1/rerank", "/v1/search",
    "/v2/embed", "/v2/rerank",
}  # fmt: skip
_WHILE_STOPPING = frozenset({"/health", "/healthz", "/metrics"})
_MAX_ID_CHARACTERS = 128
_FORWARDED = re.compile(r"""(?i)\bfor\s*=\s*"?(\[[^\]"]*\]|[^\s;,:"]*)""")
"""Finds the clients in a `Forwarded` header (RFC 7239), without their ports."""


class Guard:
    """Middleware that passes a request to `app`, or answers it with an error in OpenAI's form.

    Args:
        app: ASGI app that answers.
        keys: API keys; without any, only clients on this machine are answered.
        allow_anonymous: answer other machines without keys.
        sees_clients: whether requests carry the address of the client; if not, nobody is answered without keys.
        limits: maximum body size and number of requests in progress.
        telemetry: counts the requests.
        spans: records a trace per request; None for no traces.
    """

    def __init__(
        self,
        app: App,
        *,
        keys: KeyRing,
        allow_anonymous: bool,
        sees_clients: bool = True,
        limits: Limits,
        telemetry: Telemetry,
        spans: "RequestSpans | None" = None,
    ) -> None:
        self._app = app
        self._keys = keys
        self._allow_anonymous = allow_anonymous
        self._sees_clients = sees_clients
        self._limits = limits
        self._telemetry = telemetry
        self._spans = spans
        self._under_way = 0
        self._num_coming = 0
        """Number of requests whose body is being read."""
        self._tasks: set[asyncio.Task[Any]] = set()
        self._is_stopping = False
        self._buffered_bytes = 0

    def stop_accepting(self, *, give_up: bool = False) -> int:
        """Answer new requests with 503 from now on; with `give_up`, running requests too.

        /health, /healthz and /metrics are still answered. It may be called again.

        Returns:
            The number of POST requests in progress.
        """
        self._is_stopping = True
        for task in self._tasks if give_up else ():
            task.cancel()
        return len(self._tasks)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request; this is the interface of ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        trace = Trace(request_id=headers.get("x-request-id", "")[:_MAX_ID_CHARACTERS] or uuid.uuid4().hex)
        scope.setdefault("state", {})["trace"] = trace
        before_s = time.perf_counter()
        counted = scope["method"] == "POST"
        task = asyncio.current_task()
        body, has_place, answer = None, False, _Answer(send, trace, has_body=scope["method"] != "HEAD")
        try:
            self._admit(scope, headers, trace)
            if counted and task:
                self._tasks.add(task)
            # Read a body only for POST on paths that need a key: slow bodies on open paths would take others' places.
            has_body = counted and scope["path"] not in _OPEN_PATHS
            body = await self._body(headers, receive) if has_body else b""
            if body is not None:
                if counted:
                    self._take_place()
                    has_place = True
                # Answer HEAD like GET, but without the body.
                asked = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
                await self._app(asked, _replayed(body, receive), answer)
        except RequestError as error:
            await send_error(answer, error)
        except asyncio.CancelledError:
            if not self._is_stopping or answer.has_begun:
                answer.status = CLIENT_WENT_AWAY
                raise
            await send_error(answer, _stopping())
        except Exception:
            # The API has already answered with 500 and the request id; log the traceback under this id.
            logger.exception("request %s failed", trace.request_id)
        finally:
            self._under_way -= has_place
            if task:
                self._tasks.discard(task)
            self._buffered_bytes -= len(body or b"")
            self._record(scope, headers, trace, answer.status, time.perf_counter() - before_s)

    def _admit(self, scope: MutableMapping[str, Any], headers: dict[str, str], trace: Trace) -> None:
        """Refuse a request before its body is read: no valid key, over a limit, or the server is stopping.

        Raises:
            RequestError: with status 401, 403, 415, 429 or 503.
        """
        path = scope["path"]
        if self._is_stopping and path not in _WHILE_STOPPING:
            raise _stopping()
        if self._keys:
            if path not in _OPEN_PATHS:
                self._check_key(headers.get("authorization"), trace)
        elif not self._allow_anonymous:
            self._check_loopback(scope, headers)
        if headers.get("content-encoding", "identity") != "identity":
            raise RequestError("bodies must not be compressed", status=415, code="unsupported_encoding")
        most = self._limits.max_requests
        if scope["method"] == "POST" and (self._under_way >= most or self._num_coming >= most + _MORE_BODIES):
            raise self._full()

    def _take_place(self) -> None:
        """Count a request as running, now that its whole body has been read.

        Raises:
            RequestError: with status 429: the limit was reached while the body was read.
        """
        if self._under_way >= self._limits.max_requests:
            raise self._full()
        self._under_way += 1

    def _full(self) -> RequestError:
        return RequestError(
            f"{self._limits.max_requests:,} requests are under way already; try again after the seconds in Retry-After",
            status=429,
            code="too_many_requests",
            retry_after_s=1,
        )

    def _check_key(self, authorization: str | None, trace: Trace) -> None:
        key = self._keys.find(authorization)
        if key is None:
            raise RequestError(
                "no valid API key; send one as `Authorization: Bearer KEY`", status=401, code="invalid_api_key"
            )
        trace.key, trace.within, trace.domains = key.name, key.within, key.domains
        wait_s = self._keys.wait_s(key)
        if wait_s:
            message = f"the key {key.name!r} may make {key.requests_per_minute:g} requests per minute"
            raise RequestError(message, status=429, code="rate_limit_exceeded", retry_after_s=math.ceil(wait_s))

    def _check_loopback(self, scope: MutableMapping[str, Any], headers: dict[str, str]) -> None:
        """Refuse clients on other machines, and web pages whose host name resolves to this machine (DNS rebinding)."""
        client = scope.get("client")
        try:
            host = urlsplit(f"//{headers.get('host', '')}").hostname or ""
        except ValueError:
            host = ""
        # A proxy on this machine names the client that it asks for.
        named = [*_FORWARDED.findall(headers.get("forwarded", "")), *([client[0]] if client else [])]
        if not self._sees_clients or not all(map(is_loopback, [host, *named])):
            raise RequestError(
                "this server has no API keys, so it answers only clients of its own machine at 127.0.0.1 or localhost; "
                "start it with --api-keys",
                status=403,
                code="loopback_only",
            )

    async def _body(self, headers: dict[str, str], receive: Receive) -> bytes | None:
        """Read the whole body into memory, and count its bytes; return None if the client disconnected.

        Raises:
            RequestError: with status 408: it comes too slowly; 413: it is too large; 429: other bodies fill the memory.
        """
        length, seconds = headers.get("content-length", ""), self._limits.timeout_s
        body, is_whole = bytearray(), False
        self._num_coming += 1
        try:
            self._check_size(int(length) if length.isdecimal() else 0)
            async with asyncio.timeout(seconds):
                is_whole = await self._fill(body, receive)
            return bytes(body) if is_whole else None
        except TimeoutError:
            message = f"the body did not come within {seconds:g} s, or stopped for {_IDLE_S:g} s"
            raise RequestError(message, status=408, code="body_timeout") from None
        finally:
            self._num_coming -= 1
            if not is_whole:
                self._buffered_bytes -= len(body)

    async def _fill(self, body: bytearray, receive: Receive) -> bool:
        """Append the body to `body`; return False if the client disconnected."""
        while True:
            async with asyncio.timeout(_IDLE_S):
                message = await receive()
            if message["type"] == "http.disconnect":
                return False
            part = message.get("body", b"")
            self._check_size(len(body) + len(part))
            # One body alone always fits.
            if self._buffered_bytes + len(part) > max(_BUFFERED_BYTES, len(body) + len(part)):
                raise RequestError(
                    f"requests under way hold {_BUFFERED_BYTES:,} bytes already; try again after the seconds in Retry-After",
                    status=429,
                    code="too_many_bytes",
                    retry_after_s=1,
                )
            body += part
            self._buffered_bytes += len(part)
            if not message.get("more_body"):
                return True

    def _check_size(self, num_bytes: int) -> None:
        limit = self._limits.max_body_bytes
        if num_bytes > limit:
            raise RequestError(
                f"the body is over {limit:,} bytes; send fewer or shorter texts", status=413, code="body_too_large"
            )

    def _record(
        self, scope: MutableMapping[str, Any], headers: dict[str, str], trace: Trace, status: int, seconds: float
    ) -> None:
        # Clients can ask for any number of unknown paths; as labels they would fill the memory of Prometheus.
        path = scope["path"] if scope["path"] in _KNOWN_PATHS else "other"
        self._telemetry.request(path, status, trace.version, trace.key, seconds)
        answered = {"method": scope["method"], "path": path, "status": status}
        if self._spans:
            self._spans.record(trace, **answered, seconds=seconds, headers=headers)
        entry = {
            "request": trace.request_id,
            **answered,
            "version": trace.version,
            "key": trace.key,
            "items": trace.num_items,
            "tokens": trace.num_tokens,
            "ms": round(1000 * seconds, 2),
            **{f"{name}_ms": round(1000 * value, 2) for name, value in trace.seconds.items()},
        }
        shown = {name: value for name, value in entry.items() if name.endswith("_ms") or value not in ("", 0)}
        logger.info("%s %s %d", scope["method"], path, status, extra={"http": shown})


class _Answer:
    """Passes an answer on with a `Server-Timing` header, and notes its status."""

    def __init__(self, send: Send, trace: Trace, *, has_body: bool) -> None:
        self.status = CLIENT_WENT_AWAY
        self.has_begun = False
        self._send = send
        self._trace = trace
        self._has_body = has_body

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.has_begun = True
            self.status = message["status"]
            parts = [f"{name};dur={1000 * seconds:.1f}" for name, seconds in self._trace.seconds.items()]
            if parts:
                message["headers"] = [*message["headers"], (b"server-timing", ", ".join(parts).encode())]
        elif not self._has_body:
            message = {**message, "body": b""}
        async with asyncio.timeout(_SEND_S):
            await self._send(message)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return an ASGI `receive` that gives the body first, and then the messages after it."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _stopping() -> RequestError:
    message = "this server is stopping; try again after the seconds in Retry-After"
    return RequestError(message, status=503, code="stopping", retry_after_s=1)


def with_cors(app: App, origins: Sequence[str]) -> App:
    """Wrap an app so that web pages of these origins can call it by GET and POST; "*" allows all origins.

    Preflight requests are answered here and need no API key.
    """
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=["retry-after", "server-timing", "x-request-id"],
    )


async def send_error(send: Send, error: RequestError) -> None:
    """Send an error as the whole answer of an ASGI app: status, headers, and a JSON body in OpenAI's form."""
    content = json.dumps(error.body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    headers += [(name.encode(), value.encode()) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
