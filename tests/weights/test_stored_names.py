"""Weights are known by the names that transformers' modules have for them, and written as its save_pretrained writes them."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from readapt_ray.catalog import retrievers, shapes
from readapt_ray.errors import ModelError
from readapt_ray.storage import Location
from readapt_ray.weights.export import plan_shards, write_weights
from readapt_ray.weights.merging import Readapter, Scales
from readapt_ray.weights.stored_names import table_of
from readapt_ray.weights.weight_files import Checkpoint
from tests.families import Family, pretrained

SIZES = {
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
    "albert": {"embedding_size": 16},
    "electra": {"embedding_size": 16},
    "gemma3_text": {"head_dim": 8, "num_key_value_heads": 2},
}


@pytest.fixture(params=retrievers.TARGETS_BY_FAMILY)
def saved(request, tmp_path):
    """A tiny model of each family in the catalog, with its head and without, as transformers saves it."""
    kind = request.param
    config = transformers.AutoConfig.for_model(kind)
    is_decoder = type(config) not in transformers.AutoModelForMaskedLM._model_mapping
    options = {"num_key_value_heads": 2} if getattr(config, "num_key_value_heads", None) else {}
    options |= {"pad_token_id": 0} | SIZES.get(kind, {})
    headed = pretrained(tmp_path / "headed", Family(kind, options, is_decoder=is_decoder))
    model = transformers.AutoModel.from_pretrained(headed)
    model.save_pretrained(tmp_path / "headless")
    return kind, headed, tmp_path / "headless", model


def test_every_family_of_the_catalog(saved, tmp_path):
    kind, headed, headless, model = saved
    parameters = {name: each.detach() for name, each in model.named_parameters() if not name.startswith("pooler.")}
    for folder in (headed, headless):
        found = Checkpoint(folder)
        assert {name for name in found.names() if not name.startswith("pooler.")} == parameters.keys()
        for name, due in parameters.items():
            assert torch.equal(found.read(name), due), name
    linears = [name for name, each in model.named_modules() if isinstance(each, torch.nn.Linear)]
    assert shapes.matching_layers(linears, retrievers.target_modules(kind))
    checkpoint = Checkpoint(headless)
    same = Readapter(checkpoint, checkpoint)
    for max_shard_bytes in (1, 1 << 30):
        target = tmp_path / str(max_shard_bytes)
        plan = plan_shards(same, dtype="retriever", max_shard_bytes=max_shard_bytes)
        write_weights(same, Scales(0.0, ()), plan, Location(str(target)), report=lambda done: None)
        written = {name: each for file in target.glob("*.safetensors") for name, each in load_file(file).items()}
        wanted = load_file(headless / "model.safetensors")
        assert written.keys() == wanted.keys()
        assert all(torch.equal(written[name], each) for name, each in wanted.items())
        if max_shard_bytes == 1:
            index = json.loads((target / "model.safetensors.index.json").read_text())
            assert index["weight_map"].keys() == wanted.keys()


def test_weights_of_which_some_are_missing_are_not_joined():
    table = table_of("nomic_bert")
    names = [f"layers.0.self_attn.{each}_proj.weight" for each in "qkv"]
    assert table.stored(["norm", *names]) == [("norm", ("norm",)), ("encoder.layers.0.attn.Wqkv.weight", tuple(names))]
    assert [each.weights for each in table.stored(names[:2])] == [(names[0],), (names[1],)]


def test_a_joined_tensor_that_cannot_be_divided_is_refused(tmp_path):
    folder = pretrained(tmp_path, Family("nomic_bert", {"pad_token_id": 0}))
    tensors = load_file(folder / "model.safetensors")
    tensors["nomic_bert.encoder.layers.1.attn.Wqkv.weight"] = torch.zeros(95, 32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"Wqkv.weight' with 95 rows, and 3 weights of equal size are expected"):
        Checkpoint(folder)
