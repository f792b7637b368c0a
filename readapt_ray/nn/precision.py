"""Choose the data type of matrix products in a forward pass."""

import contextlib

import torch
from torch import nn


def products_in(dtype: torch.dtype, model: nn.Module, device_type: str) -> contextlib.AbstractContextManager[None]:
    """Return a context manager for forward passes whose matrix products are computed in `dtype`.

    For bfloat16 and float16 it is autocast, unless the model has frozen weights and all of them are in `dtype`. Then
    autocast is not needed, because adapters cast by themselves, and it is slower: CUDA's autocast computes norms in
    float32, and each product after a norm casts again, a third of the memory traffic of a layer. For float32 the
    context does nothing, so the weights must be in float32.

    Args:
        dtype: data type of the products: float32, bfloat16 or float16.
        model: model with float32 weights, or with weights in `dtype` and adapters in float32.
        device_type: type of the model's device, such as "cuda".
    """
    frozen = {each.dtype for each in model.parameters() if not each.requires_grad}
    if dtype == torch.float32 or frozen == {dtype}:
        return contextlib.nullcontext()
    return torch.autocast(device_type, dtype)
