"""What happens to requests of other domains while one is flooded, corrupted and removed, and processes are killed."""

import os
import shutil
import signal
import time

import pytest

from readapt_ray.catalog.models import open_model
from readapt_ray.retrieval.encoder import Encoder
from readapt_ray.serving.options import ServeConfig
from readapt_ray.serving.server import serve, stop
from tests import factories
from tests.chaos.nodes import free_port
from tests.serving.conftest import index_artifact
from tests.serving.test_domains import write_domains
from tests.serving.test_kills import Load, processes

pytestmark = pytest.mark.slow

ENCODER = "ray::ServeReplica:readapt-domains:encoder"
EMBEDDINGS = "/v1/embeddings"


@pytest.fixture
def config(tmp_path):
    """Two domains with an index each, and one that chaos befalls; two encoders, and few places."""
    list(write_domains(tmp_path))
    domains = {name: {"factors": str(tmp_path / name)} for name in ("legal", "med", "tax")}
    for name in ("legal", "med"):
        passages = factories.small_corpus(40)
        index_artifact(tmp_path / f"index-{name}", Encoder.load(open_model(str(tmp_path / name))), name, passages)
        domains[name]["index"] = str(tmp_path / f"index-{name}")
    processes = {"num_replicas": 2, "num_threads": 1, "num_cpus_per_replica": 0.1, "num_cpus_per_index_actor": 0.1}
    limits = {"max_requests": 16, "max_queued_tokens": 20_000, "timeout_s": 120}
    return {"base": str(tmp_path / "base"), "domains": domains, "port": free_port(), **processes, **limits}


def kill_an_encoder(but: set[int]) -> set[int]:
    """Kill one of the encoders; return all that run once there is another in its place."""
    victim = next(each for each in processes(ENCODER) if each.pid not in but)
    os.kill(victim.pid, signal.SIGKILL)
    deadline_s = time.monotonic() + 180
    while len(running := {each.pid for each in processes(ENCODER)} - {victim.pid}) < 2:
        assert time.monotonic() < deadline_s
        time.sleep(0.2)
    return running


@pytest.mark.timeout(1200)
def test_chaos_in_one_domain_fails_no_request_of_another(ray_session, config, tmp_path):
    url = serve(ServeConfig.parse(config), blocking=False)
    loads = {}
    try:
        for name in ("legal", "med"):
            loads[name] = Load(url, 1, {"model": name, "query": "lock", "top_k": 3})
        loads["embeddings"] = Load(url, 1, {"model": "legal", "input": ["lock", "thread"]}, EMBEDDINGS)
        quiet = list(loads.values())
        loads["tax"] = Load(url, 1, {"model": "tax", "input": "lock"}, EMBEDDINGS)

        def go_on():
            for each in loads.values():
                each.wait_for(20)

        go_on()
        before = {each.pid for each in processes(ENCODER)}
        first = kill_an_encoder(set())
        go_on()

        flood = Load(url, 24, {"model": "tax", "input": ["lock a thread"] * 32}, EMBEDDINGS)
        flood.wait_for(100)
        go_on()
        flooded = flood.end()
        assert set(flooded) == {200, 429}, flooded

        knowledge = tmp_path / "tax" / "knowledge-1" / "adapter_model.safetensors"
        knowledge.write_bytes(knowledge.read_bytes()[:100])
        second = kill_an_encoder(first - before)  # those that come in place of both have to read the factors
        kill_an_encoder(second - first)
        deadline_s = time.monotonic() + 180
        while 503 not in {status for _, status, _ in loads["tax"].answers}:
            assert time.monotonic() < deadline_s
            time.sleep(0.2)
        go_on()

        del config["domains"]["tax"]
        serve(ServeConfig.parse(config | {"update": True}), blocking=False)
        shutil.rmtree(tmp_path / "tax")
        go_on()
        for each in quiet:
            statuses = each.end()
            assert set(statuses) == {200}, [answer for answer in each.answers if answer[1] != 200][:5]
        of_tax = loads["tax"].end()
        assert set(of_tax) <= {200, 404, 429, 503} and of_tax[404], of_tax
    finally:
        for each in loads.values():
            each.end()
        stop()
