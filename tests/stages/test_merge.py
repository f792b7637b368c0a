import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from readapt_ray.artifacts import read_manifest
from readapt_ray.catalog.models import open_model
from readapt_ray.errors import ArtifactConflictError, InputError, ModelError, WeightMismatchError
from readapt_ray.stages.merge import MergeConfig, merge
from readapt_ray.weights import export
from readapt_ray.weights.reference import readapted_weight
from readapt_ray.weights.weight_files import Checkpoint
from tests import factories
from tests.weights import oracles

TEXTS = {
    "query": ["array shape of the buffer", "", "Ünïcode 数据"],
    "document": ["threads lock the queue of a worker", "files path " * 60],
}
PREFIXES = {"query": "query: ", "document": "passage: "}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """For each kind: pretrained, a full and a LoRA retriever with their contracts, a DoRA adapter."""
    root = tmp_path_factory.mktemp("models")
    made = {}
    for kind, make, pooling in (
        ("decoder", factories.tiny_decoder, "last"),
        ("encoder", factories.tiny_encoder, "mean"),
    ):
        pretrained = make(root / kind / "pre", shards=2)
        full = factories.full_retriever(root / kind / "full", pretrained)
        lora = factories.lora_adapter(root / kind / "lora", pretrained, headless=True)
        for folder in (full, lora):
            factories.write_contract(folder, pooling=pooling)
        adapter = factories.dora_adapter(root / kind / "ad", pretrained)
        made[kind] = {"pretrained": pretrained, "full": full, "lora": lora, "adapter": adapter}
    return made


def _config(models, output, *, retriever="full", **options):
    given = {"pretrained": models["pretrained"], "retriever": models[retriever], "adapter": models["adapter"]}
    values = {name: str(value) for name, value in given.items()} | {"output": str(output)} | options
    return MergeConfig.parse(values)


