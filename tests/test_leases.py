"""Two drivers at one artifact: at once, one after the other, on machines whose clocks and pids say nothing."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from readapt_ray import artifacts, leases
from readapt_ray.artifacts import Workspace
from readapt_ray.config import StageConfig
from readapt_ray.errors import ArtifactConflictError, InputError
from readapt_ray.progress import ProgressReporter
from readapt_ray.storage import Location
from tests import object_store

REPOSITORY = Path(__file__).parent.parent

DRIVER = """
import sys, time
from pathlib import Path
from readapt_ray import artifacts, leases
from readapt_ray.config import StageConfig
from readapt_ray.errors import ReadaptError

leases._HEARTBEAT_S = 0.05
output, over, start, setup = sys.argv[1:]
exec(setup)

def work(workspace):
    print("working", flush=True)
    while not Path(over).exists():
        time.sleep(0.02)

print("ready", flush=True)
while not Path(start).exists():
    time.sleep(0.001)
try:
    artifacts.produce("copy", StageConfig(output=output), inputs={}, work=work)
    print("made", flush=True)
except ReadaptError as error:
    print(error, flush=True)
"""
ELSEWHERE = "leases._pid_namespace = lambda: 'another'"


@pytest.fixture
def drivers(tmp_path: Path) -> Iterator[Any]:
    """Starts processes that make an artifact: they begin once `start` exists, and end once `over` does."""
    started = []

    def start(output: str, setup: str = "") -> subprocess.Popen[str]:
        told = [str(tmp_path / name) for name in ("over", "start")]
        command = [sys.executable, "-c", textwrap.dedent(DRIVER), output, *told, setup]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A heartbeat that is watched for a second: for drivers that do not beat any more."""
    monkeypatch.setattr(leases, "_HEARTBEAT_S", 0.1)
    monkeypatch.setattr(leases, "STALE_S", 1.0)


def said(process: subprocess.Popen[str]) -> list[str]:
    return process.communicate(timeout=300)[0].splitlines()


def produce(output: str, work: Any = lambda workspace: None) -> artifacts.Artifact:
    return artifacts.produce("copy", StageConfig(output=output), inputs={}, work=work)


def unfinished(output: str, **changes: Any) -> None:
    """What a driver of this machine that was killed leaves, changed as asked."""

    def fail(workspace: Workspace) -> None:
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        produce(output, fail)
    file = Path(output) / "building.json"
    state = json.loads(file.read_text()) | {"is_over": False, "pid": 2**22 - 1} | changes
    file.write_text(json.dumps(state))


@pytest.mark.parametrize("place", ["new", "left behind", "store"])
def test_of_two_drivers_that_start_at_once_one_works(place: str, drivers: Any, tmp_path: Path) -> None:
    output = str(tmp_path / "a")
    if place == "left behind":
        unfinished(output)
    with object_store.running():
        if place == "store":
            output = f"s3://{object_store.BUCKET}/a"
        # Each may be slow between its look at the lease and its own lease.
        processes = [drivers(output, "leases._SETTLE_S = 5.0") for _ in range(2)]
        (tmp_path / "start").touch()
        while all(process.poll() is None for process in processes):
            time.sleep(0.02)
        (tmp_path / "over").touch()  # only now: a driver that comes after the work finds it done
        lines = sorted(said(process) for process in processes)
        assert artifacts.read_manifest(output) is not None
    assert lines[1] == ["working", "made"]
    assert lines[0][-1].startswith("process ")
    assert f"is writing {output}; wait for it to end" in lines[0][-1]
    assert "working" not in lines[0]


