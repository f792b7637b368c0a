import json
import math

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from readapt_ray.errors import ModelError, WeightMismatchError
from readapt_ray.weights.adapter import Adapter
from readapt_ray.weights.deltas import Factors
from readapt_ray.weights.weight_files import Checkpoint
from tests import factories
from tests.weights import oracles

MAKERS = {"decoder": factories.tiny_decoder, "encoder": factories.tiny_encoder}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {kind: make(root / kind) for kind, make in MAKERS.items()}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("headless", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True},
        {"use_dora": True, "use_rslora": True},
        {"use_dora": True, "rank_pattern": {r".*0.*": 2}, "alpha_pattern": {r".*1.*(value|v_proj)": 3}},
        {"rank_pattern": {"q_proj|query": 1}, "alpha_pattern": {"k_proj|key": 5}},
    ],
    ids=["lora", "dora", "rslora", "dora-patterns", "lora-patterns"],
)
def test_updates_are_those_of_pefts_merge(tmp_path, bases, kind, headless, options):
    base = bases[kind]
    folder = factories.lora_adapter(tmp_path / "adapter", base, headless=headless, **options)
    checkpoint = Checkpoint(base)
    adapter = Adapter(folder, checkpoint)
    merged = oracles.merged_by_peft(base, folder, headless=headless)
    before = oracles.as_float64(base)
    assert len(adapter.names()) == (10 if kind == "decoder" else 12)
    for name in checkpoint.names():
        update = adapter.factors(name).update(before[name]) if name in adapter else torch.zeros_like(before[name])
        assert (before[name] + update - merged[name]).abs().max() < 1e-12
        assert name not in adapter or update.abs().max() > 1e-2


def test_a_slice_of_rows_has_the_update_of_its_rows(bases, tmp_path):
    adapter = Adapter(factories.dora_adapter(tmp_path, bases["decoder"]), Checkpoint(bases["decoder"]))
    name = adapter.names()[0]
    weight = oracles.as_float64(bases["decoder"])[name]
    whole = adapter.factors(name).update(weight)
    assert torch.allclose(adapter.factors(name).update(weight[5:9], 5), whole[5:9], rtol=0, atol=1e-14)


def test_by_hand():
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    factors = Factors(
        A_rI=torch.tensor([[0.0, 1.0]]),
        B_Or=torch.tensor([[-2.0], [0.0]]),
        magnitude=torch.tensor([10.0, 7.0]),
        scaling=2.0,
    )
    # W + 2 B A = [3, 0]: norm 3, so d = 10 / 3 and the tuned row is [10, 0]. A zero row stays zero.
    assert torch.allclose(weight + factors.update(weight), torch.tensor([[10.0, 0.0], [0.0, 0.0]]))


def test_rank_stabilised_scaling(bases, tmp_path):
    folder = factories.lora_adapter(tmp_path, bases["decoder"], rank=4, alpha=6, use_rslora=True)
    adapter = Adapter(folder, Checkpoint(bases["decoder"]))
    assert adapter.factors(adapter.names()[0]).scaling == pytest.approx(6 / math.sqrt(4))


def test_a_config_without_alpha_has_the_alpha_of_peft(bases, tmp_path):
    folder = factories.lora_adapter(tmp_path, bases["decoder"], rank=4, alpha=6)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    del config["lora_alpha"]
    file.write_text(json.dumps(config))
    adapter = Adapter(folder, Checkpoint(bases["decoder"]))
    assert adapter.factors(adapter.names()[0]).scaling == LoraConfig().lora_alpha / 4


def test_modules_of_the_head_are_named_and_take_no_part(tmp_path):
    base = factories.tiny_decoder(tmp_path / "base", tie_word_embeddings=False)
    folder = factories.lora_adapter(tmp_path / "adapter", base, targets=["q_proj", "lm_head"])
    adapter = Adapter(folder, Checkpoint(base))
    assert adapter.heads == ("lm_head",)
    assert len(adapter.names()) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"targets": ["embed_tokens"]}, "neither LoRA nor DoRA"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_is_more_than_factors_is_refused(tmp_path, bases, options, said):
    folder = factories.lora_adapter(tmp_path, bases["decoder"], **options)
    with pytest.raises(ModelError, match=said):
        Adapter(folder, Checkpoint(bases["decoder"]), name="mine")


