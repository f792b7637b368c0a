"""Send OpenTelemetry traces of requests: one span per request, with a child span for each part of its time.

A client that sends `traceparent` finds the spans in its own trace. OpenTelemetry's environment variables say where they
are sent (OTEL_EXPORTER_OTLP_ENDPOINT) and under which name (OTEL_SERVICE_NAME).
"""

import importlib.util
import time
from collections.abc import Mapping
from typing import Any

from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from readapt_ray.errors import InputError
from readapt_ray.serving.telemetry import Trace

_EXPORTER = "opentelemetry.exporter.otlp.proto.http"


def check_exporter() -> None:
    """Check that traces can be sent.

    Raises:
        InputError: the package that sends them is not installed.
    """
    try:
        found = importlib.util.find_spec(_EXPORTER)
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise InputError(
            "traces needs OpenTelemetry's exporter; pip install readapt-ray[traces], or leave --traces out"
        )


class RequestSpans:
    """Records the spans of a gateway.

    Args:
        exporter: sends the spans; if None, over OTLP.
    """

    def __init__(self, exporter: SpanExporter | None = None) -> None:
        if exporter is None:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            exporter = OTLPSpanExporter()
        resource = Resource({SERVICE_NAME: "readapt_ray"}).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("readapt_ray")
        self._propagator = TraceContextTextMapPropagator()

    def record(
        self, trace: Trace, *, method: str, path: str, status: int, seconds: float, headers: Mapping[str, str]
    ) -> None:
        """Record a request that has just ended and took `seconds`; it is sent later, in the background.

        Its parts (queue, encode, search) are recorded one after the other, and the last ends with the request.

        Args:
            trace: facts about the request, with the seconds of its parts.
            method: HTTP method.
            path: path of its URL.
            status: status of the answer; from 500 on, the span is an error.
            seconds: seconds from request to answer.
            headers: headers of the request, with lower-case names; `traceparent` names the parent span.
        """
        ended_ns = time.time_ns()
        attributes: dict[str, Any] = {
            "http.request.method": method,
            "url.path": path,
            "http.response.status_code": status,
            "readapt.request_id": trace.request_id,
            "readapt.version": trace.version,
            "readapt.num_items": trace.num_items,
            "readapt.num_tokens": trace.num_tokens,
        }
        span = self._tracer.start_span(
            f"{method} {path}",
            context=self._propagator.extract(headers),
            kind=SpanKind.SERVER,
            attributes=attributes,
            start_time=ended_ns - _nanoseconds(seconds),
        )
        if status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        within = set_span_in_context(span)
        part_ended_ns = ended_ns
        for name, took_s in reversed(trace.seconds.items()):
            part = self._tracer.start_span(name, context=within, start_time=part_ended_ns - _nanoseconds(took_s))
            part.end(part_ended_ns)
            part_ended_ns -= _nanoseconds(took_s)
        span.end(ended_ns)

    def flush(self) -> None:
        """Send the spans that are not sent yet, and wait for it (at most 30 s)."""
        self._provider.force_flush()


def _nanoseconds(seconds: float) -> int:
    return int(1e9 * seconds)
