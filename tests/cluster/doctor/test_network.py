"""Clocks, connections and an all-reduce between real processes, some of which lie, are deaf or end."""

import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from readapt_ray import cli
from readapt_ray.cluster.doctor import cluster, network
from readapt_ray.cluster.doctor.inspector import Address, Exchange, Inspector
from readapt_ray.cluster.doctor.report import Report
from readapt_ray.cluster.doctor.root import Probe
from readapt_ray.errors import PlacementError
from readapt_ray.storage import Location


class Ahead(Inspector):
    """Its clock is 100 s ahead."""

    def now(self) -> float:
        return time.time() + 100


class LittleBehind(Inspector):
    """By more than a busy machine may take to answer: that time counts for the node."""

    def now(self) -> float:
        return time.time() - 20


class Mute(Inspector):
    def now(self) -> float:
        time.sleep(600)
        return 0.0


class LateOnce(Inspector):
    """Answers the first question too late, as a node that imports torch does."""

    def __init__(self) -> None:
        super().__init__()
        self._asked = 0

    def now(self) -> float:
        self._asked += 1
        if self._asked == 2:
            time.sleep(60)
        return time.time()


class Deaf(Inspector):
    """Says that it listens where nobody does."""

    def listen(self) -> Address:
        return "127.0.0.1", 1


class Ends(Inspector):
    def all_reduce(self, *args: Any) -> Exchange:
        os._exit(1)


class Refuses(Inspector):
    def all_reduce(self, *args: Any) -> Exchange:
        raise PlacementError("NCCL error: no space left on /dev/shm")


@pytest.fixture
def started(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., dict[str, Any]]]:
    monkeypatch.setattr(network, "READY_S", 300.0)  # a machine that does much else
    monkeypatch.setattr(network, "CONNECT_S", 300.0)
    monkeypatch.setattr(network, "EXCHANGE_S", 300.0)
    monkeypatch.setattr(network, "_SLOW_BYTES_PER_S", 0.0)
    actors: list[Any] = []

    def start(*kinds: type[Inspector]) -> dict[str, Any]:
        actors.extend(ray.remote(num_cpus=0, max_concurrency=4)(kind).remote() for kind in kinds)
        return {f"node {at}": actor for at, actor in enumerate(actors)}

    yield start
    for actor in actors:
        ray.kill(actor)


def test_workers_that_reach_each_other_and_sum(started: Callable[..., dict[str, Any]]) -> None:
    found = network.check_network(started(Inspector, Inspector), {})
    assert found["connections"] == network.Finding("each of 2 nodes reaches each other")
    assert not found["all-reduce"].problems
    assert re.fullmatch(r"2 workers by gloo, \d+\.\d\d GB/s", found["all-reduce"].shown)


def test_a_node_that_cannot_be_reached_is_named_and_nothing_waits_for_it(
    started: Callable[..., dict[str, Any]],
) -> None:
    found = network.check_network(started(Inspector, Deaf), {})
    (problem,) = found["connections"].problems
    assert "node 1 cannot be reached on TCP port 1 from node 0, node 1; open all TCP ports" in problem.text
    assert "all-reduce" not in found


@pytest.mark.parametrize(
    ("kinds", "limit_s", "reason"),
    [
        ((Inspector, Ends), 8.0, "did not finish: "),  # the first one waits for the second all the time
        ((Refuses, Refuses), 300.0, "no space left on /dev/shm; set GLOO_SOCKET_IFNAME"),
    ],
)
def test_an_all_reduce_that_fails_is_one_line(
    started: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    kinds: tuple[type[Inspector], ...],
    limit_s: float,
    reason: str,
) -> None:
    monkeypatch.setattr(network, "EXCHANGE_S", limit_s)
    found = network.check_network(started(*kinds), {})
    (problem,) = found["all-reduce"].problems
    assert problem.fails and "2 of 2 workers" in problem.text and reason in problem.text


def test_gpus_that_another_job_has_are_left_out(
    started: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = started(Inspector, Mute)
    ask = network.answers

    def answers(asked: dict[str, Any], *, timeout_s: float) -> dict[str, Any]:
        """Wait for one that answers, however busy the machine is, and then no longer."""
        ray.wait(list(asked.values()), num_returns=1, timeout=300)
        return ask(asked, timeout_s=0.5)

    monkeypatch.setattr(network, "answers", answers)
    found = network.check_network(
        {"node": workers["node 0"]}, {"GPU 0 of n": workers["node 0"], "GPU 1 of n": workers["node 1"]}
    )
    assert found["all-reduce"].shown.startswith("1 worker by gloo")
    (problem,) = found["GPUs"].problems
    assert found["GPUs"].shown == "1 of 2 free" and not problem.fails
    assert problem.text.startswith("GPU 1 of n gave no worker: in use by another job")


def test_the_command_on_a_running_cluster(
    started: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setattr(cluster, "CHECKS_S", 300.0)
    monkeypatch.setattr(cluster, "STARTS_S", 300.0)
    monkeypatch.setattr(network, "CLOCK_S", 300.0)
    options = ["--root", str(tmp_path / "run"), "--models", "quickstart-retriever"]
    assert cli.main(["doctor", "--cluster", *options]) == 0, capsys.readouterr().out
    header, row, *_ = capsys.readouterr().out.splitlines()
    assert header.split() == ["machine", "packages", "GPUs", "shared", "memory", "disk", "root", "models", "clock"]
    (node,) = ray.nodes()
    assert row.startswith(f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})")
    assert row.endswith("1 of 1  ok")
    assert not (tmp_path / "run").exists()


def test_a_root_that_hangs_on_the_driver_is_a_line_and_no_node_looks_at_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hang = threading.Event()
    monkeypatch.setattr(cluster, "CHECKS_S", 0.2)
    monkeypatch.setattr(Probe, "place", lambda self: hang.wait())
    report = Report()
    options = cluster._check_options(Probe(Location(str(tmp_path))), (), report)
    assert options.root is None
    assert f"the driver: root: no answer within 0.2 s; {tmp_path} hangs: look at its mount" in report.text()
    hang.set()


def test_clocks(started: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    right, ahead, behind, mute = started(Inspector, Ahead, LittleBehind, Mute).values()
    monkeypatch.setattr(network, "CLOCK_S", 300.0)
    assert not network.check_clock(right).problems
    (problem,) = network.check_clock(ahead).problems
    assert problem.fails and re.search(r"is (100|[3-9]\d) s ahead of the driver's; start chrony", problem.text)
    (problem,) = network.check_clock(behind).problems
    assert not problem.fails and re.search(r"is (20|1\d|\d) s behind the driver's", problem.text)
    monkeypatch.setattr(network, "CLOCK_S", 0.5)
    (problem,) = network.check_clock(mute).problems
    assert "its clock was not told" in problem.text


def test_one_late_answer_about_the_clock_is_no_failure(
    started: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (late,) = started(LateOnce).values()
    ray.get(late.now.remote())
    monkeypatch.setattr(network, "CLOCK_S", 5.0)
    assert network.check_clock(late) == network.Finding("ok")
