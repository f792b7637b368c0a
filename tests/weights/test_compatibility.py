import json
import shutil

import pytest

from readapt_ray.artifacts import produce
from readapt_ray.catalog.models import open_model
from readapt_ray.config import StageConfig
from readapt_ray.errors import ModelError, WeightMismatchError
from readapt_ray.weights.compatibility import check_bases, check_configs, check_tokenizers
from readapt_ray.weights.provenance import hashed_in_background
from tests import factories


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return factories.tiny_decoder(tmp_path_factory.mktemp("model") / "pre")


def _copy(folder, target, **changes):
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(config))
    return open_model(str(target))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_attention_heads": 8, "head_dim": 8}, "num_attention_heads: 4 before, 8 after"),
        ({"num_key_value_heads": 4}, "num_key_value_heads: 2 before, 4 after"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps: 1e-06 before, 1e-05 after"),
        ({"hidden_act": "gelu"}, "hidden_act: 'silu' before, 'gelu' after"),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, "rope_parameters: .*500000.0"),
        ({"model_type": "mistral"}, "model_type: 'llama' before, 'mistral' after"),
        ({"mlp_bias": True}, "mlp_bias: False before, True after"),
    ],
)
def test_what_changes_the_meaning_of_weights_is_refused(tmp_path, decoder, changes, said):
    with pytest.raises(WeightMismatchError, match=rf"{said}.*--accept config"):
        check_configs(open_model(str(decoder)), _copy(decoder, tmp_path / "ret", **changes))


def test_an_older_spelling_of_the_same_rope_is_the_same(tmp_path, decoder):
    other = _copy(decoder, tmp_path / "ret")
    config = json.loads((decoder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    (tmp_path / "ret/config.json").write_text(json.dumps(config | {"rope_theta": rope["rope_theta"]}))
    check_configs(open_model(str(decoder)), other)


def test_what_does_not_is_not(tmp_path, decoder):
    harmless = {
        "architectures": ["LlamaModel"],
        "use_cache": False,
        "dtype": "bfloat16",
        "pad_token_id": 2,
        "attention_dropout": 0.1,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "_name_or_path": "elsewhere",
    }
    check_configs(open_model(str(decoder)), _copy(decoder, tmp_path / "ret", **harmless))


def test_a_config_that_cannot_be_read_is_refused(tmp_path, decoder):
    with pytest.raises(ModelError, match=r"config\.json of .* cannot be read by transformers"):
        check_configs(open_model(str(decoder)), _copy(decoder, tmp_path / "ret", model_type="nosuch"))


def _with_tokenizer(folder, target, tokenizer):
    model = _copy(folder, target)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (target / name).unlink()
    tokenizer.save_pretrained(target)
    return model


def test_tokenizers_that_are_the_same(tmp_path, decoder):
    before = open_model(str(decoder))
    check_tokenizers(before, _copy(decoder, tmp_path / "same"), accept_vocabulary=False)
    left = _with_tokenizer(decoder, tmp_path / "left", factories.decoder_tokenizer(padding_side="left"))
    check_tokenizers(before, left, accept_vocabulary=False)


def test_a_model_without_a_tokenizer_has_nothing_to_compare(tmp_path, decoder, caplog):
    other = _copy(decoder, tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "bare" / name).unlink()
    with caplog.at_level("INFO", logger="readapt_ray"):
        check_tokenizers(open_model(str(decoder)), other, accept_vocabulary=False)
    assert "no tokenizer of its own" in caplog.text


def test_words_with_other_ids_are_refused(tmp_path, decoder):
    content = json.loads((decoder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    one, other = sorted(vocabulary, key=vocabulary.get)[100:102]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    model = _copy(decoder, tmp_path / "moved")
    (tmp_path / "moved/tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(WeightMismatchError, match=r"is 100 before, 101 after.*--accept tokenizer"):
        check_tokenizers(open_model(str(decoder)), model, accept_vocabulary=True)


def test_text_that_is_cut_otherwise_is_refused(tmp_path, decoder):
    content = json.loads((decoder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Lowercase"}
    model = _copy(decoder, tmp_path / "lower")
    (tmp_path / "lower/tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(WeightMismatchError, match=r"'Hello, world! 1,234' is cut into.*--accept tokenizer"):
        check_tokenizers(open_model(str(decoder)), model, accept_vocabulary=True)


def test_words_that_only_one_has_are_an_option(tmp_path, decoder):
    tokenizer = factories.decoder_tokenizer()
    tokenizer.add_tokens(["<query>", "<passage>"])
    model = _with_tokenizer(decoder, tmp_path / "more", tokenizer)
    with pytest.raises(WeightMismatchError, match=r"differ by 2 tokens: '<query>' \(384\) only after.*--accept vocab"):
        check_tokenizers(open_model(str(decoder)), model, accept_vocabulary=False)
    check_tokenizers(open_model(str(decoder)), model, accept_vocabulary=True)


class _Trained(StageConfig):
    """Stands for the options of train and finetune."""


def _trained_adapter(folder, base, fingerprint, *, stage="train"):
    def write(workspace):
        factories.dora_adapter(workspace.location.local_path, base)
        (workspace.location / "README.md").delete()  # PEFT's own; no stage of ours writes one beside an adapter

    option = {"train": "pretrained", "finetune": "model"}[stage]
    produce(stage, _Trained(output=str(folder)), inputs={"corpus": "89ab", option: fingerprint}, work=write)
    return open_model(str(folder))


def _merge_input(folder):
    with hashed_in_background([("pretrained", open_model(str(folder)))]) as wait:
        return wait()[0]


@pytest.mark.parametrize("stage", ["train", "finetune"])
def test_an_adapter_of_another_base_is_refused_by_fingerprint(tmp_path, decoder, stage):
    base = open_model(str(decoder))
    own = _trained_adapter(tmp_path / "own", decoder, base.fingerprint, stage=stage)
    other = _trained_adapter(tmp_path / "other", decoder, "0123", stage=stage)
    check_bases(_merge_input(decoder), [base, own], accept=False)
    with pytest.raises(WeightMismatchError, match=r"fingerprint 0123.*--accept base"):
        check_bases(_merge_input(decoder), [own, other], accept=False)
    check_bases(_merge_input(decoder), [own, other], accept=True)


def test_an_adapter_that_names_another_base_is_a_warning(tmp_path, decoder, caplog):
    adapter = factories.lora_adapter(tmp_path / "lora", decoder)
    with caplog.at_level("WARNING", logger="readapt_ray"):
        check_bases(_merge_input(decoder), [open_model(str(adapter))], accept=False)
        assert not caplog.text
        config = json.loads((adapter / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = "meta-llama/Llama-2-7b-chat-hf"
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        check_bases(_merge_input(decoder), [open_model(str(adapter))], accept=False)
    assert "trained on meta-llama/Llama-2-7b-chat-hf, and is applied to" in caplog.text
