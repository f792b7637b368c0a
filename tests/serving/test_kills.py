"""What happens to requests under way when processes die, versions change, clients leave, and too much comes."""

import collections
import concurrent.futures
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import ray

from readapt_ray.errors import CorruptFileError, ReadaptError
from readapt_ray.serving import server, updates
from readapt_ray.serving.server import serve, stop
from tests.factories import ingest_artifact, small_corpus
from tests.serving.conftest import World

pytestmark = pytest.mark.slow

QUERY = {"query": "array shape", "top_k": 3}


@pytest.fixture
def started(ray_session):
    """Starts a server on Ray Serve with a config; it is gone afterwards."""
    yield lambda config: serve(config, blocking=False)
    stop()


def processes(title: str) -> list[psutil.Process]:
    """The processes that this run's own Ray started under a title."""
    return [each for each in psutil.Process().children(recursive=True) if _title(each).startswith(title)]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


class Load:
    """Clients that ask one thing after the other, by default searches, and count what they get."""

    def __init__(self, url: str, num_clients: int, body: dict, path: str = "/v1/search") -> None:
        self._path = path
        self.answers: list[tuple[float, int, str]] = []
        self._ended = threading.Event()
        self._pool = concurrent.futures.ThreadPoolExecutor(num_clients)
        self._clients = [self._pool.submit(self._ask, url, body) for _ in range(num_clients)]

    def _ask(self, url: str, body: dict) -> None:
        with httpx.Client(base_url=url, timeout=120) as client:
            while not self._ended.is_set():
                try:
                    answer = client.post(self._path, json=body)
                    is_json = answer.headers["content-type"] == "application/json"
                    name = answer.json().get("model", answer.text[:300]) if is_json else answer.text[:300]
                    self.answers.append((time.monotonic(), answer.status_code, name))
                except httpx.TransportError as error:
                    self.answers.append((time.monotonic(), 0, type(error).__name__))

    def wait_for(self, num_answers: int) -> None:
        """Until so many more came."""
        wanted = len(self.answers) + num_answers
        deadline_s = time.monotonic() + 180
        while len(self.answers) < wanted:
            assert time.monotonic() < deadline_s, self.answers[-3:]
            time.sleep(0.05)

    def end(self) -> collections.Counter:
        """Stop; how often each status came."""
        self._ended.set()
        for each in self._clients:
            each.result()
        return collections.Counter(status for _, status, _ in self.answers)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("which", ["readapt-tiny:encoder", "readapt-tiny:index-0"])
def test_a_killed_replica_costs_no_request(started, world: World, which):
    url = started(world.config(name="tiny", index_actors=2))
    load = Load(url, 4, QUERY)
    load.wait_for(50)
    [victim] = processes(f"ray::ServeReplica:{which}")
    os.kill(victim.pid, signal.SIGKILL)
    not_ready = _ready_within(url, 20, wanted=503)
    load.wait_for(50)
    statuses = load.end()
    # What was under way on it was asked again of its replacement.
    assert set(statuses) == {200}, [each for each in load.answers if each[1] != 200]
    assert not_ready, "/readyz never told that a replica was gone"
    assert _ready_within(url, 120, wanted=200)
    [replacement] = processes(f"ray::ServeReplica:{which}")
    assert replacement.pid != victim.pid


@pytest.mark.timeout(900)
def test_a_killed_gateway_fails_only_what_was_under_way(started, world: World):
    url = started(world.config(name="tiny"))
    load = Load(url, 4, QUERY)
    load.wait_for(50)
    [victim] = processes("ray::ServeReplica:readapt:gateway")
    os.kill(victim.pid, signal.SIGKILL)
    load.wait_for(50)
    statuses = load.end()
    failed = [each for each in load.answers if each[1] != 200]
    assert statuses[200] >= 90
    # What was under way, and what each client sent while the sockets of the dead process were closed.
    assert len(failed) <= 8, failed
    assert max(each[0] for each in failed) - min(each[0] for each in failed) < 0.1, failed
    assert _ready_within(url, 120, wanted=200)


