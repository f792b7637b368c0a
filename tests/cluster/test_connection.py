"""Placement: what fits, what never will, what has to wait, and nodes that come late."""

import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from readapt_ray.cluster import connection, local_ray, placement, software
from readapt_ray.cluster.placement import Placement
from readapt_ray.errors import InputError, PlacementError
from readapt_ray.storage import Location


def nodes(monkeypatch: pytest.MonkeyPatch, *resources: dict[str, float], free: dict[str, float] | None = None) -> None:
    """A cluster of these nodes, of whose resources so many are free."""
    alive = [{"Alive": True, "Resources": each} for each in resources]
    total: dict[str, float] = {}
    for each in resources:
        for name, amount in each.items():
            total[name] = total.get(name, 0) + amount
    monkeypatch.setattr(ray, "nodes", lambda: [*alive, {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 99.0}}])
    monkeypatch.setattr(ray, "available_resources", lambda: total if free is None else free)
    found = connection.Resources(int(total.get("CPU", 0)), int(total.get("GPU", 0)), len(alive))
    monkeypatch.setattr(connection, "connect", lambda: found)
    monkeypatch.setattr(placement, "_REPLACEMENT_S", 0.0)


def test_workers_that_fit_are_placed_in_silence(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    nodes(monkeypatch, {"CPU": 16.0, "GPU": 2.0}, {"CPU": 16.0, "GPU": 2.0}, {})
    placement.check_placement(4, {"CPU": 8, "GPU": 1}, who="workers")
    assert not caplog.records


@pytest.mark.parametrize(
    ("num_workers", "each", "room"),
    [(3, {"CPU": 12, "GPU": 1}, 2), (5, {"CPU": 1, "GPU": 1}, 4), (1, {"CPU": 17}, 0), (1, {"CPU": 1, "TPU": 1}, 0)],
)
def test_workers_that_no_node_can_hold_are_refused_though_the_sum_would_do(
    num_workers: int, each: dict[str, float], room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes(monkeypatch, {"CPU": 16.0, "GPU": 2.0}, {"CPU": 16.0, "GPU": 2.0})
    with pytest.raises(PlacementError) as refused:
        placement.check_placement(num_workers, each, who="workers")
    said = str(refused.value)
    assert f"{num_workers} workers of {each['CPU']:g} CPU" in said
    assert f"room for {room} on 2 nodes with 16 CPU and 2 GPU" in said


def test_a_node_in_the_place_of_a_lost_one_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    lost, here = {"Alive": False, "Resources": {"CPU": 1.0}}, {"Alive": True, "Resources": {"CPU": 1.0}}
    times = iter([[lost, here]] * 4)
    monkeypatch.setattr(ray, "nodes", lambda: next(times, [lost, here, here]))
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(placement, "_POLL_S", 0.01)
    placement.check_placement(2, {"CPU": 1}, who="workers")
    monkeypatch.setattr(ray, "nodes", lambda: [here])
    with pytest.raises(PlacementError):
        placement.check_placement(2, {"CPU": 1}, who="workers")


def test_what_a_run_waits_for_after_a_node_was_lost_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    nodes(monkeypatch, {"CPU": 1.0})
    monkeypatch.setattr(placement, "_ROOM_POLL_S", 0.02)
    monkeypatch.setattr(placement, "_ROOM_SAID_S", 0.04)
    monkeypatch.setattr(placement, "_ROOM_LOG_S", 60.0)
    with caplog.at_level(logging.WARNING, "readapt_ray"):
        with placement.warn_while_too_small(1, {"CPU": 1}, who="workers"):
            time.sleep(0.2)
        assert not caplog.records
        with placement.warn_while_too_small(2, {"CPU": 1}, who="workers"):
            while not caplog.records:
                time.sleep(0.02)
    (record,) = caplog.records
    assert (
        "2 workers of 1 CPU each are needed and nodes were lost: there is room for 1 on 1 node with 1 CPU"
        in record.getMessage()
    )


@pytest.mark.parametrize(
    ("cpus", "num_workers", "expected"),
    [
        ([0, 8, 8], None, (2, 8)),  # a head without CPUs has no worker
        ([8, 8, 8], 2, (2, 8)),  # not 12, which no node has
        ([16, 64], None, (2, 32)),
        ([16], 4, (4, 4)),
        ([2], 4, (4, 1)),  # refused afterwards, by check_placement
    ],
)
def test_workers_get_the_most_cpus_that_so_many_can_have(
    cpus: list[int], num_workers: int | None, expected: tuple[int, int]
) -> None:
    assert placement.workers_and_cpus(num_workers, cpus) == expected


FOUR_SMALL = [{"CPU": 4.0}] * 4
GPU_HEAD = [{"CPU": 0.0, "GPU": 1.0}, *[{"CPU": 8.0, "GPU": 1.0}] * 3]


@pytest.mark.parametrize(
    ("resources", "num_cpus", "num_actors", "num_workers"),
    [
        (FOUR_SMALL, 3, 4, 4),  # not the 5 that 16 CPUs would do for
        (GPU_HEAD, None, 3, 3),  # a head without CPUs has no worker, though it has a GPU
        ([{"CPU": 4.0}, {"CPU": 16.0}], 8, 2, 2),
        ([{"CPU": 4.0}, {"CPU": 8.0}], 8, 1, 1),
        ([{"CPU": 16.0, "GPU": 4.0}], 8, 2, 2),
    ],
)
def test_as_many_as_fit_are_placed_where_no_number_is_given(
    monkeypatch: pytest.MonkeyPatch,
    resources: list[dict[str, float]],
    num_cpus: int | None,
    num_actors: int,
    num_workers: int,
) -> None:
    nodes(monkeypatch, *resources)
    assert placement.place_actors(Placement(None, num_cpus), 100)[0] == num_actors
    assert placement.place_actors(Placement(None, num_cpus), 1)[0] == 1
    assert placement.place_training(None, num_cpus)[0] == num_workers


@pytest.mark.parametrize(
    ("resources", "asked", "per_gpu", "placed"),
    [
        ([{"CPU": 16.0, "GPU": 2.0}], None, 1, (2, 1, 1.0)),
        ([{"CPU": 16.0, "GPU": 2.0}], None, 4, (4, 1, 0.5)),  # four cores an actor
        ([{"CPU": 6.0, "GPU": 2.0}], None, 4, (2, 1, 1.0)),
        ([{"CPU": 64.0, "GPU": 2.0}], None, 4, (8, 1, 0.25)),
        ([{"CPU": 64.0, "GPU": 2.0}], 0.1, 4, (20, 1, 0.1)),
        ([{"CPU": 64.0, "GPU": 2.0}], 0.7, 4, (2, 1, 0.7)),
        ([{"CPU": 64.0, "GPU": 7.0}], 0.28, 4, (25, 1, 0.28)),  # 7 / 0.28 is below 25 in floating point
        ([{"CPU": 4.0}], 0.5, 4, (4, 1, 0.0)),
    ],
)
def test_encoders_of_small_models_share_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
    resources: list[dict[str, float]],
    asked: float | None,
    per_gpu: int,
    placed: tuple[int, int, float],
) -> None:
    nodes(monkeypatch, *resources)
    assert placement.place_actors(Placement(None, None, asked, per_gpu), 100) == placed


def test_a_default_that_does_not_fit_at_all_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes(monkeypatch, *FOUR_SMALL)
    for place in (lambda: placement.place_actors(Placement(None, 5), 100), lambda: placement.place_training(None, 5)):
        with pytest.raises(
            PlacementError, match=r"1 (actors|workers) of 5 CPU each cannot be placed: there is room for 0"
        ):
            place()


def test_workers_that_wait_for_another_job_say_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    nodes(monkeypatch, {"CPU": 16.0, "GPU": 4.0}, free={"CPU": 15.0, "GPU": 1.0})
    monkeypatch.setattr(placement, "_SETTLE_S", 0.1)
    with caplog.at_level(logging.WARNING, "readapt_ray"):
        placement.check_placement(4, {"CPU": 1, "GPU": 1}, who="actors")
    assert "4 actors of 1 CPU and 1 GPU each are asked for, and 15 CPU and 1 GPU free: waiting" in caplog.text


def test_what_the_stage_before_held_a_moment_ago_is_not_worth_a_word(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    nodes(monkeypatch, {"CPU": 2.0})
    monkeypatch.setattr(placement, "_SETTLE_S", 300.0)
    free = iter([{"CPU": 1.0}, {"CPU": 1.0}, {"CPU": 2.0}])
    monkeypatch.setattr(ray, "available_resources", lambda: next(free))
    placement.check_placement(2, {"CPU": 1, "GPU": 0}, who="actors")
    assert not caplog.records


def test_a_cluster_that_died_on_this_machine_is_not_joined_and_a_jobs_own_variables_stand() -> None:
    job = {"runtime_env": {"env_vars": {"TOKENIZERS_PARALLELISM": "true"}}}
    program = """
import os, ray
from readapt_ray.cluster import connection
print(connection.connect().num_cpus)
print(*ray.get(ray.remote(lambda: [os.environ[name] for name in ("TOKENIZERS_PARALLELISM", "RAY_DEDUP_LOGS")]).remote()))
"""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # a socket's path may have some 100 characters
        (Path(folder) / "ray").mkdir()
        (Path(folder) / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
        environment = {**os.environ, "RAY_TMPDIR": folder, "READAPT_NUM_CPUS": "1"}
        environment |= {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(job), **job["runtime_env"]["env_vars"]}
        environment.pop("RAY_ADDRESS", None)
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.stdout.split() == ["1", "true", "1"], done.stderr


@pytest.mark.parametrize("address", [None, "auto"])
def test_a_ray_of_our_own_can_use_the_workers_that_it_starts_ahead(
    address: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have no runtime environment, so a job that has one starts others; those of a cluster need it."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}])
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: seen.update(options))
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setenv("RAY_ADDRESS", address or "")
    for name, value in local_ray._LOCAL.items():  # and taken back afterwards
        monkeypatch.setenv(name, value)
    assert connection.connect().num_cpus == 2
    assert seen["address"] == (address or "local")
    assert ("runtime_env" in seen) is (address is not None)
    if address:
        told = json.loads(seen["runtime_env"]["env_vars"][software.DRIVER_VARIABLE])
        assert told == software.reader()(), "workers on nodes that come later compare themselves"


def test_ray_is_started_once_however_many_ask_for_it_and_a_failure_is_told_where_it_is_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    starts: list[float] = []
    may_start = threading.Event()

    def init(**_: Any) -> None:
        may_start.wait()
        time.sleep(0.2)
        starts.append(time.monotonic())

    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}])
    monkeypatch.setattr(ray, "is_initialized", lambda: bool(starts))
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setenv("RAY_ADDRESS", "")
    for name, value in local_ray._LOCAL.items():
        monkeypatch.setenv(name, value)
    with connection.connecting_ahead():
        assert not starts
        may_start.set()
        assert connection.connect().num_cpus == 2
    assert len(starts) == 1
    starts.clear()
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with connection.connecting_ahead():
        pass
    with pytest.raises(InputError, match="is where jobs are submitted to"), connection.connecting_ahead():
        connection.connect()
    assert not starts


