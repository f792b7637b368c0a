"""The whole run through a real job server: submitted, watched, stopped, killed, submitted again."""

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from readapt_ray import artifacts
from tests import factories
from tests.chaos import nodes

REPOSITORY = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
NUM_PASSAGES, NUM_EPOCHS = 1200, 4
MAX_PACKAGE_BYTES = 30_000_000
"""The quickstart's pair of models is most of it."""


class JobServer:
    """A head node with a job server that asks for a token, and Ray's own command line to it."""

    def __init__(self, folder: Path) -> None:
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
        command = [BIN / "ray", "start", "--head", "--block", f"--port={port}", f"--temp-dir={folder}", "--num-cpus=2"]
        command += [
            "--node-ip-address=127.0.0.1",
            f"--dashboard-port={self._port}",
            f"--object-store-memory={100 << 20}",
        ]
        with (folder / "head.log").open("wb") as log:
            self._head = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=self._environment)
        nodes.wait_for(self._port)

    def job(self, command: str, *arguments: str, **environment: str) -> str:
        """What `ray job COMMAND` says."""
        done = subprocess.run(
            [BIN / "ray", "job", command, "--address", f"http://127.0.0.1:{self._port}", *arguments],
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
        deadline_s = time.monotonic() + 300
        while time.monotonic() < deadline_s:
            found = re.search(rf"Job '{name}' (succeeded|failed|was stopped)", self.job("status", name))
            if found:
                return found[1]
            time.sleep(1)
        raise TimeoutError(self.job("logs", name))

    def close(self) -> None:
        nodes.kill([*nodes.family(self._head), psutil.Process(self._head.pid)])
        self._head.wait()


@pytest.fixture
def server() -> Iterator[JobServer]:
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # a socket's path may have some 100 characters
    running = JobServer(folder)
    yield running
    running.close()
    shutil.rmtree(folder, ignore_errors=True)


def wait_until(happened: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + 180
    while not happened():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_job_that_is_stopped_and_killed_goes_on_when_it_is_submitted_again(server: JobServer, tmp_path: Path) -> None:
    train = {
        "block_tokens": 64,
        "batch_size": 8,
        "num_epochs": NUM_EPOCHS,
        "num_workers": 1,
        "num_cpus_per_worker": 1,
        "checkpoint_every_steps": 5,
    }
    embed = {"rows_per_shard": 50}
    run_file = factories.run_file(tmp_path, num_passages=NUM_PASSAGES, num_queries=20, train=train, embed=embed)
    root = tmp_path / "root"

    def submit(name: str) -> str:
        working_dir = ["--working-dir", str(REPOSITORY), "--no-wait", "--submission-id", name, "--"]
        return server.job(
            "submit", *working_dir, "python", "jobs/pipeline.py", "--config", str(run_file), "--root", str(root)
        )

    said = submit("first")
    assert "submitted successfully" in said, said
    wait_until(lambda: bool(list((root / "adapter/checkpoints").glob("step-*"))), "training")
    (unpacked,) = server.folder.glob("session_2*/runtime_resources/working_dir_files/_ray_pkg_*/readapt_ray")
    names = {path.name for path in unpacked.parent.iterdir()}
    size_bytes = sum(path.stat().st_size for path in unpacked.parent.rglob("*") if path.is_file())
    assert size_bytes < MAX_PACKAGE_BYTES
    assert {"readapt_ray", "jobs"} <= names
    assert not names & {"tests", "benchmarks", "clusters", ".git", ".venv", ".ruff_cache", ".mypy_cache"}
    assert "RUNNING" in server.job("status", "first")
    assert "oken authentication is enabled" in server.job("status", "first", RAY_AUTH_TOKEN="0" * 64)
    server.job("stop", "first")
    assert server.ended("first") == "was stopped"
    assert "] train -> " in server.job("logs", "first")

    submit("second")
    wait_until(lambda: bool(list((root / "vectors/retriever/vectors").glob("part-*"))), "embedding")
    building = artifacts.read_building(str(root / "vectors/retriever"))
    assert building is not None
    os.kill(building["pid"], signal.SIGKILL)
    assert server.ended("second") == "failed"
    assert "train: goes on where it stopped" in server.job("logs", "second")

    submit("third")
    assert server.ended("third") == "succeeded", server.job("logs", "third")
    said = server.job("logs", "third")
    assert "train: already complete" in said
    assert "embed: goes on where it stopped" in said
    counts = {
        name: artifacts.open_artifact(str(root / name), stage).manifest.counts
        for name, stage in (("adapter", "train"), ("vectors/adapted", "embed"), ("report", "evaluate"))
    }
    assert counts["adapter"]["num_passages"] == NUM_EPOCHS * NUM_PASSAGES
    assert counts["vectors/adapted"]["num_vectors"] == NUM_PASSAGES