@contextlib.contextmanager
def served_by_command(world: World, log: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """`readapt serve` in a process group of its own, once it serves; its port is the first of its `args` after --port."""
    config = world.config(name="tiny")
    command = [sys.executable, "-m", "readapt_ray.cli", "serve", "--retriever", config.retriever]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with log.open("w") as stream:
        server = subprocess.Popen(
            [*command, "--port", str(config.port), *options],
            env=environment,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    try:
        deadline_s = time.monotonic() + 240
        while "serving retriever" not in log.read_text():
            assert server.poll() is None and time.monotonic() < deadline_s, log.read_text()
            time.sleep(0.2)
        yield server
        assert _is_free_within(config.port, seconds=20)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)


@pytest.mark.timeout(300)
def test_a_killed_server_frees_its_port(world: World, tmp_path):
    """HAProxy goes with the rest, although nobody is left to end it."""
    with served_by_command(world, tmp_path / "log") as server:
        proxy = _only_haproxy(server)
        server.kill()
        server.wait()
        proxy.wait(60)


@pytest.mark.timeout(700)
@pytest.mark.parametrize("which", ["haproxy", "ray::HAProxy"])
def test_a_killed_proxy_is_back_within_two_seconds(world: World, tmp_path, which: str):
    """Ray notices half a minute later; what it starts then takes over without a failed request."""
    with served_by_command(world, tmp_path / "log", "--index", world.version()["index"]) as server:
        load = Load(f"http://127.0.0.1:{server.args[server.args.index('--port') + 1]}", 2, QUERY)
        load.wait_for(50)
        replaced = {_only_haproxy(server)}
        [victim] = (
            replaced if which == "haproxy" else [each for each in _children(server) if _title(each).startswith(which)]
        )
        victim.kill()
        died_s = time.monotonic()
        while not any(at_s > died_s and status == 200 for at_s, status, _ in load.answers):
            assert time.monotonic() < died_s + 2
        standby = _haproxies(server) - replaced
        while standby & (there := _haproxies(server)) or not there:
            assert time.monotonic() < died_s + 240
            time.sleep(0.5)
        load.wait_for(50)
        statuses = load.end()
        failed = [(at_s - died_s, *rest) for at_s, *rest in load.answers if rest[0] != 200]
        assert set(statuses) == {0, 200}, failed
        assert all(at_s < 2 for at_s, *_ in failed), failed
        server.terminate()
        assert server.wait(60) == 0


def _only_haproxy(server: subprocess.Popen[bytes]) -> psutil.Process:
    """The one that answers; that of the configuration before may still be ending."""
    deadline_s = time.monotonic() + 60
    while len(there := _haproxies(server)) != 1:
        assert time.monotonic() < deadline_s, there
        time.sleep(0.2)
    return there.pop()


def _haproxies(server: subprocess.Popen[bytes]) -> set[psutil.Process]:
    found = set()
    for each in _children(server):
        with contextlib.suppress(psutil.NoSuchProcess):
            found |= {each} if each.name() == "haproxy" else set()
    return found


def _children(server: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(server.pid).children(recursive=True)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("drain_s", "status"), [("60", 200), ("1", 503)])
def test_sigterm_lets_requests_under_way_end(world: World, tmp_path, drain_s: str, status: int):
    """They take 5 seconds here; those that come meanwhile are told to come back, and nothing is left behind."""
    with served_by_command(world, tmp_path / "log", "--batch-wait-s", "5", "--drain-s", drain_s) as server:
        folder = _haproxy_folder(server)
        url = f"http://127.0.0.1:{server.args[server.args.index('--port') + 1]}"

        def embed() -> httpx.Response:
            return httpx.post(f"{url}/v1/embeddings", json={"input": "array"}, timeout=60)

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            running = [pool.submit(embed) for _ in range(3)]
            time.sleep(1.5)
            server.terminate()
            time.sleep(0.7)
            if status == 200:
                late = embed()
                assert (late.status_code, late.headers["retry-after"], late.json()["error"]["code"]) == (
                    503,
                    "1",
                    "stopping",
                )
            assert [each.result().status_code for each in running] == [status] * 3
        told_s = time.monotonic()
        assert server.wait(60) == 0
        assert time.monotonic() - told_s < 30
    assert not folder.exists()


@pytest.mark.timeout(300)
def test_a_signal_to_all_processes_of_a_server_ends_it_soon(world: World, tmp_path):
    """As `timeout` and systemd send it: Ray's own processes are gone before they can be asked to stop."""
    with served_by_command(world, tmp_path / "log") as server:
        folder = _haproxy_folder(server)
        os.killpg(server.pid, signal.SIGTERM)
        assert server.wait(40) == 0
        assert "GCS" not in (tmp_path / "log").read_text()
        assert "RpcError" not in (tmp_path / "log").read_text()
    assert not folder.exists()


def _haproxy_folder(server: subprocess.Popen[bytes]) -> Path:
    """Where its files lie, in the temporary folder."""
    command = _only_haproxy(server).cmdline()
    return Path(command[command.index("-f") + 1]).parent


def _is_free_within(port: int, seconds: float) -> bool:
    deadline_s = time.monotonic() + seconds
    while time.monotonic() < deadline_s:
        with contextlib.suppress(OSError):
            socket.create_server(("127.0.0.1", port)).close()
            return True
        time.sleep(0.1)
    return False


def _ready_within(url: str, seconds: float, wanted: int) -> bool:
    deadline_s = time.monotonic() + seconds
    while time.monotonic() < deadline_s:
        if httpx.get(f"{url}/readyz", timeout=60).status_code == wanted:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.timeout(900)
def test_a_lost_shard_by_policy(started, world: World):
    versions = {"tiny": world.version()}
    config = world.config(versions=versions, index_actors=2, lost_shards="partial", shard_timeout_s=0.5)
    url = started(config)
    [victim] = processes("ray::ServeReplica:readapt-tiny:index-1")
    os.kill(victim.pid, signal.SIGKILL)
    body = _found(url, {"top_k": 100})  # where the machine is busy, the other part may be late, too: that is 503
    assert (body["partial"], body["missing"]) == (True, ["index-1"])
    # Two shards of 25 and 15 vectors: the second is the one that is lost.
    assert len(body["data"][0]["hits"]) == 25
    deadline_s = time.monotonic() + 120
    while body["partial"]:
        assert time.monotonic() < deadline_s
        body = _found(url, {"top_k": 100})
    assert len(body["data"][0]["hits"]) == 40
    assert _ready_within(url, 5, wanted=200)


@pytest.mark.timeout(900)
def test_what_is_lost_for_good_keeps_no_other_part_from_being_served(started, world: World, tmp_path):
    """A slice whose file is gone, and a version without a process: a new gateway serves what there is, and updates go on."""
    shutil.copytree(world.version()["index"], tmp_path / "index")
    part = world.version() | {"index": str(tmp_path / "index"), "index_actors": 2}
    versions = {"part": part, "gone": world.version("other")}
    config = world.config(versions=versions, lost_shards="partial", shard_timeout_s=0.5)
    url = started(config)
    (tmp_path / "index/shards/00001.faiss").unlink()
    for title in ("readapt-part:index-1", "readapt:gateway"):
        [victim] = processes(f"ray::ServeReplica:{title}")
        os.kill(victim.pid, signal.SIGKILL)
    body = _found(url, {"model": "part", "top_k": 100})
    assert (body["partial"], body["missing"], len(body["data"][0]["hits"])) == (True, ["index-1"], 25)
    models = httpx.get(f"{url}/v1/models", timeout=60).json()["data"]
    assert [each["num_vectors"] for each in models if each["id"] == "part"] == [40]
    settings = config.model_dump(mode="json", exclude={"versions"}) | {"update": True, "default": "gone"}
    serve(type(config).parse(settings | {"versions": versions}), blocking=False)
    assert _found(url, {})["model"] == "gone"
    ray.serve.delete("readapt-gone")
    [victim] = processes("ray::ServeReplica:readapt:gateway")
    os.kill(victim.pid, signal.SIGKILL)
    assert _found(url, {"model": "part"})["partial"]
    answer = httpx.post(f"{url}/v1/search", json=QUERY, timeout=60)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "version_down")
    ready = httpx.get(f"{url}/readyz", timeout=60).json()["versions"]
    assert ready["gone"]["reason"] == "not up: its encoder does not answer"


