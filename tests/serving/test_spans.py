"""OpenTelemetry traces of requests."""

import asyncio
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from readapt_ray.errors import InputError
from readapt_ray.serving import spans
from readapt_ray.serving.server import serve
from readapt_ray.serving.spans import RequestSpans
from readapt_ray.serving.telemetry import Trace
from tests.serving.conftest import LocalVersion, local_server

CLIENTS_TRACE, CLIENTS_SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def test_a_search_is_a_span_of_the_clients_trace_with_its_parts_below(world):
    exporter = InMemorySpanExporter()
    recorder = RequestSpans(exporter)

    async def run():
        async with (
            local_server({"base": LocalVersion.load(world)}, spans=recorder) as server,
            server.client() as client,
        ):
            headers = {"traceparent": f"00-{CLIENTS_TRACE}-{CLIENTS_SPAN}-01", "x-request-id": "mine"}
            answer = await client.post("/v1/search", json={"query": "array"}, headers=headers)
            assert answer.status_code == 200
            assert (await client.post("/v1/search", json={"query": "array", "model": "absent"})).status_code == 404

    asyncio.run(run())
    recorder.flush()
    first, second = [each for each in exporter.get_finished_spans() if each.kind.name == "SERVER"]
    parts = [each for each in exporter.get_finished_spans() if each.kind.name != "SERVER"]
    assert (format(first.context.trace_id, "032x"), format(first.parent.span_id, "016x")) == (
        CLIENTS_TRACE,
        CLIENTS_SPAN,
    )
    assert first.name == "POST /v1/search"
    assert first.attributes["readapt.request_id"] == "mine"
    assert first.attributes["readapt.version"] == "base"
    assert first.attributes["readapt.num_tokens"] > 0
    assert {each.name for each in parts} == {"queue", "encode", "search"}
    for part in parts:
        assert part.parent.span_id == first.context.span_id
        assert first.start_time <= part.start_time <= part.end_time <= first.end_time
    assert second.attributes["http.response.status_code"] == 404
    assert second.context.trace_id != first.context.trace_id


def test_they_are_sent_where_the_environment_says(monkeypatch):
    received = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            received.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            """Say nothing on the terminal."""

    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
        recorder = RequestSpans()
        recorder.record(Trace(version="base"), method="POST", path="/v1/search", status=200, seconds=0.1, headers={})
        recorder.flush()
        collector.shutdown()
    ((path, body),) = received
    assert path == "/v1/traces"
    assert b"POST /v1/search" in body


def test_traces_without_what_sends_them_are_refused(world, monkeypatch):
    monkeypatch.setattr(spans, "_EXPORTER", "opentelemetry.exporter.absent")
    with pytest.raises(InputError, match=r"pip install readapt-ray\[traces\]"):
        serve(world.config(traces=True), blocking=False)
