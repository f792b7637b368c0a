import json
import math

import pytest
import torch

from readapt_ray.errors import ModelError, WeightMismatchError
from readapt_ray.stages.merge import MergeConfig, merge
from tests import factories


@pytest.fixture
def models(tmp_path):
    pretrained = factories.tiny_decoder(tmp_path / "pre")
    retriever = factories.write_contract(factories.full_retriever(tmp_path / "ret", pretrained))
    return {
        "pretrained": pretrained,
        "retriever": retriever,
        "adapter": factories.dora_adapter(tmp_path / "ad", pretrained),
    }


def _merge(models, output, **options):
    return merge(
        MergeConfig.parse({name: str(each) for name, each in models.items()} | {"output": str(output)} | options)
    )


def _edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _edit_tensors(folder, change):
    tensors = factories.read_tensors(folder)
    change(tensors)
    factories.write_tensors(folder, tensors)


def _refused(models, output, said, error=WeightMismatchError):
    with pytest.raises(error, match=said):
        _merge(models, output)
    assert not output.exists()


def test_another_config_is_refused_and_can_be_accepted(tmp_path, models):
    _edit_json(models["retriever"] / "config.json", rms_norm_eps=1e-5)
    _refused(models, tmp_path / "out", r"rms_norm_eps: 1e-06 before, 1e-05 after.*--accept config")
    _merge(models, tmp_path / "out", accept="config")
    assert json.loads((tmp_path / "out/config.json").read_text())["rms_norm_eps"] == 1e-5


def test_another_tokenizer_is_refused_and_can_be_accepted(tmp_path, models):
    path = models["retriever"] / "tokenizer.json"
    _edit_json(path, normalizer={"type": "Lowercase"})
    _refused(models, tmp_path / "out", "is cut into.*--accept tokenizer")
    _merge(models, tmp_path / "out", accept="tokenizer")
    assert json.loads((tmp_path / "out/tokenizer.json").read_text())["normalizer"] == {"type": "Lowercase"}


def test_a_vocabulary_that_grew_is_refused_and_can_be_accepted(tmp_path, models):
    new = torch.randn(8, 32)
    _edit_tensors(
        models["retriever"],
        lambda tensors: tensors.update({"embed_tokens.weight": torch.cat([tensors["embed_tokens.weight"], new])}),
    )
    tokenizer = factories.decoder_tokenizer()
    tokenizer.add_tokens(["<query>"])
    tokenizer.save_pretrained(models["retriever"])
    _edit_json(models["retriever"] / "config.json", vocab_size=392)
    _refused(
        models, tmp_path / "out", r"vocabulary sizes.*differ.*\[384, 32\] before, \[392, 32\] after.*--accept vocab"
    )
    _merge(models, tmp_path / "out", accept="vocabulary")
    assert torch.equal(factories.read_tensors(tmp_path / "out")["embed_tokens.weight"][384:], new)
    from transformers import AutoModel, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("<query>")["input_ids"]
    assert 384 in ids
    assert AutoModel.from_pretrained(tmp_path / "out")(torch.tensor([ids])).last_hidden_state.isfinite().all()


def test_a_tuned_model_of_full_weights_stands_for_an_adapter(tmp_path, models):
    tuned = factories.full_retriever(tmp_path / "tuned", models["pretrained"], seed=8, headless=False)
    _merge({**models, "adapter": tuned}, tmp_path / "out", knowledge_scale=0.4)
    p, r, t = (
        factories.without_head(factories.read_tensors(folder))
        for folder in (models["pretrained"], models["retriever"], tuned)
    )
    for name, tensor in factories.read_tensors(tmp_path / "out").items():
        wanted = r[name].double() + 0.4 * (t[name].double() - p[name].double())
        assert (tensor.double() - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def test_a_retriever_is_not_taken_for_knowledge(tmp_path, models):
    _merge(models, tmp_path / "adapted")
    for given, what in ((models["retriever"], "the retriever"), (tmp_path / "adapted", "a model that merge made")):
        said = f"the adapter .* is {what}, and its retrieval skill would be added twice"
        _refused(models | {"adapter": given}, tmp_path / "out", said, ModelError)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["pretrained", "retriever", "adapter"])
