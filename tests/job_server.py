"""A head node with a job server, as `ray start --head` makes it."""

import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.chaos import nodes
from tests.chaos.nodes import REPOSITORY
from tests.hosts import wait_until

BIN = Path(sys.executable).parent


@contextmanager
def job_server(**environment: str) -> Iterator["JobServer"]:
    """One that is gone afterwards, with more in the environment of its node."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # a socket's path may have some 100 characters
    running = JobServer(folder, **environment)
    yield running
    running.close()
    shutil.rmtree(folder, ignore_errors=True)


class JobServer:
    """A head node with a job server that asks for a token, and Ray's own command line to it."""

    def __init__(self, folder: Path, **environment: str) -> None:
        port, self._port = nodes.free_port(), nodes.free_port()
        self.folder = folder
        self._environment = {
            **os.environ,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        }
        self._environment.pop("RAY_ADDRESS", None)
        self._environment.pop("PYTHONPATH", None)
        self._environment.update(environment)
        command = [BIN / "ray", "start", "--head", "--block", f"--port={port}", f"--temp-dir={folder}", "--num-cpus=2"]
        command += [
            "--node-ip-address=127.0.0.1",
            f"--dashboard-port={self._port}",
            f"--dashboard-agent-listen-port={nodes.free_port()}",  # its default may be another Ray's, and jobs are refused
            f"--object-store-memory={100 << 20}",
        ]
        with (folder / "head.log").open("wb") as log:
            self._head = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=self._environment)
        nodes.wait_for(self._port)
        self.address = f"http://127.0.0.1:{self._port}"

    def job(self, command: str, *arguments: str, **environment: str) -> str:
        """What `ray job COMMAND` says."""
        return self.said("ray", "job", command, "--address", self.address, *arguments, **environment)

    def submit(self, name: str, *command: str) -> None:
        """Submit a job from the repository's root; the server refuses as long as its node's agent is not up."""
        given = ("--working-dir", str(REPOSITORY), "--no-wait", "--submission-id", name, "--", *command)

        def is_taken() -> bool:
            said = self.job("submit", *given)
            assert "submitted successfully" in said or "No available agent" in said, said
            return "submitted successfully" in said

        wait_until(is_taken, "the job server to take a job", limit_s=180)

    def said(self, program: str, *arguments: str, **environment: str) -> str:
        """What one of Ray's programs says."""
        done = subprocess.run(
            [BIN / program, *arguments],
            env={**self._environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )
        return done.stdout

    def ended(self, name: str) -> str:
        """What became of a job, once it has ended."""
        deadline_s = time.monotonic() + 600
        while time.monotonic() < deadline_s:
            found = re.search(rf"Job '{name}' (succeeded|failed|was stopped)", self.job("status", name))
            if found:
                return found[1]
            time.sleep(1)
        raise TimeoutError(self.job("logs", name))

    def close(self) -> None:
        nodes.kill([*nodes.family(self._head), psutil.Process(self._head.pid)])
        self._head.wait()
