"""One worker's part of a step on blocks."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from readapt_ray.errors import ModelError
from readapt_ray.training.checkpoints import DataOrder
from readapt_ray.training.language_model import LanguageModelling
from readapt_ray.training.packing import Block
from readapt_ray.training.shares import BatchSettings


@pytest.mark.parametrize("highest", [63, 64])
def test_an_id_that_the_model_does_not_know_is_named(highest: int) -> None:
    block = Block(np.array([1, highest, 2], np.int32), (3,), (0,))
    (share,) = BatchSettings(pad_id=2, micro_batch_tokens=16).shares([block], 1, step=0)
    objective = LanguageModelling(
        model=SimpleNamespace(get_input_embeddings=lambda: torch.nn.Embedding(64, 4)),
        data_order=DataOrder(num_units=1, batch_size=1, num_epochs=1, seed=0),
        batches=lambda _: iter([share]),
        dtype=torch.float32,
    )
    engine: Any = SimpleNamespace(worker_rank=0, device=torch.device("cpu"))
    if highest == 63:
        assert objective.work(engine, share, 0).num_tokens == 3
    else:
        with pytest.raises(ModelError, match="the tokenizer gives the id 64, but the model has 64 token embeddings"):
            objective.work(engine, share, 0)
