"""What is not understood of the Dense modules of sentence-transformers is refused by name."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from readapt_ray.catalog import models
from readapt_ray.catalog.dense_layers import dense_layers
from readapt_ray.errors import ModelError
from readapt_ray.stages.finetune import FinetuneConfig, finetune
from readapt_ray.weights.dense import load_dense
from tests import factories

TANH = "torch.nn.modules.activation.Tanh"


@pytest.fixture
def folder(tmp_path):
    return factories.tiny_encoder(tmp_path / "model", headless=True)


def _write(folder, *configs: dict[str, Any], paths: tuple[str, ...] = ("2_Dense", "3_Dense")) -> models.OpenModel:
    modules = [{"type": "sentence_transformers.models.Transformer", "path": ""}]
    modules.append({"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"})
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode": "mean"}))
    for config, path in zip(configs, paths, strict=False):
        modules.append({"type": "sentence_transformers.models.Dense", "path": path})
        whole = {"in_features": 32, "out_features": 16, "bias": True, "activation_function": TANH, **config}
        (folder / path).mkdir(exist_ok=True, parents=True)
        (folder / path / "config.json").write_text(json.dumps(whole))
        weights = {"linear.weight": torch.ones(16, 32), "linear.bias": torch.ones(16)}
        save_file(weights, folder / path / "model.safetensors")
    (folder / "modules.json").write_text(json.dumps(modules))
    return models.open_model(str(folder))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"activation_function": "mine.Swoosh"}, r"2_Dense of .*'mine.Swoosh'; understood are Identity, Tanh"),
        ({"activation_function": "torch.nn.Transformer"}, "understood are Identity, Tanh"),
        ({"use_residual": True}, "with use_residual"),
        ({"module_input_name": "token_embeddings"}, "reads 'token_embeddings'"),
    ],
)
def test_another_computation_is_refused(folder, config, said):
    model = _write(folder, config)
    with pytest.raises(ModelError, match=said):
        _ = model.encoding


def test_layers_that_do_not_follow_each_other_are_refused(folder):
    with pytest.raises(ModelError, match="2_Dense gives 16 numbers, and 3_Dense takes 32"):
        dense_layers(_write(folder, {}, {}))


def test_weights_of_another_shape_are_refused(folder):
    model = _write(folder, {"out_features": 8})
    with pytest.raises(ModelError, match=r"\[16, 32\].*where .*\[8, 32\].* are expected"):
        load_dense(model, device="cpu")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder, name):
    model = _write(folder, {})
    (folder / "2_Dense" / name).unlink()
    with pytest.raises(ModelError, match=f"2_Dense/{name} is missing.*fetch the whole folder"):
        _ = model.encoding


def test_a_path_out_of_the_folder_is_refused(folder):
    model = _write(folder, {}, paths=("../2_Dense",))
    with pytest.raises(ModelError, match=r"names '\.\./2_Dense', which is not a subfolder"):
        dense_layers(model)


def test_finetune_refuses_what_it_would_lose(folder, tmp_path):
    model = _write(folder, {})
    passages = factories.small_corpus(20)
    factories.ingest_artifact(tmp_path / "corpus", passages, *factories.small_queries(passages, 4), split="train")
    config = FinetuneConfig(model=model.name, corpus=str(tmp_path / "corpus"), output=str(tmp_path / "out"))
    with pytest.raises(ModelError, match="the layer 2_Dense behind its pooling, which finetune does not train"):
        finetune(config)
