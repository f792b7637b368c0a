"""Which adapters training goes on from, and that it begins with their weights; without Ray."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from readapt_ray import artifacts
from readapt_ray.catalog.models import open_model
from readapt_ray.cluster import continued_adapter, on_worker
from readapt_ray.cluster.continued_adapter import check_base, with_shape_of
from readapt_ray.errors import FingerprintMismatchError, InputError, ModelError, WeightMismatchError
from readapt_ray.stages.train import TrainConfig, resolve
from readapt_ray.training import dora
from tests import factories


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, `base`, and an adapter that PEFT saved, `adapter`."""
    folder = tmp_path_factory.mktemp("continued")
    factories.dora_adapter(folder / "adapter", factories.tiny_decoder(folder / "base"))
    return folder


def config(folder: Path, **options: Any) -> TrainConfig:
    values = {"pretrained": str(folder / "base"), "corpus": "blocks", "output": "o"}
    return TrainConfig(**values, continue_from=str(folder / "adapter"), **options)


def saved(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "adapter/adapter_config.json").read_text()))


def test_the_shape_is_that_of_the_adapter(folder: Path) -> None:
    there = saved(folder)
    _, found = resolve(config(folder, lora_rank=there["r"]), open_model(str(folder / "base")))
    assert (found.method, found.lora_rank, found.lora_alpha) == ("dora", there["r"], there["lora_alpha"])
    assert found.target_modules == tuple(sorted(there["target_modules"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_rank": 77}, r"lora_rank = 77, and continue_from = '.*' has lora_rank = \d+; leave --lora-rank out, or leave"),
        ({"lora_alpha": 77}, r"lora_alpha = 77.0, and continue_from"),
        ({"method": "lora"}, r"method = 'lora', and continue_from = '.*' has method = 'dora'"),
        ({"method": "full"}, r"method = 'full', and continue_from"),
        ({"target_modules": ("q_proj",)}, r"target_modules = \('q_proj',\), and continue_from"),
    ],
)  # fmt: skip
def test_another_shape_is_refused(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve(config(folder, **options), open_model(str(folder / "base")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_rslora": True}, "has use_rslora = True, which cannot be trained on"),
        ({"rank_pattern": {"q_proj": 3}}, r"has rank_pattern = \{'q_proj': 3\}, which"),
        ({"target_modules": "all-linear"}, "has target_modules = 'all-linear', which"),
    ],
)
def test_an_adapter_that_training_cannot_hold_is_refused(
    folder: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved(folder) | change))
    with pytest.raises(ModelError, match=message):
        with_shape_of(config(folder), open_model(str(tmp_path)))
    with pytest.raises(ModelError, match="is not an adapter; give the output folder of `readapt train`"):
        with_shape_of(config(folder), open_model(str(folder / "base")))


def test_an_adapter_of_another_base_is_refused(folder: Path, tmp_path: Path) -> None:
    adapter, base = open_model(str(folder / "adapter")), open_model(str(folder / "base"))
    check_base(adapter, base)
    other = open_model(str(factories.tiny_decoder(tmp_path / "other", seed=3)))
    with pytest.raises(
        ModelError, match=r"was trained on '.*base', whose weights are not the weights of '.*other'; give that"
    ):
        check_base(adapter, other)
    with pytest.raises(WeightMismatchError, match="does not fit the model"):
        check_base(adapter, open_model(str(factories.tiny_decoder(tmp_path / "large", hidden_size=64))))


def test_the_manifest_says_what_an_adapter_was_trained_on(folder: Path, tmp_path: Path) -> None:
    def made(stage: str, name: str, pretrained: str) -> Any:
        def work(workspace: artifacts.Workspace) -> None:
            for file in (folder / "adapter").glob("adapter_*"):
                (workspace.location / file.name).write_bytes(file.read_bytes())

        options = config(folder).model_copy(update={"output": str(tmp_path / name)})
        artifacts.produce(stage, options, inputs={"pretrained": pretrained}, work=work)
        return open_model(str(tmp_path / name))

    base = open_model(str(folder / "base"))
    check_base(made("train", "own", base.fingerprint), base)
    with pytest.raises(ModelError, match="whose weights are not the weights of"):
        check_base(made("train", "changed", "of another state of the folder"), base)
    with pytest.raises(ModelError, match="is the output of 'finetune'; give the output folder of `readapt train`"):
        check_base(made("finetune", "labelled", base.fingerprint), base)


@pytest.mark.parametrize("method", ["dora", "lora"])
def test_a_worker_begins_where_the_adapter_ended(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """The model computes what PEFT computes with the adapter, and saves the adapter as it was."""
    monkeypatch.setattr(on_worker, "this_node", lambda: "another node")
    make = factories.dora_adapter if method == "dora" else factories.lora_adapter
    adapter = open_model(str(make(tmp_path / "adapter", folder / "base")))
    shape = with_shape_of(config(folder), adapter)
    model = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    targets = shape.target_modules
    assert shape.method == method
    dora.add_adapters(
        model,
        dora.AdapterShape(method=method, rank=shape.lora_rank, alpha=shape.lora_alpha, dropout=0.0, targets=targets),
    )
    ids = torch.tensor([[0, 9, 12, 5]])
    with torch.no_grad():
        before = model(ids).logits
        continued_adapter.load(model, adapter.name, expected={adapter.fingerprint}, driver_node="the driver's")
        found = model(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(folder / "base")
        expected = peft.PeftModel.from_pretrained(plain, adapter.name).eval()(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, before, atol=1e-2)
    with pytest.raises(FingerprintMismatchError, match="has other weights on node"):
        monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "10.0.0.1")
        continued_adapter.load(model, adapter.name, expected={"another"}, driver_node="the driver's")
    state = dora.adapter_state(model)
    with pytest.raises(ModelError, match="was not trained on the same layers"):
        dora.load_adapter_state(model, dict(list(state.items())[1:]), name="a")
