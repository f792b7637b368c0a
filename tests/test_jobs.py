"""The whole run through a real job server: submitted, watched, stopped, killed, submitted again."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from readapt_ray import artifacts
from tests import factories
from tests.hosts import wait_until
from tests.job_server import JobServer, job_server

REPOSITORY = Path(__file__).parent.parent
NUM_PASSAGES, NUM_EPOCHS = 1200, 4
MAX_PACKAGE_BYTES = 30_000_000
"""The quickstart's pair of models is most of it."""


@pytest.fixture
def server() -> Iterator[JobServer]:
    with job_server() as running:
        yield running


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_job_that_is_stopped_and_killed_goes_on_when_it_is_submitted_again(server: JobServer, tmp_path: Path) -> None:
    train = {
        "block_tokens": 64,
        "batch_size": 8,
        "num_epochs": NUM_EPOCHS,
        "num_workers": 1,
        "num_cpus_per_worker": 1,
        "checkpoint_every_s": 0,
    }
    embed = {"rows_per_shard": 50}
    run_file = factories.run_file(tmp_path, num_passages=NUM_PASSAGES, num_queries=20, train=train, embed=embed)
    root = tmp_path / "root"

    job = ("python", "jobs/pipeline.py", "--config", str(run_file), "--root", str(root))
    server.submit("first", *job)
    wait_until(lambda: bool(list((root / "adapter/checkpoints").glob("step-*"))), "training", limit_s=400)
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

    server.submit("second", *job)
    wait_until(lambda: bool(list((root / "vectors/retriever/vectors").glob("part-*"))), "embedding", limit_s=400)
    lease = artifacts.read_lease(str(root / "vectors/retriever"))
    assert lease is not None
    os.kill(lease["pid"], signal.SIGKILL)
    assert server.ended("second") == "failed"
    assert "train: resumes where it stopped" in server.job("logs", "second")

    server.submit("third", *job)
    assert server.ended("third") == "succeeded", server.job("logs", "third")
    logs = server.job("logs", "third")
    assert "train: already complete" in logs
    assert "embed: resumes where it stopped" in logs
    counts = {
        name: artifacts.open_artifact(str(root / name), stage).manifest.counts
        for name, stage in (("adapter", "train"), ("vectors/adapted", "embed"), ("report", "evaluate"))
    }
    assert counts["adapter"]["num_passages"] == NUM_EPOCHS * NUM_PASSAGES
    assert counts["vectors/adapted"]["num_vectors"] == NUM_PASSAGES
