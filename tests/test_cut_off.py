"""A node that is cut off, not killed: its processes run on and reach the disk, and nobody reaches them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_whose_nodes_are_cut_off_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    command = ["unshare", "--net", "--mount", sys.executable, "-m", "tests.chaos.cut_off", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=1100, check=False
    )
    if "unshare" in done.stderr and "not permitted" in done.stderr:
        pytest.skip("network namespaces are not permitted")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    if not found["permitted"]:
        pytest.skip("network namespaces are not permitted")
    assert [event["hit"].split(" at ")[0][:4] for event in found["events"]] == ["node", "node"]
    assert found["submissions"] == 1, found["messages"]  # the run goes on by itself
    assert found["same_passages_trained_on"]
    assert found["files_that_differ"] == []
