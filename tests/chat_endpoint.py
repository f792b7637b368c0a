"""An OpenAI-compatible endpoint on loopback, whose answers a test decides."""

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Endpoint:
    """An endpoint whose answers a test decides."""

    def __init__(self) -> None:
        self.requests: list[dict] = []
        self.keys: list[str] = []
        self.retry_after = "0.05"
        """Header of answers with status 429; empty for none."""
        self.answer = lambda number, request: (200, f"what is asked as number {number}")
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.requests.append(body)
                    outer.keys.append(self.headers["Authorization"])
                    number = len(outer.requests)
                status, said = outer.answer(number, body)
                content = said
                if isinstance(said, str) and status == 200:
                    message = {"role": "assistant", "content": said}
                    content = {"choices": [{"index": 0, "message": message}], "usage": {"total_tokens": 100}}
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                if status == 429 and outer.retry_after:
                    self.send_header("Retry-After", outer.retry_after)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@contextlib.contextmanager
def chat_endpoint() -> Iterator[Endpoint]:
    """Serve until the end of the `with` block."""
    made = Endpoint()
    try:
        yield made
    finally:
        made.server.shutdown()
        made.server.server_close()
