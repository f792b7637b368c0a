import json

import pytest
import torch
import transformers

from readapt_ray.catalog.models import open_model
from readapt_ray.errors import ModelError, WeightMismatchError
from readapt_ray.weights import loading
from readapt_ray.weights.loading import load_model
from tests import factories
from tests.weights import oracles

IDS = torch.tensor([[1, 5, 9, 2, 77, 3]])


def _load(folder, dtype=torch.float32):
    return load_model(open_model(str(folder)), dtype=dtype, device="cpu")


@pytest.mark.parametrize("headless", [False, True])
@pytest.mark.parametrize("make", [factories.tiny_decoder, factories.tiny_encoder])
def test_hidden_states_are_those_of_transformers(tmp_path, make, headless):
    folder = make(tmp_path, headless=headless, shards=2)
    module = _load(folder)
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert module.config._attn_implementation == "sdpa"
    with torch.no_grad():
        wanted = transformers.AutoModel.from_pretrained(folder)(IDS).last_hidden_state
        assert torch.equal(module(IDS).last_hidden_state, wanted)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("headless", [False, True])
@pytest.mark.parametrize("make", [factories.tiny_decoder, factories.tiny_encoder])
def test_an_adapter_is_laid_on_its_base(tmp_path, make, headless, use_dora):
    base = make(tmp_path / "base")
    folder = factories.lora_adapter(tmp_path / "ad", base, use_dora=use_dora, headless=headless)
    wanted = oracles.merged_by_peft(base, folder, headless=headless)
    for name, parameter in _load(folder).named_parameters():
        if not name.startswith("pooler."):
            assert (parameter.double() - wanted[name]).abs().max() < 1e-6


def test_an_adapter_is_cast_once(tmp_path):
    base = factories.tiny_decoder(tmp_path / "base", dtype="bfloat16")
    folder = factories.dora_adapter(tmp_path / "ad", base)
    exact = oracles.merged_by_peft(base, folder)
    for name, parameter in _load(folder, torch.bfloat16).named_parameters():
        rounding = exact[name].abs() * 2**-8 + 1e-9
        assert ((parameter.double() - exact[name]).abs() <= rounding).all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), r"norm\.weight: not in the files"),
        (lambda tensors: tensors.update({"model.more": torch.ones(2)}), r"more: unknown to LlamaModel"),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(5)}),
            r"norm\.weight: \[5\] in the files, \[32\] due",
        ),
    ],
)
def test_no_weight_is_missing_or_left_over_in_silence(tmp_path, change, said):
    folder = factories.tiny_decoder(tmp_path)
    tensors = factories.read_tensors(folder)
    change(tensors)
    factories.write_tensors(folder, tensors)
    with pytest.raises(ModelError, match=said):
        _load(folder)


def test_an_unknown_architecture_is_refused(tmp_path):
    folder = factories.tiny_decoder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "nosuch"}))
    with pytest.raises(ModelError, match="cannot load"):
        _load(folder)


def test_an_adapter_of_another_model_is_refused(tmp_path):
    base = factories.tiny_decoder(tmp_path / "base")
    folder = factories.lora_adapter(tmp_path / "ad", base)
    factories.tiny_decoder(tmp_path / "base", hidden_size=64)
    with pytest.raises(WeightMismatchError, match="does not fit the model"):
        _load(folder)


def test_nothing_is_printed(tmp_path, capfd):
    _load(factories.tiny_encoder(tmp_path))
    assert capfd.readouterr() == ("", "")


def test_an_architecture_without_sdpa_is_loaded_with_plain_attention(tmp_path):
    config = transformers.MPNetConfig(
        vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    model = transformers.MPNetModel(config, add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path)
    loaded = _load(tmp_path)
    assert loaded.config._attn_implementation == "eager"
    with torch.no_grad():
        assert torch.equal(loaded(IDS).last_hidden_state, model(IDS).last_hidden_state)


def test_what_lacks_a_package_is_refused_and_no_crash(tmp_path, monkeypatch):
    """A model in 4 bits by AWQ, say."""

    def load(*_):
        raise ImportError("Loading an AWQ quantized model requires gptqmodel.")

    model = open_model(str(factories.tiny_decoder(tmp_path / "m")))
    monkeypatch.setattr(loading, "_from_pretrained", load)
    with pytest.raises(
        ModelError, match=r"transformers cannot load .*: Loading an AWQ quantized model requires gptqmodel"
    ):
        load_model(model, dtype=torch.float32, device="cpu")
