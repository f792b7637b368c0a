"""Options of training reach the optimizer: none is taken and then ignored."""

import dataclasses

import pytest

from readapt_ray.cluster.optimization import OptimizationConfig, adapter_shape, optimization
from readapt_ray.stages.finetune import FinetuneConfig
from readapt_ray.stages.train import TrainConfig

GIVEN = {
    "learning_rate": 3e-5,
    "weight_decay": 0.125,
    "warmup_fraction": 0.25,
    "max_gradient_norm": 0.5,
    "zero_stage": 2,
    "seed": 7,
    "checkpoint_every_s": 11.0,
    "keep_checkpoints": 4,
}
ADAPTER = {"method": "lora", "lora_rank": 5, "lora_alpha": 9.0, "lora_dropout": 0.75}


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(pretrained="a", corpus="b", output="c", **GIVEN, **ADAPTER),
        FinetuneConfig(model="a", corpus="b", output="c", **GIVEN, **ADAPTER),
    ],
)
def test_each_option_of_the_optimizer_and_of_the_adapter_reaches_it(config: OptimizationConfig) -> None:
    assert dataclasses.asdict(optimization(config)) == GIVEN
    shape = adapter_shape(config, ("q_proj",))
    assert shape is not None
    assert (shape.method, shape.rank, shape.alpha, shape.dropout, shape.targets) == ("lora", 5, 9.0, 0.75, ("q_proj",))