def _edit_config(**changes):
    def spoil(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def _edit_tensors(change):
    def spoil(folder):
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return spoil


FIRST = "base_model.model.model.layers.0.mlp.down_proj."


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_edit_config(fan_in_fan_out=True), "fan_in_fan_out"),
        (_edit_config(peft_type="IA3"), "IA3"),
        (_edit_config(an_option_of_tomorrow={"x": 1}), "an_option_of_tomorrow"),
        (_edit_config(use_dora=False), "A, B are expected"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "not JSON"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "not an adapter"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
        (_edit_tensors(lambda tensors: tensors.pop(FIRST + "lora_magnitude_vector")), "A, B, magnitude are expected"),
        (_edit_tensors(lambda tensors: tensors.update(extra=torch.ones(1))), "extra"),
        (_edit_tensors(dict.clear), "changes no weight"),
    ],
)
def test_a_spoilt_adapter_is_refused(tmp_path, bases, spoil, said):
    folder = factories.dora_adapter(tmp_path, bases["decoder"])
    spoil(folder)
    with pytest.raises(ModelError, match=said):
        Adapter(folder, Checkpoint(bases["decoder"]), name="mine")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_is_refused_by_name(tmp_path, bases, value):
    folder = factories.dora_adapter(tmp_path, bases["decoder"])
    _edit_tensors(lambda tensors: tensors[FIRST + "lora_B.weight"].view(-1)[3].fill_(value))(folder)
    adapter = Adapter(folder, Checkpoint(bases["decoder"]))
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.down_proj\.lora_B\.weight"):
        adapter.factors("layers.0.mlp.down_proj.weight")


def test_an_adapter_of_a_wider_model_is_refused(tmp_path, bases):
    wide = factories.tiny_decoder(tmp_path / "wide", hidden_size=64)
    folder = factories.dora_adapter(tmp_path / "adapter", wide)
    with pytest.raises(
        WeightMismatchError, match=r"does not fit the model 'base'.*made for a weight \[64, 128\].*wide"
    ):
        Adapter(folder, Checkpoint(bases["decoder"], name="base"), name="mine")


def test_an_adapter_of_another_kind_of_model_is_refused(tmp_path, bases):
    folder = factories.dora_adapter(tmp_path, bases["encoder"])
    with pytest.raises(WeightMismatchError, match=r"no such weight.*2 more.*q_proj"):
        Adapter(folder, Checkpoint(bases["decoder"]))


def test_an_adapter_of_a_deeper_model_is_refused(tmp_path, bases):
    deep = factories.tiny_decoder(tmp_path / "deep", num_layers=3)
    folder = factories.dora_adapter(tmp_path / "adapter", deep)
    with pytest.raises(WeightMismatchError, match=r"layers\.2.*no such weight"):
        Adapter(folder, Checkpoint(bases["decoder"]))


@pytest.mark.parametrize("is_flat", [True, False])
def test_what_zero_3_saved_without_gathering_is_named(tmp_path, bases, is_flat):
    """Its tensors have the shape [0], or [0, n] and [n, 0]."""
    folder = factories.lora_adapter(tmp_path / "a", bases["decoder"])
    file = folder / "adapter_model.safetensors"
    empty = {
        name: torch.empty(0) if is_flat else each[:0] if "lora_A" in name else each[:, :0]
        for name, each in load_file(file).items()
    }
    save_file(empty, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"20 empty tensors, such as .*\[.*0.*saved under ZeRO-3 without gathering"):
        Adapter(folder, Checkpoint(bases["decoder"]))
    base = factories.tiny_decoder(tmp_path / "full")
    factories.write_tensors(base, {name: each[:0] for name, each in factories.read_tensors(base).items()})
    with pytest.raises(ModelError, match=r"empty tensors.*ZeRO-3"):
        Checkpoint(base)
