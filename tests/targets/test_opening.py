"""URIs of targets: what they name, and what is refused before anything is sent."""

import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from readapt_ray.errors import InputError, TargetError
from readapt_ray.stages.export import ExportConfig, export
from readapt_ray.targets import opening
from readapt_ray.targets.pgvector import PgvectorTarget
from readapt_ray.targets.target import Layout, payloads
from tests.targets import opensearch_server, worlds

SERVERS = ("qdrant://h:1/c", "postgresql://u@h/d?table=t", "opensearch://h/i", "milvus://h/c")


def layout(dimension: int, vector_dtype: str = "float32") -> Layout:
    return Layout(dimension=dimension, vector_dtype=vector_dtype, payload=pa.schema([]))


def test_a_folder_is_named_by_its_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert opening.parse("lancedb:lance/passages").uri == f"lancedb:{tmp_path}/lance/passages"
    assert opening.parse("lancedb:s3://bucket/lance/passages").folder == "s3://bucket/lance"
    assert opening.parse("files:out").uri == f"files:{tmp_path}/out"
    assert opening.parse("qdrant:passages").folder == str(tmp_path)
    for uri in SERVERS:
        assert opening.parse(uri).uri == uri


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("quadrant://h/c", "did you mean 'qdrant'"),
        ("redis://h/c", r"is no target; give one of qdrant://HOST:6333/COLLECTION, lancedb:FOLDER/TABLE"),
        ("lancedb://h/c", "give lancedb:FOLDER/TABLE"),
        ("opensearch:folder/c", "give opensearch://HOST:9200/INDEX"),
        ("files:", "give files:FOLDER"),
        ("qdrant://h:1", "names no host or no collection"),
        ("qdrant://h:port/c", "a port that is no number"),
        ("lancedb:/", "names no folder"),
    ],
)
def test_a_uri_that_names_no_target_is_refused(uri: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ExportConfig(vectors="v", corpus="c", output="o", to=uri)


@pytest.mark.parametrize(
    ("uri", "variables"),
    [
        ("postgresql://u:secret@h/d?table=t", "PGPASSWORD"),
        ("postgresql://u@h/d?table=t&password=secret", "PGPASSWORD"),
        ("qdrant://key:secret@h/c", "QDRANT_API_KEY"),
        ("opensearch://u:secret@h/i", "OPENSEARCH_USERNAME and OPENSEARCH_PASSWORD"),
        ("milvus://h/c?token=secret", "MILVUS_TOKEN"),
        ("lancedb:s3://key:secret@bucket/folder/t", "AWS_ACCESS_KEY_ID"),
        ("files:s3://key:secret@bucket/folder", "AWS_ACCESS_KEY_ID"),
    ],
)
def test_credentials_in_a_uri_are_refused_and_not_repeated(uri: str, variables: str) -> None:
    with pytest.raises(InputError, match=f"holds credentials.*{variables}") as refused:
        opening.parse(uri)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("uri", ["qdrant://h/c?ssl=1", "opensearch://h/i?ssl=1", "milvus://h/c?ssl=1"])
def test_an_option_that_a_target_does_not_have_is_refused(uri: str) -> None:
    with (
        pytest.raises(InputError, match=r"unknown options \['ssl'\]; known are tls"),
        opening.open_target(opening.parse(uri)),
    ):
        pass


@pytest.mark.parametrize(
    ("uri", "module", "extra"),
    [
        ("qdrant://h/c", "qdrant_client", "qdrant"),
        ("lancedb:f/t", "lancedb", "lancedb"),
        ("postgresql://u@h/d?table=t", "psycopg", "pgvector"),
        ("opensearch://h/i", "opensearchpy", "opensearch"),
        ("milvus://h/c", "pymilvus", "milvus"),
    ],
)
def test_a_missing_client_is_one_error_with_its_extra(
    uri: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with (
        pytest.raises(InputError, match=rf"pip install 'readapt-ray\[{extra}\]'"),
        opening.open_target(opening.parse(uri)),
    ):
        pass


@pytest.mark.parametrize(
    ("dimension", "dtype", "asked", "message"),
    [
        (
            2001,
            "float32",
            None,
            "at most 2,000 dimensions of the type vector, and these vectors have 2,001; add &type=halfvec",
        ),
        (
            4001,
            "float32",
            "halfvec",
            "at most 4,000 dimensions of the type halfvec, and these vectors have 4,001; embed",
        ),
        (4001, "float32", None, "at most 2,000 dimensions of the type vector, and these vectors have 4,001; embed"),
        (4000, "float16", None, None),
        (4000, "float32", "halfvec", None),
        (2000, "float32", None, None),
    ],
)
def test_dimensions_that_pgvector_cannot_index_are_refused(
    dimension: int, dtype: str, asked: str | None, message: str | None
) -> None:
    target = object.__new__(PgvectorTarget)
    target._asked = asked
    if message is None:
        target.check(layout(dimension, dtype))
        return
    with pytest.raises(InputError, match=message):
        target.check(layout(dimension, dtype))


def test_dimensions_are_refused_before_anything_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worlds.write(tmp_path, worlds.passages(4))
    monkeypatch.setattr("readapt_ray.targets.opensearch._MAX_DIMENSION", worlds.DIMENSION - 1)
    inputs: dict[str, Any] = {name: str(tmp_path / name) for name in ("vectors", "corpus")}
    with opensearch_server.running() as (address, cluster):
        config = ExportConfig(**inputs, to=f"opensearch://{address}/i", output=str(tmp_path / "out"))
        with pytest.raises(InputError, match="OpenSearch indexes vectors of at most 15 dimensions, and these have 16"):
            export(config)
    assert cluster.requests == []
    assert not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("to", "column"),
    [("lancedb:{folder}/lance/table", "meta.year"), ("opensearch://{address}/i", "_id")],
)
def test_a_column_that_a_target_cannot_hold_is_refused_before_anything_is_sent(
    to: str, column: str, tmp_path: Path
) -> None:
    worlds.write(tmp_path, worlds.passages(4, **{column: "a"}))
    inputs: dict[str, Any] = {name: str(tmp_path / name) for name in ("vectors", "corpus")}
    with opensearch_server.running() as (address, cluster):
        uri = to.format(folder=tmp_path, address=address)
        with pytest.raises(InputError, match=rf"takes no column {column!r}.*--keep.*--no-with-text"):
            export(ExportConfig(**inputs, to=uri, output=str(tmp_path / "out")))
        assert cluster.requests == []
        export(ExportConfig(vectors=inputs["vectors"], with_text=False, to=uri, output=str(tmp_path / "bare")))


def test_a_server_that_does_not_answer_is_one_failure() -> None:
    address = opening.parse("opensearch://127.0.0.1:9/i")
    with (
        pytest.raises(TargetError, match=r"opensearch://127\.0\.0\.1:9/i: ConnectionError"),
        opening.open_target(address) as target,
    ):
        target.record()


def test_credentials_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENSEARCH_USERNAME", "reader")
    monkeypatch.setenv("OPENSEARCH_PASSWORD", "from the environment")
    with opening.open_target(opening.parse("opensearch://h/i?tls=true")) as target:
        (connection,) = target._client.transport.connection_pool.connections  # type: ignore[attr-defined]
    assert connection.use_ssl and connection.headers["authorization"].startswith("Basic ")


def test_payloads_are_json() -> None:
    import datetime

    rows = pa.table(
        {
            "doc_id": ["a", "b"],
            "vector": pa.array([[1.0], [2.0]], pa.list_(pa.float32(), 1)),
            "date": [datetime.date(2026, 1, 2), None],
            "tags": [["x", "y"], []],
            "raw": [b"\x01", None],
            "share": [float("inf"), 0.5],
        }
    )
    assert payloads(rows) == [
        {"doc_id": "a", "date": "2026-01-02", "tags": ["x", "y"], "raw": "b'\\x01'"},
        {"doc_id": "b", "tags": [], "share": 0.5},
    ]


def test_opensearch_gives_dates_to_columns_of_dates_and_not_to_texts_that_look_like_one() -> None:
    kinds = {"at": pa.timestamp("us"), "days": pa.list_(pa.date32()), "year": pa.int64(), "when": pa.string()}
    columns = Layout(dimension=2, vector_dtype="float32", payload=pa.schema(list(kinds.items())))
    with opensearch_server.running() as (address, cluster):
        with opening.open_target(opening.parse(f"opensearch://{address}/i")) as target:
            target.create(columns, {"export": "e"})
        mappings = cluster.indices["i"]["mappings"]
    assert mappings["date_detection"] is False
    dates = [name for name, field in mappings["properties"].items() if field["type"] == "date"]
    assert dates == ["at", "days"]
