import json
import math
import shutil

import pytest
import torch
import transformers
from safetensors.torch import save_file

from readapt_ray.errors import ModelError
from readapt_ray.weights.weight_files import Checkpoint, is_finite, natural_order, read_header
from tests import factories


@pytest.mark.parametrize("headless", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("make", [factories.tiny_decoder, factories.tiny_encoder])
def test_names_are_those_of_automodel_whatever_the_files_say(tmp_path, make, shards, headless):
    folder = make(tmp_path, shards=shards, headless=headless, dtype="bfloat16")
    checkpoint = Checkpoint(folder)
    wanted = transformers.AutoModel.from_pretrained(folder).state_dict()
    assert set(checkpoint.names()) == {name for name in wanted if not name.startswith("pooler.")}
    for name in checkpoint.names():
        assert checkpoint.shape(name) == tuple(wanted[name].shape)
        assert checkpoint.dtype(name) == torch.bfloat16
        assert torch.equal(checkpoint.read(name), wanted[name])
    assert bool(checkpoint.heads) == (not headless and make is factories.tiny_encoder)


def test_untied_head_is_left_aside_and_named(tmp_path):
    checkpoint = Checkpoint(factories.tiny_decoder(tmp_path, tie_word_embeddings=False))
    assert checkpoint.heads == ("lm_head.weight",)
    assert "lm_head.weight" not in checkpoint


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_rows_of_a_tensor(tmp_path, dtype):
    tensor = torch.randn(7, 3).to(getattr(torch, dtype))
    save_file({"a": tensor, "scalar": torch.tensor(2.5)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    assert torch.equal(checkpoint.read("a", 2, 5), tensor[2:5])
    assert torch.equal(checkpoint.read("a"), tensor)
    assert checkpoint.read("scalar").item() == 2.5
    save_file({"empty": torch.zeros(0, 3)}, tmp_path / "empty.safetensors")
    assert read_header(tmp_path / "empty.safetensors")["empty"].read().shape == (0, 3)


def test_a_tensor_that_is_read_is_a_copy(tmp_path):
    save_file({"a": torch.ones(4)}, tmp_path / "model.safetensors")
    Checkpoint(tmp_path).read("a").zero_()
    assert Checkpoint(tmp_path).read("a").sum() == 4


def test_old_norm_names_and_stored_buffers(tmp_path):
    names = ["bert.embeddings.LayerNorm.gamma", "bert.embeddings.LayerNorm.beta", "bert.embeddings.position_ids"]
    save_file({name: torch.ones(2) for name in names}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.names() == ["embeddings.LayerNorm.bias", "embeddings.LayerNorm.weight"]
    assert checkpoint.buffers == ("bert.embeddings.position_ids",)
    assert checkpoint.weight_named("bert.embeddings.LayerNorm.gamma") == "embeddings.LayerNorm.weight"
    assert checkpoint.weight_named("nothing") is None


def test_a_headless_part_that_looks_like_a_prefix_stays(tmp_path):
    names = ["embeddings.word_embeddings.weight", "transformer.layer.0.ffn.lin1.weight"]
    save_file({name: torch.ones(2) for name in names}, tmp_path / "model.safetensors")
    assert Checkpoint(tmp_path).names() == names


def test_numbers_in_names_are_numbers():
    assert sorted(["layers.10.a", "layers.9.a", "layers.9.A"], key=natural_order) == [
        "layers.9.A",
        "layers.9.a",
        "layers.10.a",
    ]


def _index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _missing_shard(folder):
    _index(folder, {"a": "model-00001-of-00002.safetensors"})


def _climbing_shard(folder):
    _index(folder, {"a": "../model.safetensors"})


def _broken_index(folder):
    (folder / "model.safetensors.index.json").write_text("[1]")


def _lost_tensor(folder):
    save_file({"a": torch.ones(1)}, folder / "model-00001-of-00001.safetensors")
    _index(folder, dict.fromkeys(("a", "b", "c"), "model-00001-of-00001.safetensors"))


def _cut_short(folder):
    save_file({"a": torch.ones(100)}, folder / "model.safetensors")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-8])


def _empty(folder):
    (folder / "model.safetensors").write_bytes(b"")


def _not_safetensors(folder):
    (folder / "model.safetensors").write_bytes(b"\x05\0\0\0\0\0\0\0hello")


def _twice(folder):
    tensors = {"LayerNorm.gamma": torch.ones(1), "LayerNorm.weight": torch.ones(1)}
    save_file(tensors, folder / "model.safetensors")


def _only_a_head(folder):
    save_file({"lm_head.weight": torch.ones(1)}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: None, "has no weights"),
        (_missing_shard, "lacks 1 of 1"),
        (_climbing_shard, "lacks 1 of 1"),
        (_broken_index, "not an index"),
        (_lost_tensor, "lacks 2 tensors of its index, first 'b'"),
        (_cut_short, "cut short"),
        (_empty, "cut short"),
        (_not_safetensors, "header"),
        (_twice, "twice"),
        (_only_a_head, "no weights"),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path, spoil, said):
    spoil(tmp_path)
    with pytest.raises(ModelError, match=said):
        Checkpoint(tmp_path, name="mine")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_bad_number_anywhere_is_seen(dtype, value):
    for position in (0, 1, 517, 998, 999):
        tensor = torch.randn(999 + 1).to(dtype)
        assert is_finite(tensor)
        tensor[position] = value
        assert not is_finite(tensor)
    assert is_finite(torch.full((8,), torch.finfo(dtype).max, dtype=dtype))
    assert is_finite(torch.zeros(0, 3))


@pytest.mark.parametrize("stop", [385, 1000])
def test_no_row_is_read_behind_the_last(tmp_path, stop):
    checkpoint = Checkpoint(factories.tiny_decoder(tmp_path))
    with pytest.raises(IndexError, match=rf"rows 380 to {stop} of 'model\.embed_tokens\.weight', which has 384"):
        checkpoint.read("embed_tokens.weight", 380, stop)


def test_weights_that_are_there_twice_are_refused(tmp_path):
    folder = factories.tiny_decoder(tmp_path, shards=2)
    shutil.copyfile(folder / "model-00001-of-00002.safetensors", folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"twice, in model\.safetensors and in the files of model\.safetensors\.index"):
        Checkpoint(folder)
    tensors = factories.read_tensors(factories.tiny_decoder(tmp_path / "one"))
    _index(tmp_path / "one", dict.fromkeys(tensors, "model.safetensors"))
    assert Checkpoint(tmp_path / "one").names() == Checkpoint(factories.tiny_decoder(tmp_path / "same")).names()
