"""No two uses of randomness share draws: not two seeds, steps, workers or streams."""

import itertools

import numpy as np
import pytest
import torch

from readapt_ray.seeds import derive_seed, random_generator


def test_seeds_steps_workers_and_streams_share_no_seed() -> None:
    streams = ("dropout", "data order", "masking", "initial weights")
    parts = itertools.product(range(5), streams, range(300), range(4))
    found = [derive_seed(seed, stream, step, worker) for seed, stream, step, worker in parts]
    assert len(set(found)) == len(found) == 5 * 4 * 300 * 4
    assert min(found) >= 0 and max(found) < 2**63


@pytest.mark.parametrize("other", [(0, "x", 0), (0, "x", 0, 0), (2**32, "x"), (0, "xx"), (1, "x")])
def test_no_index_is_taken_for_none(other: tuple) -> None:
    assert derive_seed(*other) != derive_seed(0, "x")
    assert random_generator(*other).random() != random_generator(0, "x").random()


def test_the_same_parts_give_the_same_draws_for_numpy_and_torch() -> None:
    assert np.array_equal(random_generator(3, "x", 1).random(4), random_generator(3, "x", 1).random(4))
    assert derive_seed(0, "dropout", 0, 0, 0) == 5182664845589035996, "a change of it changes every training run"
    torch.manual_seed(derive_seed(3, "x"))
