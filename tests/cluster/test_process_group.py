"""Which network Gloo takes, and what a failed start leaves."""

import functools
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray

from readapt_ray.artifacts import Workspace
from readapt_ray.cluster import process_group
from readapt_ray.cluster.optimization import OptimizationConfig
from readapt_ray.cluster.process_group import ProcessGroupBackend, ProcessGroupConfig, choose_interface
from readapt_ray.cluster.train_workers import run_workers
from readapt_ray.progress import ProgressReporter
from readapt_ray.storage import Location

INTERFACES = {
    "lo": [SimpleNamespace(family=socket.AF_INET, address="127.0.0.1")],
    "eth0": [
        SimpleNamespace(family=psutil.AF_LINK, address="10.1.2.3"),  # an address of hardware
        SimpleNamespace(family=socket.AF_INET, address="10.9.9.9"),
    ],
    "eth1": [SimpleNamespace(family=socket.AF_INET, address="10.1.2.3")],
    "eth2": [SimpleNamespace(family=socket.AF_INET6, address="fd00::1")],
}


@pytest.mark.parametrize(
    ("address", "already", "wanted"),
    [
        ("10.1.2.3", None, "eth1"),
        ("127.0.0.1", None, "lo"),
        ("fd00::1", None, "eth2"),
        ("10.1.2.3", "eth7", "eth7"),
        ("10.5.5.5", None, None),
    ],
)
def test_the_one_that_ray_knows_its_node_by(monkeypatch, address, already, wanted):
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: INTERFACES)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: address)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    if already:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", already)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    choose_interface()
    assert os.environ.get("GLOO_SOCKET_IFNAME") == wanted


@dataclass
class FallingConfig(ProcessGroupConfig):
    """Its worker ends while the group forms, the first time."""

    marker: str = ""

    @property
    def backend_cls(self) -> type[ProcessGroupBackend]:
        return FallingBackend


class FallingBackend(ProcessGroupBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        def choose_interface() -> None:
            end_once(backend_config.marker)

        process_group.choose_interface = choose_interface  # in the controller only
        super().on_start(worker_group, backend_config)


def end_once(marker: str) -> None:
    if not Path(marker).exists():
        Path(marker).touch()
        os._exit(1)


class Work:
    """Its worker ends while it reads this, the first time."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if ray.get_runtime_context().get_assigned_resources():  # a worker, not the controller
            end_once(self.marker)

    def __call__(self, job: dict[str, Any]) -> None:
        Path(job["output"]).touch()


@pytest.mark.parametrize("moment", ["forming", pytest.param("launching", marks=pytest.mark.slow)])
def test_workers_lost_while_they_start_are_started_again(ray_session, tmp_path, monkeypatch, moment) -> None:
    markers = {each: tmp_path / each for each in ("forming", "launching")}
    for each in markers.keys() - {moment}:
        markers[each].touch()
    falling = functools.partial(FallingConfig, marker=str(markers["forming"]))
    monkeypatch.setattr(process_group, "ProcessGroupConfig", falling)
    all_cpus = 2
    config = OptimizationConfig(output="", num_workers=1, num_cpus_per_worker=all_cpus, max_failures=1)
    workspace = Workspace(Location(str(tmp_path / "artifact")), "", ProgressReporter("train"))
    run_workers("train", Work(str(markers["launching"])), {"output": str(tmp_path / "done")}, workspace, config)
    assert markers[moment].exists()
    assert (tmp_path / "done").exists()
