"""doctor on clusters: GPU nodes that may come, sick nodes, and as a submitted job."""

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from readapt_ray import cli
from readapt_ray.cluster import autoscaling, launcher, nodes
from readapt_ray.cluster.doctor import cluster
from readapt_ray.cluster.doctor.report import Report
from readapt_ray.errors import PlacementError
from tests import object_store
from tests.job_server import job_server

REPOSITORY = Path(__file__).parent.parent.parent.parent


def report_of_gpu_nodes(
    monkeypatch: pytest.MonkeyPatch, *, starts: bool, num_came: int, failures: tuple[str, ...] = ()
) -> tuple[Report, list[dict[str, Any]]]:
    """Report on a cluster that may grow to 8 GPUs, of which so many come when they are asked for."""
    up: list[dict[str, Any]] = [{"NodeID": "head", "Resources": {}}]
    asked: list[dict[str, Any]] = []

    @contextlib.contextmanager
    def requested(num_workers: int, each: dict[str, float], **options: Any) -> Iterator[None]:
        asked.append({"num_workers": num_workers, **options})
        if not num_came:
            raise PlacementError("1 GPUs are needed and the autoscaler brought 0 within 900 s")
        up.extend({"NodeID": number, "Resources": {"GPU": 1.0}} for number in range(num_came))
        yield

    monkeypatch.setenv("READAPT_NUM_GPUS", "8")
    monkeypatch.setattr(autoscaling, "requested", requested)
    monkeypatch.setattr(nodes, "alive", lambda: up)
    monkeypatch.setattr(launcher, "failures", lambda: list(failures))
    report = Report()
    with cluster._gpu_nodes(report, starts=starts):
        pass
    return report, asked


def test_gpus_that_may_come_and_are_not_up_are_said_to_be_unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    report, asked = report_of_gpu_nodes(monkeypatch, starts=False, num_came=8)
    assert not asked
    assert "GPUs to come: 0 of 8 are up, the others were not checked; --gpus starts and checks them" in report.text()
    assert not report.num_failing


def test_gpus_that_may_come_are_started_and_checked_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    report, asked = report_of_gpu_nodes(monkeypatch, starts=True, num_came=8)
    assert asked == [{"num_workers": 8, "least": 1, "patience_s": 300.0, "check_versions": False}]
    assert "GPUs to come: 8 of 8 are up" in report.text()
    assert not report.num_failing


def test_gpus_that_do_not_come_are_a_line_with_the_launchers_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    no_quota = "gpu (p5.4xlarge): VcpuLimitExceeded: no; ask AWS for the quota"
    report, _ = report_of_gpu_nodes(monkeypatch, starts=True, num_came=5, failures=(no_quota,))
    assert "GPUs to come: 5 of 8 are up, the others were not checked" in report.text()
    assert f"all machines: launcher: nodes could not be started: {no_quota}" in report.text()
    assert report.num_failing == 1
    report, _ = report_of_gpu_nodes(monkeypatch, starts=True, num_came=0)
    assert "all machines: GPUs to come: 1 GPUs are needed and the autoscaler brought 0 within 900 s" in report.text()
    assert report.num_failing == 1


@pytest.mark.parametrize(("arguments", "gpus"), [(["--gpus"], "8"), (["--gpus", "--cluster"], None)])
def test_gpus_are_started_only_where_a_cluster_may_grow(
    arguments: list[str], gpus: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("READAPT_NUM_GPUS", raising=False)
    if gpus:
        monkeypatch.setenv("READAPT_NUM_GPUS", gpus)
    assert cli.main(["doctor", *arguments]) == 2
    assert "--gpus starts the GPU nodes that READAPT_NUM_GPUS allows" in capsys.readouterr().err


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
