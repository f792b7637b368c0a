"""GPU nodes that a stage asks for: what is asked, what is waited for, and fake nodes that really come and go."""

import itertools
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from readapt_ray.catalog.models import OpenModel, open_model
from readapt_ray.cluster import (
    autoscaling,
    connection,
    encoding_dtype,
    launcher,
    loss_task,
    nodes,
    placement,
    query_vectors,
    query_writing,
    search_pieces,
)
from readapt_ray.errors import PlacementError
from readapt_ray.retrieval.vector_files import RowRange
from readapt_ray.stages.embed import EmbedConfig
from readapt_ray.storage import Location
from tests import factories

REPOSITORY = Path(__file__).parent.parent.parent
GPU = {"CPU": 1.0, "GPU": 1.0}


class FakeCluster:
    """Nodes that come one a second from the moment that they are asked for; time is made up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
        self.asked: list[int] = []
        self.checked: list[Any] = []
        self.now_s, self.most = 0.0, most
        monkeypatch.setenv("READAPT_NUM_GPUS", "8")
        monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda bundles: self.asked.append(len(bundles)))
        monkeypatch.setattr(nodes, "alive", self._alive)
        monkeypatch.setattr(connection, "check_alike", self.checked.extend)
        monkeypatch.setattr(connection, "connect", lambda: None)
        monkeypatch.setattr(autoscaling.time, "monotonic", lambda: self.now_s)
        monkeypatch.setattr(autoscaling.time, "sleep", self._sleep)

    def _alive(self) -> list[dict[str, Any]]:
        up = min(self.most, int(self.now_s)) if self.asked else 0
        return [{"NodeID": number, "Resources": {"CPU": 16, "GPU": 1}} for number in range(up)]

    def _sleep(self, seconds: float) -> None:
        self.now_s += seconds


def test_nodes_are_asked_for_before_the_work_and_let_go_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = FakeCluster(monkeypatch, most=8)
    assert placement.room_for(GPU) == 8
    with autoscaling.requested(8, GPU, least=8):
        assert (cluster.asked, cluster.now_s) == ([8], 8)
    assert cluster.asked == [8, 0]
    assert len(cluster.checked) == 8, "versions of nodes that come late are compared too"


def test_work_that_takes_late_nodes_begins_with_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = FakeCluster(monkeypatch, most=8)
    with autoscaling.requested(8, GPU, least=1):
        assert cluster.now_s == 1


@pytest.mark.parametrize("least", [1, 4])
@pytest.mark.parametrize(("most", "begins_s"), [(5, 301), (8, 8)])
def test_training_begins_with_all_or_with_what_came_in_five_minutes(
    monkeypatch: pytest.MonkeyPatch, least: int, most: int, begins_s: int
) -> None:
    cluster = FakeCluster(monkeypatch, most=most)
    with autoscaling.requested(8, GPU, least=least, patience_s=300):
        assert cluster.now_s == pytest.approx(begins_s, abs=1)


def test_work_that_can_begin_does_so_where_the_patience_is_longer_than_the_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = FakeCluster(monkeypatch, most=5)
    monkeypatch.setenv("READAPT_WAIT_S", "60")
    with autoscaling.requested(8, GPU, least=4, patience_s=300):
        assert cluster.now_s == pytest.approx(60, abs=1)


def test_too_few_nodes_are_an_error_that_says_where_to_look(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = FakeCluster(monkeypatch, most=3)
    with (
        pytest.raises(
            PlacementError, match=r"4 GPUs are needed and the autoscaler brought 3 within 900 s .* `ray status`"
        ),
        autoscaling.requested(8, GPU, least=4),
    ):
        pass
    assert cluster.asked == [8, 0]


def test_what_the_launcher_could_not_start_is_said_while_waiting_and_at_the_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    FakeCluster(monkeypatch, most=3)
    monkeypatch.setattr(launcher, "failures", lambda: ["gpu (p5.4xlarge): VcpuLimitExceeded: no"])
    caplog.set_level("INFO", "readapt_ray")
    with (
        pytest.raises(PlacementError, match=r"the launcher could not start gpu \(p5.4xlarge\): VcpuLimitExceeded: no$"),
        autoscaling.requested(8, GPU, least=4),
    ):
        pass
    assert "waiting for GPU nodes: room for 3 of 8 workers" in caplog.messages[0]
    assert caplog.messages[0].endswith("the launcher could not start gpu (p5.4xlarge): VcpuLimitExceeded: no")


def test_nothing_is_asked_for_where_the_cluster_is_what_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = FakeCluster(monkeypatch, most=8)
    with autoscaling.requested(8, {"CPU": 1.0, "GPU": 0}, least=8):
        pass
    monkeypatch.delenv("READAPT_NUM_GPUS")
    with autoscaling.requested(8, GPU, least=8):
        pass
    assert cluster.asked == []


def test_work_that_ends_does_not_take_the_nodes_of_what_runs_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = FakeCluster(monkeypatch, most=8)
    with autoscaling.requested(8, GPU, least=1):
        with autoscaling.requested(2, GPU, least=1):
            pass
        assert cluster.asked == [8, 8, 8], "the autoscaler knows the last request only"
    assert cluster.asked[-1] == 0


def _encodes_queries(model: OpenModel, folder: Path) -> object:
    return list(query_vectors.encode_pieces([query_vectors.TextPiece(["what"])], model, model.encoding, {}))


def _searches_vectors(model: OpenModel, folder: Path) -> object:
    vectors = SimpleNamespace(location=Location(str(folder)))
    pieces = search_pieces.Pieces(vectors, [(RowRange("a", 0, 1),)], on_gpus=True, num_at_once=1)  # type: ignore[arg-type]
    return list(pieces.search([], 1))


def _measures_losses(model: OpenModel, folder: Path) -> object:
    return loss_task.measure_losses(model, model, ["a"], objective="causal", max_tokens=8, dtype="float32")


def _writes_queries(model: OpenModel, folder: Path) -> object:
    job = SimpleNamespace(missing=lambda: [0], answers=Location(str(folder)), rows=np.arange(1))
    return query_writing.ask_on_ray(job, model, dtype="float32", report=lambda _: None)  # type: ignore[func-returns-value, arg-type]


def _chooses_a_type(model: OpenModel, folder: Path) -> object:
    config = EmbedConfig(retriever=model.name, corpus="corpus", output=str(folder / "vectors"))
    return encoding_dtype.encoding_dtype(config, "auto")


@pytest.mark.parametrize(
    "work", [_encodes_queries, _searches_vectors, _measures_losses, _writes_queries, _chooses_a_type]
)
def test_work_on_gpus_that_do_not_come_ends_with_the_reason(
    work: Callable[[OpenModel, Path], object], ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("READAPT_NUM_GPUS", "2")
    monkeypatch.setenv("READAPT_WAIT_S", "0.1")
    model = open_model(str(factories.write_contract(factories.tiny_decoder(tmp_path / "model"))))
    with pytest.raises(PlacementError, match=r"1 GPU is needed and the autoscaler brought 0 within 0\.1 s"):
        work(model, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_takes_nodes_loses_one_gets_it_back_and_lets_them_go(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.cluster.autoscaled", str(tmp_path)]
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads((tmp_path / "said.json").read_text())
    assert (said["before"], said["after"], said["num_vectors"]) == (0, 0, 3000)
    changes = [count for count, _ in itertools.groupby(said["counts"][said["killed_at"] :])]
    assert changes[:3] == [2, 1, 2] or changes[:2] == [1, 2], f"a node was lost and came back: {changes}"
    assert said["gpus"], "the manifest says what GPUs did the work, though none was up at its start"
    assert said["let_go_s"] < 100
    assert "GPUs to come: 2 of 2 are up" in said["doctor"], "doctor has them started"
    assert "all-reduce: 2 workers by gloo" in said["doctor"], "and has a worker on each"
