"""Machines of a cluster, on this machine: each has an address, a name, processes, /tmp and a home of its own, and an sshd.

They are Linux namespaces on one bridge, so that a command which ends the processes of a whole machine, such as `ray stop`,
ends those of one host. /mnt is a folder that all of them share. A host's own name resolves to 127.0.1.1, as Debian's
installer has it. Needs root, and Debian's openssh-server, rsync and iproute2.
"""

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

USER, HOME, SHARED = "readapt", "/home/readapt", "/mnt"
PATH = f"{os.environ['PATH']}{os.pathsep}/usr/sbin{os.pathsep}/sbin"
NAMESPACES = ("--net", "--pid", "--mount", "--uts")
_PROGRAMS = ("sshd", "ssh", "ssh-keygen", "rsync", "ip", "unshare", "nsenter")
_SSHD = f"""
HostKey {HOME}/.sshd/host
AuthorizedKeysFile {HOME}/.ssh/authorized_keys
PermitRootLogin yes
PasswordAuthentication no
StrictModes no
MaxStartups 100
PidFile none
"""
_INSIDE = f"""
set -e
hostname "$(basename "$1")"
mount --bind "$1/passwd" /etc/passwd
mount --bind "$1/hosts" /etc/hosts
mount --bind "$1/../shared" {SHARED}
mount -t tmpfs tmpfs /home; mkdir {HOME}; mount --bind "$1/home" {HOME}
mount -t tmpfs tmpfs /run; mkdir /run/sshd
mount -t tmpfs tmpfs /dev/shm
mount --bind "$1/tmp" /tmp
ip link set lo up
until ip link show eth0 > /dev/null 2>&1; do sleep 0.05; done
ip address add "$2/24" dev eth0; ip link set eth0 up; ip route add default via "$3"
exec "$(command -v sshd)" -D -e -f {HOME}/.sshd/config
"""


@dataclass(frozen=True)
class Host:
    """A running host. Its folder holds its `home` and its `tmp`."""

    name: str
    address: str
    folder: Path
    pid: int

    def run(self, *command: str, **environment: str) -> str:
        """Run a command on it, past its sshd, and return what it says."""
        done = subprocess.run(
            ["nsenter", f"--target={self.pid}", *NAMESPACES, "--", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            env={"PATH": PATH, "HOME": HOME, **environment},
        )
        return done.stdout


@dataclass(frozen=True)
class Hosts:
    """Running hosts, the folder that they share, the private key that opens them, and this machine's address to them."""

    nodes: Sequence[Host]
    shared: Path
    key: Path
    gateway: str


def require(*programs: str) -> None:
    """Skip the test where hosts cannot be made, or some other program is not installed."""
    absent = [name for name in (*_PROGRAMS, *programs) if not shutil.which(name, path=PATH)]
    if absent:
        pytest.skip(
            f"not installed: {', '.join(absent)} (Debian: openssh-server rsync iproute2 slurmctld slurmd munge)"
        )
    can = subprocess.run(["unshare", *NAMESPACES, "--fork", "mount", "-t", "tmpfs", "t", SHARED], check=False)
    if can.returncode:
        pytest.skip("no right to make namespaces and to mount in them: needs root")


@contextlib.contextmanager
def running(folder: Path, num_hosts: int, environment: Mapping[str, str]) -> Iterator[Hosts]:
    """Start hosts whose login shells have these variables, as an image gives them to all its processes."""
    bridge, subnet = f"rd{os.getpid() % 100_000}", f"10.{200 + os.getpid() % 50}.{os.getpid() // 50 % 250}"
    key, shared = folder / "key", folder / "shared"
    shared.mkdir()
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    addresses = {f"node{n + 1}": f"{subnet}.{n + 10}" for n in range(num_hosts)}
    with contextlib.ExitStack() as stack:
        _ip("link", "add", bridge, "type", "bridge")
        stack.callback(_ip, "link", "delete", bridge)
        _ip("address", "add", f"{subnet}.1/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        nodes = []
        for name, address in addresses.items():
            _furnish(folder / name, key, addresses, environment)
            pid = stack.enter_context(_started(folder / name, address, f"{subnet}.1", bridge))
            nodes.append(Host(name, address, folder / name, pid))
        for node in nodes:
            wait_until(lambda node=node: _lets_in(node.address, key), f"{node.name} to let somebody in")
        yield Hosts(nodes, shared, key, f"{subnet}.1")


def wait_until(happened: Callable[[], object], what: str, limit_s: float = 60) -> None:
    """Wait for something, and fail where it does not come."""
    deadline_s = time.monotonic() + limit_s
    while not happened():
        assert time.monotonic() < deadline_s, f"waited {limit_s:.0f} s for {what}"
        time.sleep(0.5)


def _furnish(host: Path, key: Path, addresses: Mapping[str, str], environment: Mapping[str, str]) -> None:
    """Make a host's files: a home with the key that may log in, /tmp, and what its names and users are."""
    for name in ("home/.ssh", "home/.sshd", "tmp"):
        (host / name).mkdir(parents=True)
    (host / "tmp").chmod(0o1777)
    shutil.copy(key.with_suffix(".pub"), host / "home/.ssh/authorized_keys")
    (host / "home/.sshd/config").write_text(_SSHD)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", host / "home/.sshd/host"], check=True)
    exports = "".join(f"export {name}='{value}'\n" for name, value in environment.items())
    (host / "home/.bash_profile").write_text(exports)
    (host / "home/.bashrc").touch()  # Ray's launcher sources it
    (host / "passwd").write_text(f"{USER}:x:0:0::{HOME}:/bin/bash\n{Path('/etc/passwd').read_text()}")
    names = {**addresses, host.name: "127.0.1.1"}
    (host / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{names[name]} {name}\n" for name in names))


@contextlib.contextmanager
def _started(folder: Path, address: str, gateway: str, bridge: str) -> Iterator[int]:
    """Start a host on a bridge and return its first process."""
    link = f"{bridge}-{folder.name[-1]}"
    unshare = ["unshare", *NAMESPACES, "--fork", "--mount-proc", "--kill-child"]
    with (folder / "sshd.log").open("wb") as log:
        process = subprocess.Popen(
            [*unshare, "bash", "-c", _INSIDE, "host", folder, address, gateway],
            env={"PATH": PATH},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        wait_until(children.read_text, f"{folder.name} to start")
        inside = int(children.read_text())
        _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", str(inside))
        _ip("link", "set", link, "master", bridge, "up")
        yield inside
    finally:
        process.kill()
        process.wait()


def _lets_in(address: str, key: Path) -> bool:
    options = ["-i", str(key), "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
    tried = subprocess.run(["ssh", *options, f"{USER}@{address}", "true"], capture_output=True, check=False)
    return tried.returncode == 0


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, env={"PATH": PATH})