def test_the_address_for_submitting_jobs_is_not_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("tried to join it"))
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(
        InputError, match=r"'http://127\.0\.0\.1:8265' is where jobs are submitted .* set RAY_ADDRESS to auto"
    ):
        connection.connect()


def test_a_folder_that_ray_will_remove_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nodes(monkeypatch, {"CPU": 4.0})
    connection.check_seen_by_all(Location(str(tmp_path)))
    assert not caplog.records
    connection.check_seen_by_all(Location(str(tmp_path / "working_dir_files" / "_ray_pkg_1" / "out")))
    assert "_ray_pkg_1/out is inside the job's working directory" in caplog.text


def test_a_folder_that_some_node_cannot_see_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nodes(monkeypatch, {"CPU": 4.0}, {"CPU": 4.0})
    seen: list[bool] = []

    def answers(_: Any, function: Any, path: str) -> dict[str, bool]:
        seen.append(function(path))
        return {"10.0.0.1": function(path), "10.0.0.2": function(path + "-elsewhere")}

    (tmp_path / f".seen-{0:032x}").touch()  # left by a killed run
    monkeypatch.setattr(connection, "_on_each", answers)
    with pytest.raises(
        PlacementError, match=r"not on a disk that all nodes share: 10\.0\.0\.2 cannot see it; give a URI"
    ):
        connection.check_seen_by_all(Location(str(tmp_path)))
    assert seen == [True] and not list(tmp_path.iterdir())


