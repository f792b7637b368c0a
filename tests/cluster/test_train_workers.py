"""What all workers have in common: the type that they compute in, and the model."""

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.train.v2.api.exceptions import WorkerGroupError

from readapt_ray import hardware
from readapt_ray.artifacts import Workspace
from readapt_ray.cluster import autoscaling, connection, placement, train_workers
from readapt_ray.cluster.optimization import OptimizationConfig
from readapt_ray.errors import FingerprintMismatchError, TrainingDivergedError
from readapt_ray.progress import ProgressReporter
from readapt_ray.stages.train import TrainConfig, train
from readapt_ray.storage import Location
from tests import factories


def test_what_was_begun_in_one_type_goes_on_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dtype(asked: str, *, on_gpus: bool) -> str:
        config = OptimizationConfig.parse({"output": str(tmp_path), "dtype": asked})
        return train_workers._dtype(config, Location(str(tmp_path)), on_gpus=on_gpus)

    monkeypatch.setattr(connection, "all_have_bfloat16_units", lambda: False)
    assert dtype("auto", on_gpus=True) == "bfloat16"
    assert dtype("auto", on_gpus=False) == "float32"
    monkeypatch.setattr(connection, "all_have_bfloat16_units", lambda: True)
    assert dtype("auto", on_gpus=False) == "bfloat16"
    assert dtype("float32", on_gpus=True) == "float32"
    (tmp_path / "dtype").write_text("float32")
    assert dtype("auto", on_gpus=True) == "float32", "begun on CPUs, gone on with on GPUs"


def test_training_waits_for_its_gpus_and_is_not_resized_before_a_checkpoint(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resize restarts all workers: what they did since the last checkpoint is lost."""
    asked: dict[str, Any] = {}

    def requested(num_workers: int, each: dict[str, float], **options: Any) -> Any:
        asked.update(options, num_workers=num_workers)
        return contextlib.nullcontext()

    def fit(trainer: Any, *_: Any) -> None:
        asked["scaling"] = trainer().scaling_config

    monkeypatch.setattr(autoscaling, "requested", requested)
    monkeypatch.setattr(train_workers, "_fit", fit)
    monkeypatch.setattr(placement, "place_training", lambda *_: (8, {"CPU": 1.0}, False))
    config = OptimizationConfig(output=str(tmp_path), min_workers=1, checkpoint_every_s=300)
    workspace = Workspace(Location(str(tmp_path)), "", ProgressReporter("train"))
    train_workers.run_workers("train", lambda _: None, {}, workspace, config)
    assert (asked["num_workers"], asked["least"], asked["patience_s"]) == (8, 1, 300)
    scaling = asked["scaling"]
    assert (scaling.min_workers, scaling.max_workers) == (1, 8)
    assert scaling.elastic_resize_monitor_interval_s == 600


def test_every_node_that_computes_is_asked_for_its_units(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": cpus}, "NodeID": name} for name, cpus in (("a", 0.0), ("b", 4.0))]
    asked: list[str] = []
    answers = iter([{"b": True}, {"b": True, "c": False}])

    def on_each(those: list[dict[str, str]], function: object) -> dict[str, bool]:
        asked.extend(node["NodeID"] for node in those)
        assert function is hardware.has_bfloat16_units
        return next(answers)

    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(connection, "_on_each", on_each)
    assert connection.all_have_bfloat16_units()
    assert asked == ["b"], "a head without CPUs computes nothing"
    assert not connection.all_have_bfloat16_units()


def test_a_worker_of_another_node_must_find_the_drivers_model(ray_session: None, tmp_path: Path) -> None:
    base = factories.tiny_decoder(tmp_path / "base")
    job = {"output": str(tmp_path), "monitor": None, "dtype": "float32", "inputs": {"pretrained": "of the driver"}}
    with pytest.raises(FingerprintMismatchError, match=r"base' has other weights on node .* put the same files"):
        train_workers.TrainWorker(
            {**job, "driver_node": "another"},
            OptimizationConfig(output=str(tmp_path)),
            str(base),
            objective="causal_lm",
            micro_batch_tokens=64,
        )


@pytest.mark.slow
def test_the_manifest_and_the_output_say_what_auto_was(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "all_have_bfloat16_units", lambda: True)
    base, blocks = factories.packed_corpus(tmp_path)
    made = train(
        TrainConfig(
            pretrained=str(base),
            corpus=str(blocks),
            output=str(tmp_path / "out"),
            num_workers=1,
            num_cpus_per_worker=1,
            batch_size=40,
        )
    )
    assert made.manifest.details["dtype"] == (tmp_path / "out/dtype").read_text() == "bfloat16"


class FakeMonitor:
    """Answers as the actor does, and counts the checkpoint of each start in a list."""

    def __init__(self, kept: list[int], error: Exception | None = None) -> None:
        self.kept, self.starts, self._error = kept, 0, error

    @property
    def error(self) -> Any:
        return SimpleNamespace(remote=lambda: self._error)

    @property
    def kept_step(self) -> Any:
        return SimpleNamespace(remote=lambda: self.kept[self.starts - 1])

    def trainer(self) -> Any:
        return SimpleNamespace(fit=self._fail)

    def _fail(self) -> None:
        self.starts += 1
        if self.starts < len(self.kept):
            raise WorkerGroupError("a worker died", {0: RuntimeError("died")})


def test_failures_are_counted_from_the_last_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get", lambda value: value)
    spot = FakeMonitor([100, 200, 200, 300, 400, 400, 500, 500])
    train_workers._fit(spot.trainer, spot, 2)
    assert spot.starts == 8, "seven failures, never more than two without a checkpoint in between"
    stuck = FakeMonitor([100, 200, 200, 200, 200, 200])
    with pytest.raises(WorkerGroupError):
        train_workers._fit(stuck.trainer, stuck, 2)
    assert stuck.starts == 4
    endless = FakeMonitor([0] * 30)
    train_workers._fit(endless.trainer, endless, -1)
    assert endless.starts == 30
    never = FakeMonitor([5, 5])
    with pytest.raises(WorkerGroupError):
        train_workers._fit(never.trainer, never, 0)


def test_an_error_of_ours_ends_the_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get", lambda value: value)
    monitor = FakeMonitor([0, 0, 0], TrainingDivergedError("the loss became nan"))
    train_workers._fit(monitor.trainer, monitor, 3)
    assert monitor.starts == 1
