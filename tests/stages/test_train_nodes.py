"""train on a cluster one of whose nodes is really killed."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from readapt_ray.cluster.step_metrics import read_metrics
from readapt_ray.storage import Location
from tests.stages.killed_node import NUM_EPOCHS

REPOSITORY = Path(__file__).parent.parent.parent


def _train(folder: Path, then: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", "tests.stages.killed_node", str(folder), then]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=1400, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("then", "tolerance"), [("replaced", 0.0), ("lost", 1e-3)])
def test_a_killed_node(tmp_path: Path, then: str, tolerance: float) -> None:
    """With a node in its place the adapter is the same bit for bit; with one worker less every passage still counts once."""
    _train(tmp_path, then)
    assert (tmp_path / "killed").exists()
    calm, hit = (read_metrics(Location(str(tmp_path / name))) for name in ("calm", "hit"))
    assert [row["step"] for row in hit] == [row["step"] for row in calm]
    assert sum(row["num_passages"] for row in hit) == 3 * 160
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("calm", "hit"))
    difference = max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
    assert difference <= tolerance
    assert (difference > 0) == (then == "lost"), "one worker adds gradients in another order than two"


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_training_grows_again_when_a_node_returns(tmp_path: Path) -> None:
    """Two workers, then the one that is left, then two again; every passage counts once per epoch."""
    _train(tmp_path, "returned")
    rows = read_metrics(Location(str(tmp_path / "hit")))
    assert [row["step"] for row in rows] == list(range(1, rows[-1]["num_steps"] + 1))
    assert sum(row["num_passages"] for row in rows) == NUM_EPOCHS["returned"] * 160
    assert [count for count, _ in itertools.groupby(row["num_workers"] for row in rows)] == [2, 1, 2]
