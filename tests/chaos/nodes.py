"""A Ray cluster of three nodes on one machine, each a process tree of its own that can be killed."""

import contextlib
import random
import secrets
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.chaos.network import HEAD_ADDRESS, Network

_Process = subprocess.Popen[bytes]

LOOPBACK = "127.0.0.1"
REPOSITORY = Path(__file__).parent.parent.parent
_NOT_OF_A_DRIVER = ("ray::IDLE", "ray::_", "ray::ActorLocationTracker", "ray::PlacementGroupCleaner")
_STORE_BYTES = 100 << 20
_START_S = 60.0


class Cluster:
    """A head without CPUs, and two nodes of one CPU each; what dies is replaced.

    Args:
        logs: folder for what `ray start` says.
        environment: of all processes.
        network: gives each node but the head a network of its own.
    """

    def __init__(self, logs: Path, environment: dict[str, str], network: Network | None = None) -> None:
        self._logs, self._network = logs, network
        self.environment = {
            **environment,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        """What nodes and drivers run with."""
        self._num_started = 0
        self._head: _Process
        self._nodes: list[tuple[_Process, str]] = []
        self._left: list[_Process] = []
        self.address = ""
        self.start()

    def start(self) -> None:
        """All three nodes, afresh."""
        host, port = HEAD_ADDRESS if self._network else LOOPBACK, free_port()
        self.address = f"{host}:{port}"
        self._head = self._started([], host, "--head", f"--port={port}", "--include-dashboard=false", "--num-cpus=0")
        wait_for(port, host)
        self._nodes = []
        for _ in range(2):  # one after the other: two that start together on one machine can stop each other
            self._nodes.append(self._joined())
            self._wait_until_joined()

    def _wait_until_joined(self) -> None:
        deadline_s = time.monotonic() + _START_S
        while b"Ray runtime started" not in self._log(self._num_started).read_bytes() and time.monotonic() < deadline_s:
            self.mend()
            time.sleep(0.1)

    def _log(self, number: int) -> Path:
        return self._logs / f"node-{number}.log"

    def _joined(self) -> tuple[_Process, str]:
        prefix, host = self._network.add() if self._network else ([], LOOPBACK)
        return self._started(prefix, host, f"--address={self.address}", "--num-cpus=1"), host

    def _started(self, prefix: list[str], host: str, *options: str) -> _Process:
        self._num_started += 1
        command = [*prefix, str(Path(sys.executable).parent / "ray"), "start", "--block", f"--node-ip-address={host}"]
        with self._log(self._num_started).open("wb") as log:
            return subprocess.Popen(
                [*command, *options, f"--object-store-memory={_STORE_BYTES}"],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                cwd=REPOSITORY,
                start_new_session=True,
            )

    def kill_worker(self, rng: random.Random) -> str:
        """A worker process that works, else one that waits; its name, or why there is none."""
        found = self._workers()
        busy = [each for each in found if not _title(each).startswith("ray::IDLE")]
        if not found:
            return "no worker was there"
        chosen = rng.choice(sorted(busy or found, key=lambda each: each.pid))
        title = _title(chosen)
        kill([chosen])
        return title

    def kill_raylet(self, rng: random.Random) -> str:
        """The raylet of a node, whose workers find out by themselves; another node takes its place."""
        place = rng.randrange(2)
        kill([each for each in family(self._nodes[place][0]) if each.name() == "raylet"])
        self._left.append(self._nodes[place][0])
        self._nodes[place] = self._joined()
        return f"raylet of node {place}"

    def kill_node(self, rng: random.Random) -> str:
        """All processes of a node at once; another node takes its place."""
        place = rng.randrange(2)
        _end(self._nodes[place][0])
        self._nodes[place] = self._joined()
        return f"all of node {place}"

    def cut_off(self, rng: random.Random) -> str:
        """No packet reaches or leaves a node, whose processes run on; another node takes its place."""
        assert self._network is not None
        place = rng.randrange(2)
        process, host = self._nodes[place]
        self._network.cut(host)
        self._left.append(process)
        self._nodes[place] = self._joined()
        return f"node {place} at {host}"

    def mend(self) -> None:
        """Another node in the place of one that ended by itself, as one does that could not start in half a minute."""
        for place, (process, _) in enumerate(self._nodes):
            if process.poll() is not None:
                self._left.append(process)
                self._nodes[place] = self._joined()

    def settle(self) -> None:
        """Return once the workers of a driver that was killed are gone; actors of Ray's own outlive it."""
        deadline_s = time.monotonic() + _START_S
        while any(not _title(each).startswith(_NOT_OF_A_DRIVER) for each in self._workers()):
            if time.monotonic() > deadline_s:
                raise AssertionError(f"workers outlive their driver: {[_title(each) for each in self._workers()]}")
            time.sleep(0.2)

    def _workers(self) -> list[psutil.Process]:
        return [
            each
            for node in [self._head, *(node for node, _ in self._nodes)]
            for each in family(node)
            if _is_worker(each)
        ]

    def stop(self) -> None:
        """Kill all of it."""
        for process in [*self._left, *(node for node, _ in self._nodes), self._head]:
            _end(process)


def _end(process: _Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        kill([*family(process), psutil.Process(process.pid)])
    process.wait()


def family(process: _Process) -> list[psutil.Process]:
    """All processes that a process started, and those started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(process.pid).children(recursive=True)
    return []


def _title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline()).strip()
    return ""


def _is_worker(process: psutil.Process) -> bool:
    """A node's agents are called as workers are, and take the node with them."""
    title = _title(process)
    return title.startswith("ray::") and not title.endswith("Agent")


def kill(processes: list[psutil.Process]) -> None:
    """SIGKILL for those that are still there."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def free_port() -> int:
    """A port of loopback that nobody listens on, below those that systems give to connections: these take them any time."""
    while True:
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind((LOOPBACK, random.randrange(20_000, 32_000)))
            return int(listener.getsockname()[1])


def wait_for(port: int, host: str = LOOPBACK) -> None:
    """Return once something listens on a port."""
    deadline_s = time.monotonic() + _START_S
    while time.monotonic() < deadline_s:
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
            return
        time.sleep(0.1)
    raise TimeoutError(f"nothing listens on port {port}")
