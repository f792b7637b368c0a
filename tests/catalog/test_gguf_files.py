"""GGUF files, written with the package gguf, become folders once, with the weights of the model that they were made of."""

import importlib.metadata
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from readapt_ray.catalog import contracts, converted_weights, gguf_files, models
from readapt_ray.errors import InputError, ModelError
from tests import factories

gguf = pytest.importorskip("gguf")

TYPES = {"F32": 0, "F16": 1, "BF16": 30, "Q8_0": 8, "Q4_1": 3}
DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "Q8_0": torch.float16,
    "Q4_1": torch.float16,
}
TOLERANCES = {"F32": 0.0, "F16": 1e-3, "BF16": 1e-2, "Q8_0": 2e-2, "Q4_1": 0.2}
"""Of the largest weight of a tensor."""
NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("READAPT_CACHE", str(tmp_path / "cache"))
    if "gguf" not in {each.name for each in importlib.metadata.distributions()}:
        # The converter of other tests brings its own gguf, whose version transformers cannot tell.
        monkeypatch.setattr("transformers.modeling_gguf_pytorch_utils.is_gguf_available", lambda *_: True)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one layer whose widths are multiples of a block of quantised weights."""
    return factories.tiny_decoder(tmp_path_factory.mktemp("source") / "m", hidden_size=64, num_layers=2)


def write(
    file: Path, source: Path, *, kind: str = "F32", architecture: str = "llama", without: Iterable[str] = ()
) -> dict[str, torch.Tensor]:
    """Write a model of the tests as llama.cpp's converter does; return its weights."""
    config = json.loads((source / "config.json").read_text())
    tensors = {name: each.float() for name, each in factories.read_tensors(source).items()}
    writer = gguf.GGUFWriter(str(file), architecture)
    writer.add_name("tiny")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_vocab_size(config["vocab_size"])
    _write_tokenizer(writer, source)
    for name, tensor in tensors.items():
        if not any(each in name for each in without):
            _write_tensor(writer, name, tensor, config, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def _write_tokenizer(writer: Any, source: Path) -> None:
    content = json.loads((source / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    special = {each["content"] for each in content["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.__getitem__))
    writer.add_token_types([3 if word in special else 1 for word in sorted(vocabulary, key=vocabulary.__getitem__)])
    writer.add_token_merges([" ".join(each) for each in content["model"]["merges"]])
    for name in ("bos", "eos", "pad"):
        word = {"bos": "<s>", "eos": "</s>", "pad": "<pad>"}[name]
        getattr(writer, f"add_{name}_token_id")(vocabulary[word])


def _write_tensor(writer: Any, name: str, tensor: torch.Tensor, config: dict[str, Any], kind: str) -> None:
    path, part = name.removeprefix("model.").rsplit(".", 1)
    block = ""
    if path.startswith("layers."):
        _, number, path = path.split(".", 2)
        block = f"blk.{number}."
    rows = tensor.numpy()
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(NAMES[path])
    if heads:  # llama.cpp has the two halves of each head's rotation side by side
        rows = rows.reshape(config[heads], 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
    found = gguf.GGMLQuantizationType(TYPES[kind] if rows.ndim > 1 else 0)
    data = rows if found.name == "F32" else gguf.quantize(np.ascontiguousarray(rows), found)
    writer.add_tensor(f"{block}{NAMES[path]}.{part}", data, raw_dtype=found)


@pytest.mark.parametrize("kind", TYPES)
def test_a_file_becomes_a_folder_with_the_weights_that_it_holds(
    tmp_path: Path, cache: Path, source: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    file = tmp_path / "m" / f"tiny.{kind}.gguf"
    file.parent.mkdir()
    tensors = write(file, source, kind=kind)
    with caplog.at_level("INFO", logger="readapt_ray"):
        opened = models.open_model(str(file))
    assert f"tiny.{kind}.gguf (1 MB) is converted once to safetensors in {cache}" in caplog.text
    assert f"1 MB in {DTYPES[kind]}" in caplog.text
    assert (opened.name, opened.folder.parent) == (str(file), cache / "converted")
    read = factories.read_tensors(opened.folder)
    assert read.keys() == tensors.keys()
    for name, tensor in read.items():
        assert tensor.dtype == DTYPES[kind]
        largest = tensors[name].abs().max()
        assert (tensor.float() - tensors[name]).abs().max() <= TOLERANCES[kind] * largest, name
    text = "the lock of a thread, ünïcode 数据"
    assert (
        opened.tokenizer(text, add_special_tokens=False)["input_ids"]
        == (models.open_model(str(source)).tokenizer(text, add_special_tokens=False)["input_ids"])
    )
    assert models.open_model(str(file)).folder == opened.folder
    assert caplog.text.count("is converted once") == 1
    for with_weights in (True, False):
        assert models.open_model(str(file.parent), with_weights=with_weights).fingerprint == opened.fingerprint
    assert models.own_folder(str(file)) == file


def test_hidden_states_are_those_of_the_model(tmp_path: Path, source: Path) -> None:
    from readapt_ray.weights.loading import load_model

    write(tmp_path / "tiny.gguf", source)
    ids = torch.tensor([[5, 9, 11, 40, 7, 8]])
    found, due = (
        load_model(models.open_model(str(name)), dtype=torch.float32, device="cpu")(ids).last_hidden_state
        for name in (tmp_path / "tiny.gguf", source)
    )
    torch.testing.assert_close(found, due)


def test_a_folder_keeps_what_says_how_the_model_encodes(tmp_path: Path, source: Path) -> None:
    write(tmp_path / "tiny.gguf", source)
    plain = models.open_model(str(tmp_path))
    with pytest.raises(ModelError, match="no pooling or prompt settings found"):
        _ = plain.encoding
    contracts.show_contract(str(tmp_path), write=True)
    (tmp_path / "config.json").write_text("{}")  # what the file says counts
    for with_weights in (True, False):
        opened = models.open_model(str(tmp_path), with_weights=with_weights)
        assert opened.encoding.pooling == "last"
        assert opened.config["model_type"] == "llama" and opened.folder != plain.folder
    with pytest.raises(InputError, match=r"--write: .*tiny\.gguf' is neither a folder here nor a URI"):
        contracts.show_contract(str(tmp_path / "tiny.gguf"), write=True)


def _refused(cache: Path, name: Path, message: str, error: type[Exception] = ModelError) -> None:
    with pytest.raises(error, match=message):
        models.open_model(str(name))
    assert not list((cache / "converted").glob(f"*/{converted_weights.RECORD_NAME}"))
    assert not list((cache / "converted").glob("*/model*"))


def test_what_cannot_be_read_is_one_message_and_leaves_nothing(tmp_path: Path, cache: Path, source: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write(file, source, architecture="unheardof")
    _refused(cache, file, "tiny.gguf of .* cannot be read .*unheardof.* transformers does not know its architecture")
    write(file, source)
    whole = file.read_bytes()
    for length in (0, 3, 200, len(whole) // 2, len(whole) - 5000):
        file.write_bytes(whole[:length])
        _refused(cache, file, "tiny.gguf of .* cannot be read .*: it is cut short, or .* give the model as safetensors")
    file.write_bytes(b"PK" + whole[2:])
    _refused(cache, file, "cannot be read")
    write(file, source, kind="F32", without=["layers.1.mlp.up_proj"])
    _refused(cache, file, r"lacks 1 tensors of a LlamaForCausalLM, first 'model.layers.1.mlp.up_proj.weight'")
    marker = whole.index(b"blk.1.ffn_up.weight") + len(b"blk.1.ffn_up.weight") + 4 + 16
    file.write_bytes(whole[:marker] + (63).to_bytes(4, "little") + whole[marker + 4 :])  # no such kind of quantisation
    _refused(cache, file, "cannot be read")


def test_values_beyond_the_type_are_refused(tmp_path: Path, cache: Path, source: Path) -> None:
    wide = factories.tiny_decoder(tmp_path / "wide", hidden_size=64)
    tensors = factories.read_tensors(wide)
    factories.write_tensors(wide, tensors | {"model.norm.weight": torch.full((64,), 1e6)})
    write(tmp_path / "wide.gguf", wide, kind="Q8_0")
    _refused(cache, tmp_path / "wide.gguf", r"norm.weight in wide.gguf .* values beyond torch.float16")


def test_a_folder_of_several_files_names_them(tmp_path: Path, cache: Path, source: Path) -> None:
    write(tmp_path / "a.gguf", source)
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    _refused(cache, tmp_path, "has 2 GGUF files: a.gguf, b.gguf; give the path of one of them")
    assert models.open_model(str(tmp_path / "a.gguf")).config["model_type"] == "llama"
    parts = tmp_path / "parts"
    parts.mkdir()
    for number in (1, 2):
        (parts / f"m-0000{number}-of-00002.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"m-00001-of-00002\.gguf is one part of a model; join the parts first"):
        models.open_model(str(parts))


@pytest.mark.parametrize("missing", ["gguf", "accelerate"])
def test_without_what_reads_it_the_extra_is_named(
    tmp_path: Path, cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    write(tmp_path / "tiny.gguf", source)
    monkeypatch.setitem(sys.modules, missing, None)
    _refused(
        cache, tmp_path / "tiny.gguf", rf"import of {missing} halted.*pip install 'readapt-ray\[gguf\]'", InputError
    )


def test_a_gguf_that_transformers_does_not_take_names_the_extra(
    tmp_path: Path, cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "tiny.gguf", source)
    monkeypatch.setattr("transformers.modeling_gguf_pytorch_utils.is_gguf_available", lambda *_: False)
    _refused(cache, tmp_path / "tiny.gguf", r"gguf>=0.10.0.*pip install 'readapt-ray\[gguf\]'", InputError)


def test_a_file_that_changed_is_converted_again(tmp_path: Path, source: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write(file, source)
    first = models.open_model(str(file)).fingerprint
    write(file, factories.tiny_decoder(tmp_path / "other", seed=3, hidden_size=64))
    assert models.open_model(str(file)).fingerprint != first
    assert gguf_files.in_folder(tmp_path, "m") == ["tiny.gguf"]