def _weights(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
@pytest.mark.parametrize("retriever", ["full", "lora"])
def test_laws(tmp_path, models, kind, retriever):
    trio = models[kind]
    p, t = (oracles.as_float64(trio["pretrained"]), oracles.merged_by_peft(trio["pretrained"], trio["adapter"]))
    if retriever == "full":
        r = oracles.as_float64(trio["full"])
    else:
        r = oracles.merged_by_peft(trio["pretrained"], trio["lora"], headless=True)
    for a, k in ((0, 0), (1, 0), (1, 0.5), (0.8, 0.3)):
        output = tmp_path / f"{a}-{k}"
        artifact = merge(_config(trio, output, retriever=retriever, readapter_scale=a, knowledge_scale=k))
        written = factories.read_tensors(output)
        assert written.keys() == p.keys()
        assert artifact.manifest.counts["num_tensors"] == len(p)
        for name, tensor in written.items():
            wanted = p[name] + a * (r[name] - p[name]) + k * (t[name] - p[name])
            if (a, k) == (0, 0) or ((a, k) == (1, 0) and retriever == "full"):
                assert torch.equal(tensor, wanted.float())
            assert (tensor.double() - wanted).abs().max() <= 1e-6 * wanted.abs().max()


@pytest.fixture(scope="module")
def outside(models, tmp_path_factory):
    """Merged folders, and what plain transformers and sentence-transformers made of them in a process of their own."""
    root = tmp_path_factory.mktemp("outside")
    folders = {}
    for kind in models:
        for retriever in ("full", "lora"):
            folder = root / f"{kind}-{retriever}"
            merge(_config(models[kind], folder, retriever=retriever, max_shard_bytes=40_000))
            folders[kind, retriever] = folder
    asked, answer = root / "asked.json", root / "answer.json"
    asked.write_text(json.dumps({"folders": [str(each) for each in folders.values()], "texts": TEXTS}))
    script = str(Path(__file__).with_name("outside_reader.py"))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    subprocess.run(
        [sys.executable, "-P", script, str(asked), str(answer)], cwd=root, env=environment, check=True, timeout=600
    )
    read = json.loads(answer.read_text())
    return {key: (folder, read[str(folder)]) for key, folder in folders.items()}


@pytest.mark.parametrize("retriever", ["full", "lora"])
@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_plain_libraries_read_it_alike(outside, kind, retriever):
    folder, read = outside[kind, retriever]
    assert read["max_seq_length"] == 64
    for part, texts in TEXTS.items():
        seen = read[part]
        assert seen["class"] == {"decoder": "LlamaModel", "encoder": "BertModel"}[kind]
        assert seen["left"] == []
        first, last = {"decoder": (1, 2), "encoder": (2, 3)}[kind]
        raw = find_tokenizer(kind)([PREFIXES[part] + text for text in texts], add_special_tokens=False)["input_ids"]
        for ids, plain in zip(seen["ids"], raw, strict=True):
            assert ids == [first, *plain[:62], last]
        ours, theirs = np.array(seen["vectors"]), np.array(seen["sentence_transformers"])
        assert np.abs(np.linalg.norm(theirs, axis=1) - 1).max() < 1e-5
        assert np.abs(ours - theirs).max() < 1e-5
    assert len(list(folder.glob("*.safetensors"))) > 1


def find_tokenizer(kind):
    return factories.decoder_tokenizer() if kind == "decoder" else factories.encoder_tokenizer()


def test_the_folder_says_what_it_is(models, outside):
    folder, _ = outside["decoder", "full"]
    manifest = read_manifest(str(folder))
    assert manifest is not None
    assert manifest.stage == "merge"
    assert manifest.details["left_out"] == []
    assert json.loads((folder / "readapt.json").read_text())["fingerprint"] == manifest.fingerprint
    assert open_model(str(folder)).fingerprint == manifest.fingerprint
    card = (folder / "README.md").read_text()
    for part in (*manifest.inputs.values(), str(models["decoder"]["full"]), "readapter 1.0, knowledge 0.5"):
        assert part in card
    assert not list(folder.glob("generation_config.json"))


def test_its_output_is_a_retriever_again(tmp_path, models, outside):
    folder, _ = outside["decoder", "full"]
    again = merge(_config({**models["decoder"], "full": folder}, tmp_path / "out", knowledge_scale=0.0))
    assert again.manifest.details["encoding"] == json.loads((folder / "readapt.json").read_text())["encoding"]
    for name, tensor in factories.read_tensors(tmp_path / "out").items():
        assert torch.equal(tensor, factories.read_tensors(folder)[name])


def test_twice_does_nothing_and_other_scales_refuse(tmp_path, models):
    config = _config(models["decoder"], tmp_path / "out")
    first = merge(config)
    before = (tmp_path / "out/model.safetensors").stat().st_mtime_ns
    assert merge(config).manifest == first.manifest
    assert (tmp_path / "out/model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ArtifactConflictError, match=r"knowledge_scale: 0\.5 there, 0\.6 now"):
        merge(_config(models["decoder"], tmp_path / "out", knowledge_scale=0.6))
    replaced = merge(_config(models["decoder"], tmp_path / "out", knowledge_scale=0.6, overwrite=True))
    assert replaced.fingerprint != first.fingerprint


def test_a_merge_without_its_manifest_and_some_shards_goes_on(tmp_path, models):
    options = {"max_shard_bytes": 20_000}
    merge(_config(models["decoder"], tmp_path / "whole", **options))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("readapt_ray.weights.export._cast", _interrupted_at("norm.weight"))
        with pytest.raises(KeyboardInterrupt):
            merge(_config(models["decoder"], tmp_path / "cut", **options))
    assert read_manifest(str(tmp_path / "cut")) is None
    lost, *kept = sorted((tmp_path / "cut").glob("model-*.safetensors"))
    assert kept
    lost.unlink()
    (tmp_path / "cut/.tmp-0123456789ab-model-00002-of-00007.safetensors").write_bytes(b"half")
    written = [path.stat().st_mtime_ns for path in kept]
    merge(_config(models["decoder"], tmp_path / "cut", **options))
    assert [path.stat().st_mtime_ns for path in kept] == written
    assert not list((tmp_path / "cut").glob(".tmp-*"))
    _same_content(tmp_path / "whole", tmp_path / "cut")


def _interrupted_at(wanted):
    cast = export._cast

    def stop(name, *given):
        if name == wanted:
            raise KeyboardInterrupt
        return cast(name, *given)

    return stop


def _same_content(one, other):
    first, second = _weights(one), _weights(other)
    assert first.keys() == second.keys()
    for name in first:
        if name != "manifest.json":
            assert first[name] == second[name], name


SLOW_MERGE = """
import json, pathlib, sys, time
from readapt_ray.stages.merge import MergeConfig, merge
from readapt_ray.weights import export
from readapt_ray.weights.reference import readapted_weight
cast = export._cast
config = MergeConfig.parse(json.loads(sys.argv[1]))
def slow(*given):
    time.sleep(0.1)
    if len(list(pathlib.Path(config.output).glob("model-*.safetensors"))) > 2: time.sleep(3600)
    return cast(*given)
export._cast = slow
merge(config)
"""


def test_a_merge_that_was_killed_gives_the_same_bytes(tmp_path, models):
    options = {"max_shard_bytes": 20_000}
    merge(_config(models["decoder"], tmp_path / "whole", **options))
    config = _config(models["decoder"], tmp_path / "killed", **options)
    process = subprocess.Popen([sys.executable, "-c", SLOW_MERGE, json.dumps(config.settings())])
    while len(list((tmp_path / "killed").glob("model-*.safetensors"))) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("model-*.safetensors")}
    assert 2 <= len(there) < len(list((tmp_path / "whole").glob("model-*.safetensors")))
    assert read_manifest(str(tmp_path / "killed")) is None
    merge(config)
    assert {path: path.stat().st_mtime_ns for path in there} == there
    assert not list((tmp_path / "killed").glob(".tmp-*"))
    _same_content(tmp_path / "whole", tmp_path / "killed")


def test_types_of_the_output(tmp_path, models):
    trio = models["decoder"]
    exact = factories.read_tensors(Path(merge(_config(trio, tmp_path / "f32")).uri))
    for dtype in ("float16", "bfloat16"):
        merge(_config(trio, tmp_path / dtype, dtype=dtype))
        assert json.loads((tmp_path / dtype / "config.json").read_text())["dtype"] == dtype
        for name, tensor in factories.read_tensors(tmp_path / dtype).items():
            assert torch.equal(tensor, exact[name].to(getattr(torch, dtype)))


def test_the_head_of_an_untied_model_is_left_out_and_said(tmp_path):
    pretrained = factories.tiny_decoder(tmp_path / "pre", tie_word_embeddings=False, dtype="bfloat16")
    retriever = factories.write_contract(
        factories.full_retriever(tmp_path / "ret", pretrained, headless=False, dtype="float16")
    )
    adapter = factories.dora_adapter(tmp_path / "ad", pretrained)
    values = {"pretrained": str(pretrained), "retriever": str(retriever), "adapter": str(adapter)}
    artifact = merge(MergeConfig.parse(values | {"output": str(tmp_path / "out")}))
    assert len(artifact.manifest.details["left_out"]) == 2
    assert artifact.manifest.details["dtype"] == "float16"
    assert Checkpoint(tmp_path / "out").heads == ()
    assert "lm_head.weight" in (tmp_path / "out/README.md").read_text()


def test_several_adapters(tmp_path, models):
    trio = models["decoder"]
    second = factories.dora_adapter(tmp_path / "second", trio["pretrained"], seed=9)
    both = f"{trio['adapter']},{second}"
    merge(_config(trio, tmp_path / "out", adapter=both, knowledge_scale="0.5,0.25"))
    p, r = oracles.as_float64(trio["pretrained"]), oracles.as_float64(trio["full"])
    tuned = [oracles.merged_by_peft(trio["pretrained"], folder) for folder in (trio["adapter"], second)]
    for name, tensor in factories.read_tensors(tmp_path / "out").items():
        wanted = r[name] + 0.5 * (tuned[0][name] - p[name]) + 0.25 * (tuned[1][name] - p[name])
        assert (tensor.double() - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    with pytest.raises(InputError, match="3 knowledge scales for 2 adapters"):
        merge(_config(trio, tmp_path / "no", adapter=both, knowledge_scale=[1, 2, 3]))


def test_layers_with_scales_of_their_own(tmp_path, models):
    trio = models["decoder"]
    p, r = oracles.as_float64(trio["pretrained"]), oracles.as_float64(trio["full"])
    t = oracles.merged_by_peft(trio["pretrained"], trio["adapter"])
    made = merge(_config(trio, tmp_path / "out", layer_scales="1=0.2,0=0.8"))
    for name, tensor in factories.read_tensors(tmp_path / "out").items():
        factor = 0.8 if ".0." in name else 0.2 if ".1." in name else 1.0
        wanted = readapted_weight(
            name, p[name], r[name], t[name] - p[name], readapter_scale=1, knowledge_scale=0.5 * factor
        )
        assert (tensor.double() - wanted).abs().max() <= 1e-6 * wanted.abs().max(), name
    assert made.manifest.details["layer_scales"] == ["0=0.8", "1=0.2"]
    card = (tmp_path / "out/README.md").read_text()
    assert "knowledge 0.5, times 0.8 in layers 0, times 0.2 in layers 1" in card
    assert "--layer-scales 0=0.8,1=0.2" in card
    assert merge(_config(trio, tmp_path / "out", layer_scales={"0": 0.8, "1": 0.2})).fingerprint == made.fingerprint
    with pytest.raises(ArtifactConflictError, match="layer_scales"):
        merge(_config(trio, tmp_path / "out"))
    with pytest.raises(InputError, match=r"layer_scales = '0-2=0.5': the model has the layers 0 to 1"):
        merge(_config(trio, tmp_path / "beyond", layer_scales="0-2=0.5"))
    assert not (tmp_path / "beyond").exists()


def test_an_encoding_from_a_file(tmp_path, models):
    trio = models["decoder"]
    bare = factories.full_retriever(tmp_path / "ret", trio["pretrained"])
    with pytest.raises(ModelError, match="--encoding"):
        merge(_config({**trio, "full": bare}, tmp_path / "out"))
    file = tmp_path / "encoding.json"
    file.write_text(json.dumps({"pooling": "mean", "add_bos": True, "add_eos": False, "query_template": "q {text}"}))
    merge(_config({**trio, "full": bare}, tmp_path / "out", encoding=str(file)))
    assert json.loads((tmp_path / "out/readapt.json").read_text())["encoding"]["pooling"] == "mean"
    file.write_text(json.dumps({"pooling": "last", "add_bos": True, "add_eos": False}))
    with pytest.raises(ArtifactConflictError):
        merge(_config({**trio, "full": bare}, tmp_path / "out", encoding=str(file)))
    file.write_text("[]")
    with pytest.raises(InputError, match="must be a JSON object"):
        merge(_config({**trio, "full": bare}, tmp_path / "other", encoding=str(file)))
    with pytest.raises(InputError, match="no file"):
        merge(_config({**trio, "full": bare}, tmp_path / "other", encoding=str(tmp_path / "none.json")))


def _refused(tmp_path, error, said, config):
    with pytest.raises(error, match=said):
        merge(config)
    assert not (tmp_path / "out").exists()


def test_bad_models_are_refused_before_anything_is_written(tmp_path, models):
    trio, output = models["decoder"], tmp_path / "out"
    wide = factories.tiny_decoder(tmp_path / "wide", hidden_size=64)
    other = factories.dora_adapter(tmp_path / "other", wide)
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    for path in trio["adapter"].iterdir():
        (unfinished / path.name).write_bytes(path.read_bytes())
    (unfinished / "building.json").write_text("{}")
    for error, said, changes in (
        (ModelError, "no model '/no/such'", {"pretrained": "/no/such"}),
        (ModelError, "is an adapter", {"pretrained": str(trio["adapter"])}),
        (WeightMismatchError, "was not made from", {"adapter": str(wide)}),
        (ModelError, "is not a model", {"adapter": str(tmp_path)}),
        (ModelError, "unfinished", {"adapter": str(unfinished)}),
        (WeightMismatchError, "does not fit the model", {"adapter": str(other)}),
        (WeightMismatchError, "was not made from", {"retriever": str(wide)}),
        (WeightMismatchError, "does not fit the model", {"adapter": str(models["encoder"]["adapter"])}),
    ):
        _refused(tmp_path, error, said, _config(trio, output).model_copy(update=changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"knowledge_scale": "nan"}, "knowledge_scale.*finite number such as 0.5"),
        ({"knowledge_scale": "half"}, "knowledge_scale.*finite number such as 0.5"),
        ({"knowledge_scale": [0.5, "inf"]}, "knowledge_scale"),
        ({"knowledge_scale": True}, "knowledge_scale"),
        ({"knowledge_scale": []}, "knowledge_scale"),
        ({"readapter_scale": float("inf")}, "readapter_scale.*finite"),
        ({"readapter_scale": "much"}, "readapter_scale.*number"),
        ({"adapter": ""}, "adapter"),
        ({"adapter": "a,,b"}, "adapter"),
        ({"adapter": 3}, "adapter"),
        ({"dtype": "int8"}, "dtype.*bfloat16"),
        ({"max_shard_bytes": 0}, "max_shard_bytes"),
        ({"scale": 1}, "unknown option 'scale'"),
    ],
)
def test_bad_options_are_refused_by_name(tmp_path, models, changes, said):
    with pytest.raises(InputError, match=said):
        _config(models["decoder"], tmp_path / "out", **changes)


