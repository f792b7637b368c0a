"""A proxy in the environment is not asked for what this server's own processes say."""

import http.server
import threading

import pytest

from readapt_ray.serving import gateway, server


class Page(http.server.BaseHTTPRequestHandler):
    """Answers any GET."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"a metric")

    def log_message(self, *_):
        """Stay silent."""


@pytest.fixture
def url(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()


def test_a_node_that_dies_while_it_answers_has_no_metrics(url, monkeypatch):
    def cut_short(self):
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"a metric")

    monkeypatch.setattr(Page, "do_GET", cut_short)
    assert gateway._read(f"{url}/metrics") == ""


def test_a_server_is_ready_and_has_metrics_beside_a_proxy(url, monkeypatch):
    assert gateway._read(f"{url}/metrics") == "a metric"
    monkeypatch.setattr(server, "_ANSWER_TIMEOUT_S", 120.0)
    server._wait_until_ready(url)