def test_nan_in_any_input_is_refused_by_name(tmp_path, models, which, value):
    if which == "adapter":
        from safetensors.torch import load_file, save_file

        path = models["adapter"] / "adapter_model.safetensors"
        tensors = load_file(path)
        name = sorted(tensors)[7]
        tensors[name].view(-1)[3] = value
        save_file(tensors, path)
    else:
        name = "layers.1.mlp.up_proj.weight"
        stored = name if which == "retriever" else f"model.{name}"
        _edit_tensors(models[which], lambda tensors: tensors[stored][2, 3].fill_(value))
    for scales in ({}, {"readapter_scale": 0, "knowledge_scale": 0}, {"dtype": "bfloat16"}, {"low_rank": 0.5}):
        with pytest.raises(ModelError, match=rf"{name}' of .*{models[which].name}.* holds NaN or infinity"):
            _merge(models, tmp_path / "out", overwrite=True, **scales)


def test_pickled_weights_of_all_three(tmp_path, models, monkeypatch):
    from safetensors.torch import load_file

    monkeypatch.setenv("READAPT_CACHE", str(tmp_path / "cache"))
    _merge(models, tmp_path / "safe")
    for which in ("pretrained", "retriever"):
        torch.save(factories.read_tensors(models[which]), models[which] / "pytorch_model.bin")
        (models[which] / "model.safetensors").unlink()
    path = models["adapter"] / "adapter_model.safetensors"
    torch.save(load_file(path), models["adapter"] / "adapter_model.bin")
    path.unlink()
    artifact = _merge(models, tmp_path / "pickled")
    assert (tmp_path / "safe/model.safetensors").read_bytes() == (tmp_path / "pickled/model.safetensors").read_bytes()
    assert "pytorch_model.bin" in artifact.manifest.details["sources"]["pretrained"]["files"]
    assert "pytorch_model.bin" in (tmp_path / "pickled/README.md").read_text()


def test_an_adapter_that_was_trained_on_another_model(tmp_path, models):
    adapter = models["adapter"]
    manifest = {"stage": "train", "fingerprint": "0" * 32, "config": {}, "inputs": {"pretrained": "1" * 32}}
    manifest |= {"counts": {}, "details": {}, "seconds": 1.0, "created": "", "versions": {}}
    (adapter / "manifest.json").write_text(json.dumps(manifest))
    _refused(models, tmp_path / "out", f"fingerprint {'1' * 32}.*--accept base")
    _merge(models, tmp_path / "out", accept="base")


def test_the_measures_of_tune_stand_in_the_model_card(tmp_path, models):
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    details = {
        "queries": "judged queries",
        "best": {"readapter_scale": 1.0, "knowledge_scale": 0.25},
        "layer_scales": ["0=0.8", "1=0.2"],
        "reported": {
            "measure": "nDCG@10",
            "num_queries": 1200,
            "mean": 0.31,
            "difference": 0.012,
            "interval": [0.004, 0.02],
        },
    }
    manifest = {"stage": "tune", "fingerprint": "0" * 32, "config": {}, "inputs": {}, "counts": {}, "details": details}
    (tuned / "manifest.json").write_text(json.dumps(manifest | {"seconds": 1.0, "created": "", "versions": {}}))
    _merge(models, tmp_path / "out", measures=str(tuned), knowledge_scale=0.25)
    card = (tmp_path / "out/README.md").read_text()
    assert (
        "readapter 1.0, knowledge 0.25 with layer_scales 0=0.8,1=0.2. On the withheld half, 1,200 queries: nDCG@10 0.3100, "
        "+0.0120 from the retriever as it was (95% interval +0.0040 to +0.0200)." in card
    )
    assert f"--pretrained {models['pretrained']} --retriever {models['retriever']}" in card
    assert "vllm serve" in card
    for path in (models["pretrained"], models["retriever"]):
        assert str(path) in card
