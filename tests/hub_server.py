"""A small stand-in for the Hugging Face hub on loopback: the requests with which a commit is made, and with which it is read."""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from typing import Any

from werkzeug import Request, Response
from werkzeug.serving import make_server

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories by name, what was asked, and the statuses with which the next requests fail."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.asked: list[str] = []
        self.messages: list[str] = []
        self.failures: list[int] = []

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Answer one request."""
        self.asked.append(f"{method} {path}")
        if self.failures:
            return self.failures.pop(0), {"error": "the hub is not well"}
        if path == "api/repos/create":
            return self._create(json.loads(body))
        if path == "api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        return self._of_repository(path, body)

    def _of_repository(self, path: str, body: bytes) -> tuple[int, Any]:
        owner, name, *rest = path.removeprefix("api/models/").split("/")
        repo_id = f"{owner}/{name}"
        if repo_id not in self.files:
            return 404, {"error": "Repository not found"}
        if not rest or rest[0] == "revision":
            siblings = [{"rfilename": each} for each in sorted(self.files[repo_id])]
            told = {"id": repo_id, "sha": COMMIT, "private": self.private[repo_id], "siblings": siblings}
            return 200, {**told, "tags": [], "downloads": 0, "likes": 0}
        if rest[0] == "preupload":
            return 200, {"files": [self._mode(repo_id, each["path"]) for each in json.loads(body)["files"]]}
        assert rest[0] == "commit", path
        return self._commit(repo_id, [json.loads(line) for line in body.splitlines()])

    def _create(self, wanted: dict[str, Any]) -> tuple[int, Any]:
        repo_id = f"{wanted['organization']}/{wanted['name']}"
        if repo_id in self.files:
            return 409, {"error": "You already created this model repo", "url": f"https://huggingface.co/{repo_id}"}
        self.files[repo_id] = {".gitattributes": b""}
        self.private[repo_id] = wanted["visibility"] == "private"
        return 200, {"url": f"https://huggingface.co/{repo_id}", "id": repo_id}

    def _mode(self, repo_id: str, path: str) -> dict[str, Any]:
        content = self.files[repo_id].get(path)
        oid = None if content is None else hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return {"path": path, "uploadMode": "regular", "shouldIgnore": False, "oid": oid}

    def _commit(self, repo_id: str, lines: list[dict[str, Any]]) -> tuple[int, Any]:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.messages.append(value["summary"])
            elif line["key"] == "deletedFile":
                del self.files[repo_id][value["path"]]
            else:
                self.files[repo_id][value["path"]] = base64.b64decode(value["content"])
        url = f"https://huggingface.co/{repo_id}/commit/{COMMIT}"
        return 200, {"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""}


@contextlib.contextmanager
def hub_server() -> Iterator[tuple[Hub, str]]:
    """Serve a hub on loopback; give it and its address."""
    hub = Hub()

    def app(environ: dict[str, Any], start: Any) -> Any:
        request = Request(environ)
        status, content = hub.answer(request.method, request.path.strip("/"), request.get_data())
        return Response(json.dumps(content), status, content_type="application/json")(environ, start)

    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
