"""A real S3 server on loopback (moto's), which can be told to be busy."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import boto3
from werkzeug.serving import make_server

BUCKET = "bucket"
KEYS = {"AWS_ACCESS_KEY_ID": "AKIATESTONLY", "AWS_SECRET_ACCESS_KEY": "do-not-print-me"}
_BUSY = b'<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>'


@dataclass
class Store:
    """A running server. `busy(method, path)` says of each request whether it is answered 503."""

    endpoint: str
    client: Any
    busy: Callable[[str, str], bool] = lambda method, path: False
    refused: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    """Method and path of every request."""
    bytes_written: int = 0
    """Of the bodies of all requests."""
    bytes_read: int = 0
    """Of the bodies of all answers."""

    def names(self) -> list[str]:
        """Keys of all objects."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
        return [each["Key"] for page in pages for each in page.get("Contents", [])]


@contextlib.contextmanager
def running(host: str = "127.0.0.1") -> Iterator[Store]:
    """The server, with its address and keys in the environment of this process and its children."""
    from moto.server import DomainDispatcherApplication, create_backend_app

    moto = DomainDispatcherApplication(create_backend_app)

    def application(environ: dict[str, Any], start_response: Any) -> Any:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        store.requests.append(f"{method} {path}")
        length = environ.get("HTTP_X_AMZ_DECODED_CONTENT_LENGTH") or environ.get("CONTENT_LENGTH") or 0
        store.bytes_written += int(length) if method in ("PUT", "POST") else 0
        if store.busy(method, path):
            store.refused.append(f"{method} {path}")
            start_response("503 Slow Down", [("Content-Type", "application/xml"), ("Content-Length", str(len(_BUSY)))])
            return [_BUSY]

        def begin(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
            sizes = [int(value) for name, value in headers if name.lower() == "content-length"]
            store.bytes_read += sum(sizes) if method == "GET" else 0
            return start_response(status, headers, *rest)

        return moto(environ, begin)

    server = make_server(host, 0, application, threaded=True)
    endpoint = f"http://{host}:{server.server_port}"
    before = dict(os.environ)
    os.environ.update(KEYS, AWS_ENDPOINT_URL=endpoint, AWS_REGION="us-east-1", AWS_EC2_METADATA_DISABLED="true")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    store = Store(endpoint, boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1"))
    thread.start()
    try:
        store.client.create_bucket(Bucket=BUCKET)
        yield store
    finally:
        server.shutdown()
        thread.join()
        os.environ.clear()
        os.environ.update(before)
