import json

import pytest
import torch

from readapt_ray.catalog.models import open_model
from readapt_ray.errors import InputError, ModelError, WeightMismatchError
from readapt_ray.weights import merging as readapter_module
from readapt_ray.weights.adapter import Adapter
from readapt_ray.weights.live_scales import LiveReadapter
from readapt_ray.weights.loading import load_model
from readapt_ray.weights.merging import Readapter, Scales, open_retriever
from readapt_ray.weights.scale_options import layer_scales
from readapt_ray.weights.weight_files import Checkpoint
from tests import factories

SCALES = [(1.0, 0.5), (1.0, 0.0), (0.0, 0.0), (0.4, 0.5), (0.4, 1.0), (1.0, 0.5)]


def _readapter(pretrained, retriever, *adapters):
    before = Checkpoint(pretrained)
    return Readapter(before, open_retriever(retriever, before), [Adapter(folder, before) for folder in adapters])


@pytest.mark.parametrize("make", [factories.tiny_decoder, factories.tiny_encoder])
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_any_pair_of_scales_equals_what_a_merge_writes(tmp_path, monkeypatch, make, kind, dtype, *, device):
    monkeypatch.setattr(readapter_module, "_SLICE_ELEMENTS", 1000)
    pretrained = make(tmp_path / "pre")
    if kind == "full":
        retriever = factories.full_retriever(tmp_path / "ret", pretrained)
    else:
        retriever = factories.lora_adapter(tmp_path / "ret", pretrained)
    made = _readapter(pretrained, retriever, factories.dora_adapter(tmp_path / "ad", pretrained))
    module = load_model(open_model(str(pretrained)), dtype=dtype, device=device)
    live = LiveReadapter(module, made)
    tolerance = {"rtol": 0, "atol": 0} if device == "cpu" else {}  # a GPU rounds sums of products another way
    for a, k in SCALES:
        live.set_scales(a, k)
        parameters = dict(module.named_parameters())
        for name, tensor in made.walk(Scales(a, (k,))):
            torch.testing.assert_close(parameters[name].cpu(), tensor.to(dtype), **tolerance, msg=f"{name}, {a}, {k}")


def test_a_forward_pass_moves_with_the_scales(tmp_path):
    pretrained = factories.tiny_decoder(tmp_path / "pre")
    made = _readapter(pretrained, pretrained, factories.dora_adapter(tmp_path / "ad", pretrained))
    module = load_model(open_model(str(pretrained)), dtype=torch.float32, device="cpu")
    live = LiveReadapter(module, made)
    ids = torch.tensor([[1, 5, 9, 2]])
    outputs = []
    for k in (0.0, 0.5, 0.0):
        live.set_scales(1.0, k)
        outputs.append(module(ids).last_hidden_state)
    assert torch.equal(outputs[0], outputs[2])
    assert (outputs[0] - outputs[1]).abs().max() > 1e-2


def test_one_scale_for_all_adapters_or_one_each(tmp_path):
    pretrained = factories.tiny_decoder(tmp_path / "pre")
    folders = [factories.dora_adapter(tmp_path / f"ad{seed}", pretrained, seed=seed) for seed in (3, 4)]
    made = _readapter(pretrained, pretrained, *folders)
    module = load_model(open_model(str(pretrained)), dtype=torch.float32, device="cpu")
    live = LiveReadapter(module, made)
    name = "layers.0.mlp.up_proj.weight"
    for given, scales in ((0.5, (0.5, 0.5)), ((0.5, 0.1), (0.5, 0.1))):
        live.set_scales(1.0, given)
        assert torch.equal(dict(module.named_parameters())[name], made.weight(name, Scales(1.0, scales)))
    with pytest.raises(InputError, match="3 knowledge scales for 2 adapters"):
        live.set_scales(1.0, (1.0, 1.0, 1.0))
    with pytest.raises(InputError, match="finite"):
        live.set_scales(float("nan"), 0.5)


def test_another_kind_of_module_is_refused(tmp_path):
    pretrained = factories.tiny_decoder(tmp_path / "pre")
    deeper = factories.tiny_decoder(tmp_path / "deeper", num_layers=3)
    module = load_model(open_model(str(deeper)), dtype=torch.float32, device="cpu")
    with pytest.raises(WeightMismatchError, match=r"layers\.2.*only in the live model"):
        LiveReadapter(module, _readapter(pretrained, pretrained))


def test_nan_is_refused_before_a_scale_is_set(tmp_path):
    pretrained = factories.tiny_decoder(tmp_path / "pre")
    module = load_model(open_model(str(pretrained)), dtype=torch.float32, device="cpu")
    tensors = factories.read_tensors(pretrained)
    tensors["model.norm.weight"][0] = float("nan")
    factories.write_tensors(pretrained, tensors)
    with pytest.raises(ModelError, match=r"norm\.weight"):
        LiveReadapter(module, _readapter(pretrained, pretrained))


@pytest.mark.parametrize("num_words", [379, 384, 390])
@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_a_retriever_with_more_or_fewer_words_is_what_a_merge_writes(tmp_path, monkeypatch, num_words, kind):
    monkeypatch.setattr(readapter_module, "_SLICE_ELEMENTS", 1000)
    pretrained = factories.tiny_decoder(tmp_path / "pre", headless=True)
    retriever = factories.full_retriever(tmp_path / "ret", pretrained)
    tensors = factories.read_tensors(retriever)
    words = tensors["embed_tokens.weight"]
    tensors["embed_tokens.weight"] = torch.cat([words, torch.full((6, 32), 7.0)])[:num_words].clone()
    factories.write_tensors(retriever, tensors)
    config = json.loads((retriever / "config.json").read_text())
    (retriever / "config.json").write_text(json.dumps(config | {"vocab_size": num_words}))
    before = Checkpoint(pretrained)
    if kind == "adapter":
        knowledge = Adapter(factories.dora_adapter(tmp_path / "ad", pretrained, headless=True), before)
    else:
        knowledge = Checkpoint(factories.full_retriever(tmp_path / "tuned", pretrained, seed=5, dtype="bfloat16"))
    made = Readapter(before, Checkpoint(retriever), [knowledge], accept_vocabulary=True)
    module = load_model(open_model(str(retriever)), dtype=torch.float32, device="cpu")
    live = LiveReadapter(module, made)
    for a, k in SCALES:
        live.set_scales(a, k)
        assert torch.equal(module.embed_tokens.weight[384:], torch.full((max(0, num_words - 384), 32), 7.0))
        parameters = dict(module.named_parameters())
        for name, tensor in made.walk(Scales(a, (k,))):
            assert torch.equal(parameters[name], tensor), (name, a, k)


def test_scales_by_layer_are_those_of_a_merge_for_every_pair(tmp_path):
    pretrained = factories.tiny_decoder(tmp_path / "pre")
    made = _readapter(pretrained, pretrained, factories.dora_adapter(tmp_path / "ad", pretrained))
    module = load_model(open_model(str(pretrained)), dtype=torch.float32, device="cpu")
    layers = layer_scales(["0=0.8", "1=0.2"])
    live = LiveReadapter(module, made, layers=layers)
    for k in (0.5, 1.0):
        live.set_scales(1.0, k)
        for name, tensor in made.walk(Scales(1.0, (k,), layers)):
            assert torch.equal(dict(module.named_parameters())[name], tensor), name
    assert not torch.equal(
        made.weight(name := "layers.1.mlp.up_proj.weight", Scales(1.0, (1.0,))), dict(module.named_parameters())[name]
    )
