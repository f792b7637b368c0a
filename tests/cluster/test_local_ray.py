import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray

from readapt_ray.cluster import connection, local_ray
from readapt_ray.errors import WorkerError

TIMED_OUT = "The current node timed out during startup. This could happen because some of the raylet failed to startup."


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What each start of Ray raises; None where it succeeds."""
    outcomes: list[Any] = []

    def init(**_: Any) -> None:
        if (error := outcomes.pop(0)) is not None:
            raise error

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(os, "getloadavg", lambda: (27.4, 0.0, 0.0))
    for name, value in local_ray._LOCAL.items():  # and taken back afterwards
        monkeypatch.setenv(name, value)
    return outcomes


def test_a_busy_machine_is_tried_once_more_and_said_in_one_line(
    starts: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    starts += [Exception(TIMED_OUT), None]
    with caplog.at_level(logging.INFO, logger="readapt_ray"):
        local_ray.start()
    (line,) = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert line.startswith("Ray did not start in time: this machine is busy (27 processes want to run on ")
    assert line.endswith("; trying once more")
    assert starts == []


def test_a_second_time_is_an_error_that_says_what_to_do(starts: list[Any]) -> None:
    starts += [Exception(TIMED_OUT), Exception(TIMED_OUT)]
    with pytest.raises(WorkerError, match=r"in time, twice: this machine is busy .*; run the command again when less"):
        local_ray.start()


def test_another_failure_is_not_tried_again(starts: list[Any]) -> None:
    starts += [ValueError("no such option"), None]
    with pytest.raises(ValueError, match="no such option"):
        local_ray.start()
    assert len(starts) == 1


FAILING = """
import psutil
from ray._private import services
from readapt_ray.cluster import local_ray
from readapt_ray.errors import WorkerError

def late(*_):
    raise {error}

services.get_node = late
try:
    local_ray.start()
except BaseException as error:
    print(type(error).__name__, [each.name() for each in psutil.Process().children(recursive=True)])
"""


@pytest.mark.parametrize(
    ("error", "said"), [(f"Exception({TIMED_OUT!r})", "WorkerError []"), ("KeyboardInterrupt", "KeyboardInterrupt []")]
)
def test_a_start_that_fails_leaves_no_process(error: str, said: str) -> None:
    code = FAILING.format(error=error)
    repository = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True, cwd=repository
    )
    assert done.stdout.strip() == said


def test_a_signal_to_the_process_group_does_not_reach_ray(ray_session: None) -> None:
    from ray._private import worker

    groups = {os.getpgid(process.pid) for _, process in worker._global_node.live_processes()}
    assert groups
    assert os.getpgid(0) not in groups


def test_the_error_of_a_worker_says_where_its_log_is(ray_session: None) -> None:
    folder = connection.logs_folder()
    assert folder is not None and folder.is_dir()
    error = connection.cause_of(RuntimeError("it died"))
    assert str(error) == f"a worker failed: it died; Ray's logs: {folder}"