def test_a_living_driver_whose_pid_and_clock_say_nothing_is_not_followed(
    drivers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs in another container of this host, or its clock is an hour behind."""
    monkeypatch.setattr(leases, "_HEARTBEAT_S", 0.1)
    monkeypatch.setattr(leases, "STALE_S", 300.0)  # it may be slow to beat; one beat is enough
    output = str(tmp_path / "a")
    late = "now = time.time; time.time = lambda: now() - 3600"
    writer = drivers(output, f"{ELSEWHERE}; {late}")
    (tmp_path / "start").touch()
    assert writer.stdout.readline() == "working\n"
    with pytest.raises(ArtifactConflictError, match=f"process {writer.pid}"):
        produce(output)


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("ahead_s", [3600.0, -3600.0, 0.0])
def test_a_dead_driver_elsewhere_is_followed_whatever_its_clock_said(ahead_s: float, tmp_path: Path) -> None:
    output = str(tmp_path / "a")
    unfinished(output, boot="before", heartbeat=time.time() + ahead_s)
    assert produce(output).manifest.stage == "copy"


@pytest.mark.parametrize(
    "changes", [{}, {"is_over": True, "pid": 1, "host": "elsewhere"}], ids=["killed here", "failed elsewhere"]
)
def test_a_driver_that_is_known_to_be_dead_is_followed_at_once(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = str(tmp_path / "a")
    unfinished(output, **changes)
    monkeypatch.setattr(leases, "_beats", lambda *_: pytest.fail("its heartbeat is watched"))
    assert produce(output).manifest.stage == "copy"


PAUSES = """
import os, signal
renew = leases.Lease._renew

def renewed_after_a_pause(lease):
    leases.Lease._renew = renew
    os.kill(os.getpid(), signal.SIGSTOP)
    renew(lease)

leases.Lease._renew = renewed_after_a_pause
"""


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("is_finished", [True, False])
def test_a_driver_that_was_paused_and_replaced_stops(is_finished: bool, drivers: Any, tmp_path: Path) -> None:
    output = str(tmp_path / "a")
    paused = drivers(
        output, ELSEWHERE + PAUSES
    )  # before a heartbeat, since half-way through one it would write its lease
    (tmp_path / "start").touch()
    assert paused.stdout.readline() == "working\n"
    while psutil.Process(paused.pid).status() != psutil.STATUS_STOPPED:
        time.sleep(0.02)

    def go_on_beside_it(workspace: Workspace) -> None:
        os.kill(paused.pid, signal.SIGCONT)
        assert f"process {os.getpid()} on" in said(paused)[-1]

    made = produce(output, (lambda workspace: None) if is_finished else go_on_beside_it)
    if is_finished:
        os.kill(paused.pid, signal.SIGCONT)
        assert f"another process finished or removed {output}" in said(paused)[-1]
    assert artifacts.read_manifest(output) == made.manifest
    assert paused.returncode == 0


def taken_over(workspace: Workspace) -> None:
    """Another driver writes its lease."""
    file = workspace.location / "building.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"owner": "other", "pid": 1, "host": "there"}))


def test_no_manifest_is_written_over_the_work_of_another(tmp_path: Path) -> None:
    with pytest.raises(ArtifactConflictError, match="process 1 on there is writing"):
        produce(str(tmp_path / "a"), taken_over)
    lease = artifacts.read_lease(str(tmp_path / "a"))
    assert lease is not None
    assert lease["owner"] == "other"
    assert artifacts.read_manifest(str(tmp_path / "a")) is None


def test_what_a_lease_says_is_not_written_over_the_lease_of_another(tmp_path: Path) -> None:
    """Else the first sees the other's lease and gives way, and the other sees this one and gives way, too."""
    file = Location(str(tmp_path / "building.json"))
    lease = leases.Lease(
        file,
        Location(str(tmp_path)),
        ProgressReporter("copy"),
        before=None,
        fields={"stage": "copy", "seconds_before": 0.0},
    )
    with pytest.raises(ArtifactConflictError, match="process 1 on there"), lease:
        file.write_text(json.dumps(json.loads(file.read_text()) | {"owner": "other", "pid": 1, "host": "there"}))
        lease.update(files=["a"])
    assert json.loads(file.read_text())["owner"] == "other"


@pytest.mark.usefixtures("soon")
def test_work_that_waits_is_interrupted_when_another_takes_over(tmp_path: Path) -> None:
    waited = []

    def work(workspace: Workspace) -> None:
        taken_over(workspace)
        time.sleep(120)
        waited.append("to the end")

    with pytest.raises(ArtifactConflictError, match="process 1 on there"):
        produce(str(tmp_path / "a"), work)
    assert not waited


def test_refused_input_of_one_that_lost_does_not_remove_the_lease_of_the_other(tmp_path: Path) -> None:
    def work(workspace: Workspace) -> None:
        taken_over(workspace)
        raise InputError("row 3 has no text")

    with pytest.raises(ArtifactConflictError):
        produce(str(tmp_path / "a"), work)
    assert (tmp_path / "a" / "building.json").is_file()


def test_a_lease_that_was_cut_off_is_none(tmp_path: Path) -> None:
    (tmp_path / "building.json").write_text('{"stage": "co')
    assert leases.wait_until_dead(Location(str(tmp_path / "building.json")), Location(str(tmp_path))) is None
    assert produce(str(tmp_path)).manifest.stage == "copy"
