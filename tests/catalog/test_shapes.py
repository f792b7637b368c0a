"""Shapes of models from their configs."""

import re
from pathlib import Path

import pytest

from readapt_ray.catalog import retrievers
from readapt_ray.catalog.shapes import matching_layers, objective_of, refuse_quantized, shape_of
from readapt_ray.errors import ModelError

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [("roberta", 2), ("xlm-roberta", 2), ("camembert", 2), ("mpnet", 2), ("bert", 0), ("llama", 0), ("qwen3", 0)],
)
def test_texts_begin_behind_the_paddings_position_in_the_roberta_family(model_type: str, expected: int) -> None:
    config = {"model_type": model_type, "pad_token_id": 1, **SIZES}
    assert shape_of(config, "x").first_position == expected


def test_a_target_is_a_whole_part_of_a_name() -> None:
    names = ["layer.0.key", "layer.0.monkey", "layer.0.output.dense"]
    assert matching_layers(names, ("key", "output.dense")) == ["layer.0.key", "layer.0.output.dense"]
    with pytest.raises(ModelError, match=r"\['onkey'\] match no linear layer; the model has"):
        matching_layers(names, ("onkey",))


def test_a_head_names_the_objective() -> None:
    assert objective_of({"architectures": ["BertForPreTraining"]}) == "masked_lm"
    assert objective_of({"architectures": ["GPT2LMHeadModel"]}) == "causal_lm"
    assert objective_of({"architectures": ["BertModel"]}) is None


def test_a_quantized_model_is_not_trained() -> None:
    refuse_quantized({"quantization_config": None}, "x")
    with pytest.raises(ModelError, match=r"'x' is quantized \(quantization_config in its config.json: fp8\)"):
        refuse_quantized({"quantization_config": {"quant_method": "fp8"}}, "x")


def test_a_config_that_transformers_does_not_know_is_refused() -> None:
    with pytest.raises(ModelError, match="has no model_type"):
        shape_of({"hidden_size": 3}, "x")
    with pytest.raises(ModelError, match="transformers cannot make 'x'"):
        shape_of({"model_type": "no-such-type"}, "x")


@pytest.mark.parametrize("family", retrievers.TARGETS_BY_FAMILY)
def test_every_layer_of_a_known_family_has_its_targets(family: str) -> None:
    """ALBERT has one layer, which is used again and again."""
    sizes = {**SIZES, "pad_token_id": 0, "max_position_embeddings": 64}
    distil = {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4} if family == "distilbert" else {}
    made = shape_of({"model_type": family, **sizes, **distil}, family)
    names = matching_layers([name for name, _, _ in made.linears], retrievers.TARGETS_BY_FAMILY[family])
    in_layers = [len([name for name in names if f".{number}." in name]) for number in (0, 1)]
    assert in_layers[0] in (3, 5, 6)
    assert in_layers[1] in ((0,) if family == "albert" else in_layers[:1])
    assert sum(in_layers) == len(names) or family == "albert"


def test_the_table_of_families_names_those_whose_layers_are_known() -> None:
    page = (Path(retrievers.__file__).parent / "README.md").read_text()
    rows = re.findall(r"^\| (`\w.*?) \|.*\| (?:next token|masked tokens)", page, re.MULTILINE)
    told = [name for row in rows for name in re.findall(r"`([\w-]+)`", row)]
    assert len(told) == 20
    assert set(told) <= retrievers.TARGETS_BY_FAMILY.keys()
