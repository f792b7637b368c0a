"""A small stand-in for OpenSearch on loopback: the requests that an export makes, answered as OpenSearch documents them."""

import contextlib
import json
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
from werkzeug import Request, Response
from werkzeug.serving import make_server


class Cluster:
    """Indexes by name, and every request as method and path."""

    def __init__(self) -> None:
        self.indices: dict[str, dict[str, Any]] = {}
        self.requests: list[str] = []

    def answer(self, method: str, path: str, lines: list[Any]) -> tuple[int, Any]:
        """Answer one request; the body is a list of JSON values."""
        self.requests.append(f"{method} /{path}")
        index, _, action = path.partition("/")
        if index == "_bulk":
            return self._bulk(lines)
        if (method, action) == ("PUT", ""):
            assert lines[0]["settings"] == {"index.knn": True}
            self.indices[index] = {"mappings": lines[0]["mappings"], "documents": {}, "visible": {}}
            return 200, {"acknowledged": True}
        if index not in self.indices:
            return 404, {"error": {"type": "index_not_found_exception"}, "status": 404}
        return self._of_index(self.indices[index], index, method, action, lines)

    def _of_index(
        self, there: dict[str, Any], name: str, method: str, action: str, lines: list[Any]
    ) -> tuple[int, Any]:
        if (method, action) == ("DELETE", ""):
            del self.indices[name]
        elif (method, action) == ("PUT", "_mapping"):
            there["mappings"] |= lines[0]
        elif (method, action) == ("GET", "_mapping"):
            return 200, {name: {"mappings": there["mappings"]}}
        elif action == "_refresh":
            there["visible"] = dict(there["documents"])
        elif action == "_count":
            return 200, {"count": len(there["visible"])}
        elif action == "_search":
            return 200, {"hits": {"hits": _nearest(there["visible"], lines[0])}}
        return 200, {"acknowledged": True}

    def _bulk(self, lines: list[Any]) -> tuple[int, Any]:
        items = []
        pending = iter(lines)
        for action in pending:
            ((kind, where),) = action.items()
            documents = self.indices[where["_index"]]["documents"]
            if kind == "index":
                documents[where["_id"]] = next(pending)
                items.append({kind: {"_id": where["_id"], "status": 201}})
            else:
                status = 200 if documents.pop(where["_id"], None) else 404
                items.append({kind: {"_id": where["_id"], "status": status}})
        return 200, {"errors": any(each.get("delete", {}).get("status") == 404 for each in items), "items": items}


def _nearest(documents: dict[str, Any], body: dict[str, Any]) -> list[dict[str, str]]:
    query = body["query"]["knn"]["vector"]
    scores = {name: float(np.dot(each["vector"], query["vector"])) for name, each in documents.items()}
    return [{"_id": name} for name in sorted(scores, key=lambda each: -scores[each])[: query["k"]]]


@contextlib.contextmanager
def running() -> Iterator[tuple[str, Cluster]]:
    """HOST:PORT of a server, and what it holds."""
    cluster = Cluster()

    @Request.application
    def application(request: Request) -> Response:
        lines = [json.loads(line) for line in request.get_data(as_text=True).split("\n") if line]
        status, value = cluster.answer(request.method, request.path.strip("/"), lines)
        return Response(json.dumps(value), status=status, content_type="application/json")

    server = make_server("127.0.0.1", 0, application, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}", cluster
    finally:
        server.shutdown()
        server.server_close()
