"""Shapes of models from their configs."""

import pytest

from readapt_ray.catalog.shapes import matching_layers, objective_of, shape_of
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


def test_a_config_that_transformers_does_not_know_is_refused() -> None:
    with pytest.raises(ModelError, match="has no model_type"):
        shape_of({"hidden_size": 3}, "x")
    with pytest.raises(ModelError, match="transformers cannot make 'x'"):
        shape_of({"model_type": "no-such-type"}, "x")