def test_options_as_text():
    given = {"pretrained": "p", "retriever": "r", "output": "o", "adapter": " a , b ", "knowledge_scale": "0.5"}
    config = MergeConfig.parse(given)
    assert config.adapters == ("a", "b")
    assert config.knowledge_scale == 0.5
    assert MergeConfig.parse({**given, "adapter": ["a"]}).adapters == ("a",)
    assert MergeConfig(pretrained="p", retriever="r", adapter="a", output="o").knowledge_scale == 0.5


def test_nan_in_a_weight_is_a_refusal_that_names_it(tmp_path, models):
    trio = models["decoder"]
    pretrained = factories.tiny_decoder(tmp_path / "pre")
    tensors = factories.read_tensors(pretrained)
    tensors["model.layers.1.mlp.gate_proj.weight"][0, 0] = float("nan")
    factories.write_tensors(pretrained, tensors)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.gate_proj\.weight"):
        merge(_config(trio, tmp_path / "out", pretrained=str(pretrained)))
    assert read_manifest(str(tmp_path / "out")) is None


def test_onto_another_filesystem(tmp_path, models):
    merge(_config(models["decoder"], tmp_path / "plain"))
    merge(_config(models["decoder"], f"file://{tmp_path}/uri"))
    _same_content(tmp_path / "plain", tmp_path / "uri")
