"""What nodes have installed against what the driver runs: when it joins them, and when a worker starts on one."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from readapt_ray.catalog.encoding import Encoding
from readapt_ray.cluster import connection, loss_task, on_worker, software, train_workers
from readapt_ray.cluster.scale_scoring import Sample, ScoringJob, _ScaleScorer
from readapt_ray.errors import PlacementError

ENCODING = Encoding(pooling="last", add_bos=True, add_eos=True)
VERSIONS = {"readapt_ray": "0.1.0", "torch": "2.13.0"}


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"readapt_ray": "missing"}, "has readapt_ray missing and torch "),
        ({"readapt_ray": "0.0.9"}, "has readapt_ray 0.0.9 and torch "),
        ({"torch": "2.12.0"}, r"has .* and torch 2\.12\.0"),
        ({"torch": "missing"}, "has .* and torch missing"),
        ({"faiss": "missing", "deepspeed": "missing"}, "lacks deepspeed, faiss, which the driver has"),
    ],
)
def test_a_node_that_differs_is_named(monkeypatch: pytest.MonkeyPatch, other: dict[str, str], text: str) -> None:
    def answers(_: Any, function: Any) -> dict[str, Any]:
        return {"10.0.0.1": function(), "10.0.0.2": {**function(), **other}}

    monkeypatch.setattr(connection, "_on_each", answers)
    with pytest.raises(PlacementError, match=rf"10\.0\.0\.2 {text}.*; install the same") as refused:
        connection.check_alike([])
    assert "10.0.0.1" not in str(refused.value)


def test_a_package_that_cannot_be_imported_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    here = software.reader()()
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "faiss" else find_spec(name))
    there = software.reader()()
    assert there == {**here, "faiss": "missing"}
    assert software.difference(here, there) == "lacks faiss, which the driver has"
    assert not software.difference(there, here), "a driver that lacks it does not use it"
    assert not software.difference(there, there)


@pytest.mark.parametrize(
    ("driver", "node"), [("2.13.0+cpu", "2.13.0+cu130"), ("2.13.0+cpu", "2.13.0"), ("2.13.0", "2.13.0+cu130")]
)
def test_builds_of_one_torch_are_alike_and_other_versions_are_not(driver: str, node: str) -> None:
    """As wheels name themselves: +cpu from the index for CPUs, +cu130 or nothing from PyPI."""
    assert not software.difference({**VERSIONS, "torch": driver}, {**VERSIONS, "torch": node})
    assert software.difference({**VERSIONS, "torch": driver}, {**VERSIONS, "torch": "2.12.1+cu130"})
    assert software.difference({**VERSIONS, "torch": driver}, {**VERSIONS, "torch": "2.13.0rc1+cu130"})


def test_code_from_a_working_directory_has_no_version_and_is_the_drivers() -> None:
    in_folder = {**VERSIONS, "readapt_ray": "from a folder"}
    assert not software.difference(VERSIONS, in_folder)
    assert software.difference(in_folder, {**VERSIONS, "readapt_ray": "missing"})


def entered_by_training(tmp_path: Path) -> None:
    """Start a training worker, which leaves its error on the monitor and raises it."""
    monitor = SimpleNamespace(error=SimpleNamespace(remote=lambda: None), fail=SimpleNamespace(remote=lambda _: None))
    train_workers._run_worker({"work": lambda _: pytest.fail("it worked"), "job": {"monitor": monitor}})


def loaded_to_embed(tmp_path: Path) -> None:
    encoding = ENCODING
    options = {"expected": "", "driver_node": "", "num_threads": 1, "batch_tokens": None}
    on_worker.load_encoder(str(tmp_path), encoding, "float32", **options)


def loaded_to_score(tmp_path: Path) -> None:
    job = ScoringJob({}, {}, ENCODING, "nDCG@10", False, "float32", False)
    _ScaleScorer(job, Sample([], [], {})).load()


def asked_for_losses(tmp_path: Path) -> None:
    loss_task._measure({}, [])


@pytest.mark.parametrize("started", [entered_by_training, loaded_to_embed, loaded_to_score, asked_for_losses])
def test_a_worker_on_a_node_that_came_late_is_compared_before_it_loads_a_model(
    started: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "get", lambda value: value)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_assigned_resources=dict))
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.9")
    told = {**software.reader()(), "torch": "2.12.0"}
    monkeypatch.setenv(software.DRIVER_VARIABLE, json.dumps(told))
    with pytest.raises(PlacementError, match=r"node 10\.0\.0\.9 has .*, the driver has .* torch 2\.12\.0; install"):
        started(tmp_path)
