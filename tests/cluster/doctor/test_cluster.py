"""doctor on real clusters: with sick nodes, and as a submitted job."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import object_store
from tests.job_server import job_server

REPOSITORY = Path(__file__).parent.parent.parent.parent


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_each_sickness_of_a_node_is_a_line_and_a_hung_one_holds_nobody_up(tmp_path: Path) -> None:
    with object_store.running():
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        environment.pop("RAY_ADDRESS", None)
        command = ["doctor", "--cluster", "--root", f"s3://{object_store.BUCKET}/run", "--models", "no-such-model"]
        done = subprocess.run(
            [sys.executable, "-m", "tests.cluster.doctor.sick_cluster", str(tmp_path), *command],
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    *said, last = done.stdout.splitlines()
    told = json.loads(last)
    names, text = told["names"], "\n".join(said)
    assert told["code"] == 1
    assert told["seconds"] < 60
    patterns = [
        rf"{re.escape(names['ahead'])}: versions: has readapt_ray \S+ and torch 2\.0\.0, the driver has .*; install the same",
        rf"{re.escape(names['ahead'])}: clock: its clock is (99|100) s ahead of the driver's; start chrony",
        rf"{re.escape(names['hangs'])}: disk: no answer within 10 s; a disk hangs",
        rf"{re.escape(names['hangs'])}: shared memory: no answer within 10 s; a disk hangs",
        rf"{re.escape(names['silent'])}: versions: the node does not work: no answer within",
        r", .*: models: no model 'no-such-model'",
    ]
    for pattern in patterns:
        assert re.search(pattern, text), (pattern, text)
    (row,) = (line for line in said if line.startswith(names["well"]))
    assert "ok, " in row and "fails" not in row
    assert re.search(r"^connections: each of 3 nodes reaches each other$", text, re.MULTILINE)
    assert re.search(r"^all-reduce: 3 workers by gloo", text, re.MULTILINE)
    assert f"will fail: {len(patterns)};" in done.stderr, text


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_it_runs_as_a_job(tmp_path: Path) -> None:
    options = ["--root", str(tmp_path / "run"), "--models", "quickstart-retriever"]
    with job_server() as server:
        server.submit("doctor", "python", "jobs/doctor.py", "--cluster", *options)
        ended = server.ended("doctor")
        said = server.job("logs", "doctor")
    assert ended == "succeeded", said
    assert "1 of 1" in said and "Will fail" not in said
    assert not (tmp_path / "run").exists()
