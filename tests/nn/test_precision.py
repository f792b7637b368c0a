import pytest
import torch
from torch import nn

from readapt_ray.nn.precision import products_in


@pytest.mark.parametrize(("frozen", "dtype", "expected"), [
    ("bfloat16", "bfloat16", False), ("float32", "bfloat16", True), ("none", "bfloat16", True), ("float32", "float32", False),
])  # fmt: skip
def test_autocast_is_on_only_where_weights_have_another_type(frozen: str, dtype: str, expected: bool) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    if frozen != "none":
        model[0].to(getattr(torch, frozen)).requires_grad_(False)
    with products_in(getattr(torch, dtype), model, "cpu"):
        assert torch.is_autocast_enabled("cpu") == expected