def _found(url: str, body: dict) -> dict:
    """What a search finds, once a gateway answers."""
    deadline_s = time.monotonic() + 240
    while time.monotonic() < deadline_s:
        with contextlib.suppress(httpx.TransportError):
            answer = httpx.post(f"{url}/v1/search", json=QUERY | body, timeout=60)
            if answer.status_code == 200:
                return answer.json()
        time.sleep(0.2)
    raise TimeoutError(answer.text)


@pytest.mark.timeout(900)
def test_the_default_changes_under_load_without_a_failed_request(started, world: World):
    base = world.config(versions={"base": world.version("other")})
    url = started(base)
    load = Load(url, 4, QUERY)
    load.wait_for(50)
    both = {"base": world.version("other"), "adapted": world.version()}
    settings = base.model_dump(mode="json", exclude={"versions"}) | {"update": True}
    serve(type(base).parse(settings | {"versions": both, "default": "adapted"}), blocking=False)
    load.wait_for(50)
    # The old version goes only when nobody needs it any more.
    serve(type(base).parse(settings | {"versions": {"adapted": world.version()}}), blocking=False)
    load.wait_for(50)
    statuses = load.end()
    assert set(statuses) == {200}, [each for each in load.answers if each[1] != 200]
    names = [name for _, _, name in sorted(load.answers)]
    assert (names[0], names[-1]) == ("base", "adapted")
    assert set(names) == {"base", "adapted"}
    models = httpx.get(f"{url}/v1/models", timeout=60).json()["data"]
    assert [each["id"] for each in models] == ["adapted", "adapted-passage", "adapted-raw"]
    assert set(ray.serve.status().applications) == {"readapt", "readapt-adapted"}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("how", ["the gateway cannot read the passages", "SIGTERM"])
