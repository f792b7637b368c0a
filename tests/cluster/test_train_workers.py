"""What all workers have in common: the type that they compute in, and the model."""

from pathlib import Path

import pytest
import ray

from readapt_ray import hardware
from readapt_ray.cluster import connection, train_workers
from readapt_ray.cluster.optimization import OptimizationConfig
from readapt_ray.errors import FingerprintMismatchError
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
