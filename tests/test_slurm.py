"""slurm.sh on a real Slurm with two nodes: a run is killed with all of its nodes, and goes on when it is submitted again."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from readapt_ray import artifacts
from tests import hosts, quickstart_job, slurm_cluster
from tests.hosts import SHARED, wait_until
from tests.slurm_cluster import Slurm

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Slurm]:
    hosts.require(*slurm_cluster.PROGRAMS)
    with hosts.running(tmp_path, 2, {}) as running:
        yield slurm_cluster.start(running, num_cpus=2)


def submit(slurm: Slurm, config: Path) -> Path:
    """Submit the script as its first lines say, and return the job's log."""
    options = "--nodes=2 --gpus-per-node=0 --cpus-per-task=2 --parsable"
    job = f"clusters/slurm.sh --config {SHARED}/{config.name} --root {SHARED}/root"
    number = slurm.said(
        *("bash", "-c", f"cd {REPOSITORY} && sbatch {options} --output={SHARED}/%j.log {job}"),
        HOME=SHARED,
        PYTHONPATH=str(REPOSITORY),
        READAPT_PYTHON=sys.executable,
        RAY_USAGE_STATS_ENABLED="0",
        OMP_NUM_THREADS="1",
    )
    assert number.isdigit(), number
    return slurm.hosts.shared / f"{number}.log"


def cpus_of_raylets(slurm: Slurm) -> set[str]:
    listed = "for pid in $(pgrep raylet); do taskset --cpu-list --pid $pid; done"
    said = "".join(node.run("bash", "-c", listed) for node in slurm.hosts.nodes)
    return set(re.findall(r"list: (.+)", said))


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_run_that_is_killed_goes_on_when_it_is_submitted_again(slurm: Slurm) -> None:
    root = slurm.hosts.shared / "root"
    config = quickstart_job.write(slurm.hosts.shared)
    first = submit(slurm, config)
    wait_until(
        lambda: slurm.is_done() or list((root / "adapter/checkpoints").glob("step-*")), "a checkpoint", limit_s=400
    )
    assert not slurm.is_done(), first.read_text()
    assert cpus_of_raylets(slurm) == {"0,1"}  # all that were asked for
    slurm.said("scancel", "--signal=KILL", "--full", first.stem)
    wait_until(slurm.is_done, "the job to end")
    wait_until(lambda: not cpus_of_raylets(slurm), "Ray to end with its job")

    second = submit(slurm, config)
    wait_until(slurm.is_done, "the second job to end", limit_s=900)
    said = second.read_text()
    assert "train: resumes where it stopped" in said, said
    assert "pack: already complete" in said
    counts = artifacts.open_artifact(str(root / "vectors/adapted"), "embed").manifest.counts
    assert (
        counts["num_vectors"] == artifacts.open_artifact(str(root / "corpus"), "ingest").manifest.counts["num_passages"]
    )
    assert not list(slurm.hosts.shared.glob(".readapt-token-*"))
