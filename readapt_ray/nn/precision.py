"""Choose the data type of matrix products in a forward pass."""

import contextlib

import torch
from torch import nn


def products_in(dtype: torch.dtype, model: nn.Module, device_type: str) -> contextlib.AbstractContextManager[None]:
    """Return a context for forward passes whose products are in `dtype`.

    It is autocast only where frozen or trained weights of the model have another type. Adapters cast their own. CUDA's
    autocast computes norms in float32, so that each product behind one casts again: a third of the bytes of a layer.

    Args:
        dtype: float32 or below.
        model: float32 weights, or weights in `dtype` with adapters in float32.
        device_type: where the model is.
    """
    frozen = {each.dtype for each in model.parameters() if not each.requires_grad}
    if dtype == torch.float32 or frozen == {dtype}:
        return contextlib.nullcontext()
    return torch.autocast(device_type, dtype)