def test_nodes_that_come_late_are_waited_for(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[list[dict[str, Any]]] = [[{"Alive": True, "Resources": {"CPU": 0.0}}]] * 2 + [
        [{"Alive": True, "Resources": {"CPU": 8.0}}] * 2
    ]
    monkeypatch.setattr(connection, "_WAIT_POLL_S", 0.01)
    monkeypatch.setattr(ray, "nodes", lambda: seen.pop(0) if len(seen) > 1 else seen[0])
    with caplog.at_level(logging.INFO, "readapt_ray"):
        assert len(connection._nodes_that_came(2)) == 2
    assert "waiting for nodes: 2 are wanted, there is 1 node with nothing for tasks" in caplog.text


def test_nodes_that_do_not_come_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes(monkeypatch, {"CPU": 4.0})
    monkeypatch.setattr(connection, "_WAIT_POLL_S", 0.01)
    monkeypatch.setenv("READAPT_WAIT_S", "0.1")
    started_s = time.monotonic()
    with pytest.raises(
        PlacementError, match=r"READAPT_NUM_NODES asks for 3 nodes, .* has 1 node with 4 CPU.*ask for fewer"
    ):
        connection._nodes_that_came(3)
    assert time.monotonic() - started_s < connection._FIRST_NODE_S


def test_a_cluster_of_a_head_without_cpus_is_an_error_within_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes(monkeypatch, {})
    monkeypatch.setattr(connection, "_WAIT_POLL_S", 0.01)
    assert connection._FIRST_NODE_S < 60
    monkeypatch.setattr(connection, "_FIRST_NODE_S", 0.1)
    with pytest.raises(PlacementError, match=r"need a node with CPUs, .* 1 node with nothing for tasks; start one"):
        connection._nodes_that_came(1)


def test_a_node_that_does_not_answer_is_named_and_the_others_are_heard(
    ray_session: None, caplog: pytest.LogCaptureFixture
) -> None:
    (here,) = ray.nodes()
    gone = {"NodeID": "ab" * 28, "NodeManagerAddress": "10.0.0.9"}
    with caplog.at_level(logging.WARNING, "readapt_ray"):
        answers = connection._on_each([gone, here], os.path.basename, "folder/yes")
    assert list(answers.values()) == ["yes"]
    assert "node 10.0.0.9 (abababab) did not answer" in caplog.text
    with pytest.raises(TypeError):
        connection._on_each([here], os.path.basename, 1)


def test_a_real_cluster_says_what_it_has(ray_session: None) -> None:
    from readapt_ray import hardware

    found = connection.connect()
    assert hardware.machine_info()["cluster"] == {"num_nodes": 1, "num_cpus": found.num_cpus, "gpus": {}}
    with pytest.raises(PlacementError, match=r"room for 0 on 1 node with 2 CPU"):
        placement.check_placement(1, {"CPU": 3}, who="workers")


def test_what_ray_would_print_goes_to_its_log(ray_session: None, capfd: pytest.CaptureFixture[str]) -> None:
    from ray._private import worker

    folder = connection.logs_folder()
    assert folder is not None
    worker.print_to_stdstream({"lines": ["Task f failed."], "pid": "raylet", "is_err": False}, ignore_prefix=False)
    assert "Task f failed." in (folder / "readapt-driver.log").read_text()
    said = capfd.readouterr()
    assert said.out + said.err == ""


def test_a_stage_that_ends_does_not_wait_for_an_answer_about_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = threading.Event()

    def never() -> list[dict[str, Any]]:
        asked.set()
        time.sleep(3600)
        return []

    monkeypatch.setattr(placement.nodes, "alive", never)
    monkeypatch.setattr(placement, "_ROOM_POLL_S", 0.01)
    monkeypatch.setattr(placement, "_ROOM_JOIN_S", 0.2)
    began_s = time.monotonic()
    with placement.warn_while_too_small(1, {"CPU": 1}, who="workers"):
        assert asked.wait(300)
    assert time.monotonic() - began_s < 600