def test_an_update_that_ends_at_the_gateway_is_undone(started, world: World, tmp_path, monkeypatch, how: str):
    base = world.config(versions={"base": world.version("other")}, max_requests=99)
    url = started(base)
    load = Load(url, 2, QUERY)
    load.wait_for(20)
    ingest_artifact(tmp_path / "corpus", small_corpus(30))
    both = {"base": world.version("other"), "new": world.version() | {"corpus": str(tmp_path / "corpus")}}
    update = type(base).parse({"versions": both, "default": "new", "port": base.port, "update": True})
    if how == "SIGTERM":
        monkeypatch.setattr(server, "_wait_until_ready", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(KeyboardInterrupt):
            serve(update, blocking=False)
    else:
        [file] = (tmp_path / "corpus/passages").iterdir()
        content = file.read_bytes()
        file.write_bytes(content[:30] + bytes(each ^ 255 for each in content[30:60]) + content[60:])
        with pytest.raises(CorruptFileError, match="was cut short or altered"):
            serve(update, blocking=False)
        assert load.end() == {200: len(load.answers)}
        load = Load(url, 2, QUERY)
        monkeypatch.setattr(server.PassageStore, "open", lambda *_: None)  # as if it were damaged only later
        with pytest.raises(ReadaptError, match="was cut short or altered"):
            serve(update, blocking=False)
    load.wait_for(20)
    statuses = load.end()
    assert set(statuses) == {200}, [each for each in load.answers if each[1] != 200]
    assert {name for *_, name in load.answers[-20:]} == {"base"}
    assert set(ray.serve.status().applications) == {"readapt", "readapt-base"}
    assert updates.served_gateway()[0].limits.max_requests == 99


@pytest.mark.timeout(900)
def test_who_goes_away_costs_no_further_compute(started, world: World):
    url = started(world.config(name="tiny"))
    already = _rows_encoded(url)  # other servers of this Ray had theirs
    # Distinct texts: equal ones are encoded once.
    texts = [f"{number} " + "array shape " * 10 for number in range(1500)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for each in [pool.submit(_ask_and_go, url, texts) for _ in range(4)]:
            each.result()
    assert httpx.post(f"{url}/v1/embeddings", json={"input": "a"}, timeout=60).status_code == 200
    time.sleep(15)  # Ray exports metrics every ten seconds
    assert 0 < _rows_encoded(url) - already < 3000  # of 6000
    assert 'status="499"' in httpx.get(f"{url}/metrics", timeout=60).text


def _ask_and_go(url: str, texts: list[str]) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{url}/v1/embeddings", json={"input": texts, "truncate": True, "input_type": "passage"}, timeout=0.5
        )


def _rows_encoded(url: str) -> float:
    page = httpx.get(f"{url}/metrics", timeout=60).text
    return sum(
        float(line.rsplit(" ", 1)[1]) for line in page.splitlines() if line.startswith("ray_readapt_batch_rows_sum")
    )


@pytest.mark.timeout(1500)
def test_ten_minutes_at_twice_the_capacity_with_an_update(started, world: World):
    """$READAPT_SOAK_S seconds, ten minutes unless it says otherwise. Every answer is right, refused at once, or in time."""
    seconds = float(os.environ.get("READAPT_SOAK_S", "600"))
    config = world.config(versions={"tiny": world.version()}, max_requests=8, max_queued_tokens=2000)
    url = started(config)
    texts = [f"{number} " + "array shape " * (number % 9) for number in range(300)]
    vectors = world.encoder.encode(texts, "query")
    ended, seen = threading.Event(), collections.Counter()

    def ask(number: int) -> None:
        with httpx.Client(base_url=url, timeout=120) as client:
            step = number
            while not ended.is_set():
                step += 1
                rows = [(7 * step + each) % len(texts) for each in range((1, 1, 1, 4, 16, 64)[step % 6])]
                body = {"input": [texts[row] for row in rows], "truncate": True}
                answer = client.post("/v1/embeddings", json=body)
                seen[answer.status_code] += 1
                if answer.status_code == 200:
                    found = np.array([each["embedding"] for each in answer.json()["data"]])
                    seen["wrong"] += not np.allclose(found, vectors[rows], atol=2e-5)
                else:
                    assert int(answer.headers["retry-after"]) >= 1

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        clients = [pool.submit(ask, number) for number in range(16)]
        time.sleep(seconds / 3)
        settings = config.model_dump(mode="json", exclude={"versions"}) | {"update": True}
        both = {"tiny": world.version(), "other": world.version("other")}
        serve(type(config).parse(settings | {"versions": both}), blocking=False)
        early = _memory()
        time.sleep(2 * seconds / 3)
        late = _memory()
        ended.set()
        for each in clients:
            each.result()
    print(dict(seen))
    assert seen["wrong"] == 0 and set(seen) - {"wrong"} <= {200, 429, 504}
    assert seen[504] < 0.01 * (seen[200] + seen[504])
    assert seen[200] > 100
    for title, before in early.items():
        assert late[title] < 1.1 * before + 20e6, f"{title} grew from {before / 1e6:.0f} to {late[title] / 1e6:.0f} MB"


def _memory() -> dict[str, int]:
    """Private bytes of the server's processes."""
    replicas = ("ray::ServeReplica:readapt:gateway", "ray::ServeReplica:readapt-tiny:encoder")
    return {
        title: sum(each.memory_full_info().uss for each in processes(title)) for title in (*replicas, "ray::HAProxy")
    }
