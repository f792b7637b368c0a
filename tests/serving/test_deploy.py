"""The file that `--write-config` writes, deployed by Ray's own program on a cluster that runs already, as KubeRay does it."""

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
import pytest
import yaml

from readapt_ray.serving.server import serve
from tests.job_server import job_server
from tests.serving.conftest import World

REPOSITORY = Path(__file__).parent.parent.parent
HAPROXY = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1"}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("environment", [{}, HAPROXY], ids=["python proxy", "haproxy"])
def test_serve_deploy(world: World, tmp_path: Path, environment: dict[str, str]) -> None:
    config = world.config(name="tiny", index_actors=2)
    file = str(tmp_path / "serve.yaml")
    serve(config.model_copy(update={"write_config": file}), blocking=False)
    with job_server(PYTHONPATH=str(REPOSITORY), **environment) as server:
        said = server.said("serve", "deploy", file, "--address", server.address)
        assert "successfully" in said, said
        url = f"http://127.0.0.1:{config.port}"
        _wait_until_ready(url, lambda: server.said("serve", "status", "--address", server.address))
        found = httpx.post(f"{url}/v1/search", json={"query": "array shape", "top_k": 3}, timeout=60).json()
        vectors = httpx.post(f"{url}/v1/embeddings", json={"input": "array shape"}, timeout=60).json()
    assert len(found["data"][0]["hits"]) == 3
    expected = world.encoder.encode(["array shape"], "query")[0]
    assert vectors["data"][0]["embedding"] == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_index_process_gets_a_copy_while_searches_wait(world: World, tmp_path: Path) -> None:
    config = world.config(name="tiny", max_index_replicas=2, max_requests=1024)
    file = str(tmp_path / "serve.yaml")
    serve(config.model_copy(update={"write_config": file}), blocking=False)
    with job_server(PYTHONPATH=str(REPOSITORY)) as server:
        server.said("serve", "deploy", file, "--address", server.address)
        url = f"http://127.0.0.1:{config.port}"
        status = partial(server.said, "serve", "status", "--name", "readapt-tiny", "--address", server.address)
        _wait_until_ready(url, status)
        assert _num_copies(status()) == 1
        done = threading.Event()
        with ThreadPoolExecutor(96) as clients:
            answers = [clients.submit(_searches, url, done) for _ in range(96)]
            deadline_s = time.monotonic() + 240
            while _num_copies(status()) < 2 and time.monotonic() < deadline_s:
                time.sleep(2)
            found = status()
            done.set()
        assert _num_copies(found) == 2, found
        assert {code for each in answers for code in each.result()} == {200}


def _num_copies(status: str) -> int:
    """Return how many processes of the index run."""
    deployments = yaml.safe_load(status)["deployments"]
    return int(deployments["index-0"]["replica_states"].get("RUNNING", 0))


def _searches(url: str, done: threading.Event) -> set[int]:
    """Search until told to stop; the status codes."""
    codes = set()
    with httpx.Client(timeout=120) as client:
        while not done.is_set():
            codes.add(client.post(f"{url}/v1/search", json={"query": "array shape", "top_k": 3}).status_code)
    return codes


def _wait_until_ready(url: str, status) -> None:
    deadline_s = time.monotonic() + 300
    while time.monotonic() < deadline_s:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/readyz", timeout=30).status_code == 200:
                return
        time.sleep(1)
    raise TimeoutError(status())
