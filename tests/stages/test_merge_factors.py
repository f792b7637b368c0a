import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from readapt_ray.artifacts import read_manifest
from readapt_ray.catalog.models import open_model
from readapt_ray.errors import InputError, ModelError, WeightMismatchError
from readapt_ray.stages.merge import MergeConfig, merge
from readapt_ray.weights.loading import load_model
from tests import factories
from tests.weights import oracles


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    pretrained = factories.tiny_decoder(root / "pre", hidden_size=64)
    full = factories.write_contract(factories.full_retriever(root / "full", pretrained))
    lora = factories.write_contract(factories.lora_adapter(root / "lora", pretrained, headless=True))
    adapters = [factories.dora_adapter(root / f"ad{seed}", pretrained, seed=seed) for seed in (3, 4)]
    return {"pretrained": pretrained, "full": full, "lora": lora, "adapters": adapters}


def _merge(models, output, *, retriever="full", num_adapters=1, **options):
    adapter = ",".join(map(str, models["adapters"][:num_adapters]))
    values = {"pretrained": str(models["pretrained"]), "retriever": str(models[retriever]), "adapter": adapter}
    return merge(MergeConfig.parse(values | {"output": str(output)} | options))


def _from_bundle(bundle, output, **options):
    return merge(MergeConfig.parse({"bundle": str(bundle), "output": str(output)} | options))


def _weights(folder):
    return (Path(folder) / "model.safetensors").read_bytes()


@pytest.mark.parametrize("num_adapters", [1, 2])
def test_a_bundle_of_adapters_makes_the_same_bytes_at_any_scales(tmp_path, models, num_adapters):
    scales = {"knowledge_scale": "0.5,0.25"[: 3 if num_adapters == 1 else None], "readapter_scale": 0.8}
    _merge(models, tmp_path / "bundle", retriever="lora", num_adapters=num_adapters, factors=True, **scales)
    _merge(models, tmp_path / "direct", retriever="lora", num_adapters=num_adapters, **scales)
    _from_bundle(tmp_path / "bundle", tmp_path / "again")
    assert _weights(tmp_path / "again") == _weights(tmp_path / "direct")
    _merge(models, tmp_path / "other", retriever="lora", num_adapters=num_adapters, knowledge_scale=0.1)
    _from_bundle(tmp_path / "bundle", tmp_path / "moved", readapter_scale=1.0, knowledge_scale=0.1)
    assert _weights(tmp_path / "moved") == _weights(tmp_path / "other")
    for name in ("readapt.json", "tokenizer.json", "config.json", "1_Pooling/config.json"):
        one, other = (json.loads((tmp_path / folder / name).read_text()) for folder in ("again", "direct"))
        one.pop("fingerprint", None), other.pop("fingerprint", None)
        assert one == other


def test_a_bundle_keeps_the_scales_of_its_layers_unless_others_are_given(tmp_path, models):
    layers = {"layer_scales": "0=0.8,1=0.2"}
    _merge(models, tmp_path / "bundle", retriever="lora", factors=True, **layers)
    direct = _merge(models, tmp_path / "direct", retriever="lora", **layers)
    again = _from_bundle(tmp_path / "bundle", tmp_path / "again")
    assert _weights(tmp_path / "again") == _weights(tmp_path / "direct")
    assert again.manifest.fingerprint == direct.manifest.fingerprint
    assert json.loads((tmp_path / "bundle/bundle.json").read_text())["model_fingerprint"] == direct.manifest.fingerprint
    whole, loaded = (
        load_model(open_model(str(tmp_path / name)), dtype=torch.float32, device="cpu") for name in ("direct", "bundle")
    )
    for (name, one), other in zip(whole.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(one, other), name
    plain = _merge(models, tmp_path / "plain", retriever="lora")
    without = _from_bundle(tmp_path / "bundle", tmp_path / "without", layer_scales=[])
    assert _weights(tmp_path / "without") == _weights(tmp_path / "plain") != _weights(tmp_path / "direct")
    assert without.manifest.fingerprint == plain.manifest.fingerprint
    with pytest.raises(InputError, match="the model has the layers 0 to 1"):
        _from_bundle(tmp_path / "bundle", tmp_path / "beyond", layer_scales="5=0.5")


def test_a_bundle_of_full_weights_holds_their_difference(tmp_path, models):
    _merge(models, tmp_path / "bundle", factors=True)
    _from_bundle(tmp_path / "bundle", tmp_path / "again", knowledge_scale=0.3)
    _merge(models, tmp_path / "direct", knowledge_scale=0.3)
    again, direct = (factories.read_tensors(tmp_path / name) for name in ("again", "direct"))
    assert again.keys() == direct.keys()
    for name, tensor in direct.items():
        assert (again[name] - tensor).abs().max() <= 2e-7 * tensor.abs().max()


def test_a_truncated_bundle_is_small_and_says_how_much_it_holds(tmp_path, models):
    artifact = _merge(models, tmp_path / "bundle", factors=True, low_rank=0.5)
    sizes = {
        name: sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
        for name, folder in (("bundle", tmp_path / "bundle"), ("retriever", models["full"]))
    }
    assert sizes["bundle"] < 0.6 * sizes["retriever"]
    stored = artifact.manifest.details["low_rank"]
    p, r = oracles.as_float64(models["pretrained"]), oracles.as_float64(models["full"])
    _from_bundle(tmp_path / "bundle", tmp_path / "again", readapter_scale=1.0, knowledge_scale=0.0)
    again = oracles.as_float64(tmp_path / "again")
    truncated = 0
    for each in stored:
        name = each["name"]
        left = (again[name] - r[name]).square().sum() / (r[name] - p[name]).square().sum()
        assert each["variance"] == pytest.approx(1 - left.item(), abs=1e-5)
        if each["rank"]:
            truncated += 1
            shares = torch.linalg.svdvals(r[name] - p[name]).square().cumsum(0)
            needed = 1 + int((shares < 0.5 * shares[-1]).sum())
            assert needed <= each["rank"] <= needed + 1
    assert truncated >= 14


def test_a_merge_at_low_rank_is_that_of_its_bundle(tmp_path, models):
    _merge(models, tmp_path / "bundle", factors=True, low_rank=0.5, knowledge_scale=0.3)
    _from_bundle(tmp_path / "bundle", tmp_path / "again")
    artifact = _merge(models, tmp_path / "direct", low_rank=0.5, knowledge_scale=0.3)
    assert _weights(tmp_path / "again") == _weights(tmp_path / "direct")
    assert not list((tmp_path / "direct").glob("low-rank*"))
    assert "truncated SVD in 15 matrices" in (tmp_path / "direct/README.md").read_text()
    assert artifact.manifest.details["low_rank"]


def test_another_base_is_refused(tmp_path, models):
    _merge(models, tmp_path / "bundle", retriever="lora", factors=True)
    other = factories.tiny_decoder(tmp_path / "other", hidden_size=64, seed=5)
    with pytest.raises(WeightMismatchError, match=r"was made of .*fingerprint.*--pretrained"):
        _from_bundle(tmp_path / "bundle", tmp_path / "out", pretrained=str(other))
    moved = tmp_path / "moved"
    moved.symlink_to(models["pretrained"])
    _from_bundle(tmp_path / "bundle", tmp_path / "out", pretrained=str(moved))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"retriever": "r"}, "a bundle holds retriever and adapter"),
        ({"factors": True}, "factors and low_rank write what a bundle already is"),
        ({"low_rank": 0.5}, "factors and low_rank write what a bundle already is"),
        ({"bundle": None}, "pretrained, retriever, adapter required"),
        ({"bundle": None, "pretrained": "p", "adapter": "a"}, "retriever required"),
        ({"low_rank": 0}, "low_rank"),
        ({"low_rank": 1.1}, "low_rank"),
        ({"accept": "all"}, "accept"),
    ],
)
def test_options_that_do_not_go_together(changes, said):
    with pytest.raises(InputError, match=said):
        MergeConfig.parse({"bundle": "b", "output": "o"} | changes)


