import pytest
import torch

from readapt_ray.errors import WeightMismatchError
from readapt_ray.weights.reference import readapted_weight


def test_by_hand():
    p, r, u = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 2.0]]), torch.tensor([[0.5, -1.0]])
    assert readapted_weight("w", p, r, u, readapter_scale=0.5, knowledge_scale=2.0).tolist() == [[3.0, 0.0]]


def test_scales_of_0_give_the_pretrained_weight_bit_for_bit():
    p, r, u = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)).unbind()
    assert torch.equal(readapted_weight("w", p, r, u, readapter_scale=0.0, knowledge_scale=0.0), p)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_summed_in_float32(dtype):
    p, r, u = (torch.full((2, 2), value, dtype=dtype) for value in (1.0, 1.0, 1 / 1024))
    made = readapted_weight("w", p, r, u, readapter_scale=1.0, knowledge_scale=0.5)
    assert made.dtype == torch.float32
    assert made.tolist() == [[1 + 1 / 2048] * 2] * 2


def test_other_shapes_are_refused_by_name():
    w = torch.zeros(2, 3)
    with pytest.raises(WeightMismatchError, match=r"'w' .*\[2, 3\], \[2, 3\], \[1, 3\]"):
        readapted_weight("w", w, w, w[:1], readapter_scale=1.0, knowledge_scale=1.0)
