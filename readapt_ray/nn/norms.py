"""Root-mean-square norms as one kernel, where transformers' models compute them in half a dozen.

Bound by memory, those take a tenth of a 7B model's forward pass on an H100, and autograd keeps two float32 copies of the
hidden states for each. Elsewhere than on CUDA nothing changes: torch has no such kernel there.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_SCALED_AFTERWARDS = frozenset(
    f"{family}RMSNorm"
    for family in ("Granite", "Llama", "Mistral", "Mixtral", "Olmo2", "Phi3", "Qwen2", "Qwen3", "Qwen3Moe")
)
"""transformers' classes that compute weight * x / rms(x); Gemma's scale by 1 + weight."""


class FusedRMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps) over the last axis (Zhang and Sennrich, 2019), rounded once.

    Args:
        norm: transformers' own; its weight is shared, so names and checkpoints stay as they are.
    """

    weight: nn.Parameter

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight = norm.weight
        self.eps = float(norm.variance_epsilon)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., H] to the same shape, in the type of `x`; CUDA's autocast would give float32."""
        with torch.autocast(x.device.type, enabled=False):
            return functional.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def fuse(model: nn.Module) -> int:
    """Put the kernel in place of a model's norms; how many there were."""
    found = [name for name, module in model.named_modules() if type(module).__name__ in _SCALED_AFTERWARDS]
    for name in found:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, FusedRMSNorm(model.get_submodule(name)))
    return len(found)