def test_a_spoilt_bundle_is_refused(tmp_path, models):
    _merge(models, tmp_path / "bundle", factors=True, low_rank=0.5)
    with pytest.raises(ModelError, match="is no bundle"):
        _from_bundle(models["full"], tmp_path / "out", pretrained=str(models["pretrained"]))
    content = json.loads((tmp_path / "bundle/bundle.json").read_text())
    (tmp_path / "bundle/bundle.json").write_text(json.dumps(content | {"format": 99}))
    with pytest.raises(ModelError, match="the format 99"):
        _from_bundle(tmp_path / "bundle", tmp_path / "out")
    (tmp_path / "bundle/bundle.json").write_text(json.dumps(content))
    (tmp_path / "bundle/readapter.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks readapter\.safetensors"):
        _from_bundle(tmp_path / "bundle", tmp_path / "out")


def test_a_vocabulary_that_grew_has_no_factors(tmp_path, models):
    grown = factories.full_retriever(tmp_path / "grown", models["pretrained"])
    factories.write_contract(grown)
    tensors = factories.read_tensors(grown)
    tensors["embed_tokens.weight"] = torch.cat([tensors["embed_tokens.weight"], torch.ones(2, 64)])
    factories.write_tensors(grown, tensors)
    for options in ({"factors": True}, {"low_rank": 0.5}):
        with pytest.raises(WeightMismatchError, match="factors hold no new words"):
            _merge({**models, "grown": grown}, tmp_path / "out", retriever="grown", accept="vocabulary", **options)
        assert not (tmp_path / "out").exists()


KILLED = """
import json, os, signal, sys
from readapt_ray.stages.merge import MergeConfig, merge
from readapt_ray.weights import low_rank
svd, count = low_rank.truncated_svd, []
def counting(*given, **options):
    count.append(1)
    if len(count) > 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return svd(*given, **options)
low_rank.truncated_svd = counting
merge(MergeConfig.parse(json.loads(sys.argv[1])))
"""


@pytest.mark.parametrize("factors", [True, False])
def test_a_killed_decomposition_goes_on(tmp_path, models, factors):
    _merge(models, tmp_path / "whole", low_rank=0.5, factors=factors)
    values = {"pretrained": str(models["pretrained"]), "retriever": str(models["full"])}
    values |= {"adapter": str(models["adapters"][0]), "output": str(tmp_path / "killed")}
    values |= {"low_rank": 0.5, "factors": factors}
    done = subprocess.run([sys.executable, "-c", KILLED, json.dumps(values)], check=False, env={**os.environ})
    assert done.returncode == -signal.SIGKILL
    assert read_manifest(str(tmp_path / "killed")) is None
    finished = list((tmp_path / "killed").glob("*.parts/*.json"))
    assert len(finished) >= 3
    merge(MergeConfig.parse(values))
    names = sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file())
    assert names == sorted(
        path.relative_to(tmp_path / "killed") for path in (tmp_path / "killed").rglob("*") if path.is_file()
    )
    for name in names:
        if name.suffix == ".safetensors":
            assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
