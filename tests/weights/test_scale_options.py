"""Scales as options: ranges of layers, and which tensors they are of."""

import pytest

from readapt_ray.errors import InputError
from readapt_ray.stages.merge import MergeConfig
from readapt_ray.stages.tune import TuneConfig
from readapt_ray.weights.scale_options import LayerScale, check_layers, factor_of, layer_scales

GIVEN = {"pretrained": "p", "retriever": "r", "adapter": "a", "output": "o"}


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("12-23=0.2, 0 - 11 = 0.8", ("0-11=0.8", "12-23=0.2")),
        (["3-3=-1"], ("3=-1.0",)),
        ("7=0.123456789012", ("7=0.123456789012",)),
        ({"0-11": 0.8, 12: 0}, ("0-11=0.8", "12=0.0")),
        ((), ()),
    ],
)
def test_ranges_are_kept_in_one_way(given: object, kept: tuple[str, ...]) -> None:
    classes: dict[type[MergeConfig | TuneConfig], dict[str, str]] = {MergeConfig: {}, TuneConfig: {"corpus": "c"}}
    for config_class, more in classes.items():
        config = config_class.parse(GIVEN | more | {"layer_scales": given})
        assert config.layer_scales == kept
        assert config_class.parse(config.settings()) == config


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("0-11=0.8,11-23=0.2", "0-11=0.8 and 11-23=0.2 overlap; give each layer once"),
        ("5=1,0-9=0.2", "0-9=0.2 and 5=1.0 overlap"),
        ("11-0=0.8", "'11-0=0.8' ends before it begins; write 0-11=0.8"),
        ("0-11=much", "'0-11=much': write FIRST-LAST=NUMBER with a finite number"),
        ("0-11=nan", "FIRST-LAST=NUMBER"),
        ("0-11=1e999", "FIRST-LAST=NUMBER"),
        ("0-11", "FIRST-LAST=NUMBER"),
        ("-1-11=0.5", "FIRST-LAST=NUMBER"),
        ("0:11=0.5", "such as 0-11=0.8,12-23=0.2"),
        ("0.5", "such as 0-11=0.8,12-23=0.2"),
        ("low=0.5", "FIRST-LAST=NUMBER"),
    ],
)
def test_what_is_no_range_is_refused_with_how_to_write_one(given: str, said: str) -> None:
    with pytest.raises(InputError, match="layer_scales.*" + said):
        MergeConfig.parse(GIVEN | {"layer_scales": given})


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("layers.0.mlp.up_proj.weight", 0.8),
        ("layers.2.self_attn.q_proj.weight", 0.8),
        ("encoder.layer.3.attention.self.query.bias", 0.2),
        ("layers.3.mlp.experts.0.up_proj.weight", 0.2),
        ("layers.4.input_layernorm.weight", 1.0),
        ("h.10.mlp.c_fc.weight", 1.0),
        ("embed_tokens.weight", 1.0),
        ("norm.weight", 1.0),
        ("pooler.dense.weight", 1.0),
    ],
)
def test_a_tensor_has_the_factor_of_its_layer(name: str, factor: float) -> None:
    assert factor_of(layer_scales(["0-2=0.8", "3=0.2"]), name) == factor


def test_layers_that_the_model_lacks_are_refused() -> None:
    names = ["embed_tokens.weight", "layers.0.x.weight", "layers.10.x.weight", "norm.weight"]
    check_layers([LayerScale(0, 10, 0.5)], names)
    check_layers((), ["norm.weight"])
    with pytest.raises(InputError, match=r"layer_scales = '4-11=0.5': the model has the layers 0 to 10; give ranges"):
        check_layers(layer_scales(["0-3=1", "4-11=0.5"]), names)
    with pytest.raises(InputError, match="no numbered layers; leave layer_scales out"):
        check_layers([LayerScale(0, 0, 0.5)], ["norm.weight"])
