"""Nodes in network namespaces of their own, joined by a bridge, so that one can be cut off while it runs on."""

import contextlib
import os
import subprocess
from collections.abc import Iterator

HEAD_ADDRESS = "10.77.0.1"
_BRIDGE = "readapt0"


class Network:
    """A bridge, and a namespace with a cable to it for each node."""

    def __init__(self) -> None:
        self._names: list[str] = []

    def add(self) -> tuple[list[str], str]:
        """A new namespace: how to run a command in it, and its address."""
        number = len(self._names) + 2
        name, cable, address = f"readapt{os.getpid()}-{number}", f"readapt{number}", f"10.77.0.{number}"
        self._names.append(name)
        _ip("netns", "add", name)
        _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", cable, "master", _BRIDGE, "up")
        _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            _ip("-n", name, "link", "set", device, "up")
        return ["ip", "netns", "exec", name], address

    def cut(self, address: str) -> None:
        """Pull the cable of the namespace with this address."""
        _ip("link", "set", f"readapt{address.rpartition('.')[2]}", "down")

    def close(self) -> None:
        """Remove all of it."""
        for name in self._names:
            _ip("netns", "delete", name)
        _ip("link", "delete", _BRIDGE)


@contextlib.contextmanager
def network() -> Iterator[Network | None]:
    """A network while the block runs; None where it is not permitted."""
    try:
        _ip("link", "add", _BRIDGE, "type", "bridge")
    except (subprocess.CalledProcessError, FileNotFoundError):
        yield None
        return
    _ip("addr", "add", f"{HEAD_ADDRESS}/24", "dev", _BRIDGE)
    _ip("link", "set", _BRIDGE, "up")
    made = Network()
    try:
        yield made
    finally:
        made.close()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
