"""Compute RMS norms in one kernel; transformers' models use about six.

Those are bound by memory bandwidth and take a tenth of a 7B model's forward pass on an H100. Autograd keeps two float32
copies of the hidden states for each. Use it on CUDA: torch has no such kernel for other devices, so nothing is gained
there.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_SCALED_AFTERWARDS = frozenset(
    f"{family}RMSNorm"
    for family in ("Granite", "Llama", "Mistral", "Mixtral", "Olmo2", "Phi3", "Qwen2", "Qwen3", "Qwen3Moe")
)
"""transformers' classes that compute weight * x / rms(x). Gemma's are not among them: they scale by 1 + weight."""


class FusedRMSNorm(nn.Module):
    """An RMS norm in one kernel: weight * x / sqrt(mean(x^2) + eps) over the last axis, rounded once.

    Source: Zhang and Sennrich, 2019.

    Args:
        norm: transformers' norm; its weight is shared, so names and checkpoints stay as they are.
    """

    weight: nn.Parameter

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight = norm.weight
        self.eps = float(norm.variance_epsilon)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize [..., H]; the result has the shape and dtype of `x`, also under CUDA's autocast."""
        with torch.autocast(x.device.type, enabled=False):
            return functional.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def fuse(model: nn.Module) -> int:
    """Replace a model's RMS norms by fused ones, in place; return how many were replaced (0 if it has none).

    Only norms that compute weight * x / rms(x) are known, such as those of Llama, Mistral and Qwen3. Gemma's norms and
    LayerNorms stay as they are.
    """
    found = [name for name, module in model.named_modules() if type(module).__name__ in _SCALED_AFTERWARDS]
    for name in found:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, FusedRMSNorm(model.get_submodule(name)))
    return len(found)
