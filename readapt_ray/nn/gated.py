"""Replace transformers' gated MLPs by one that saves less memory for the backward pass.

Autograd would store silu(gate); this MLP computes it again in the backward pass.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_FAMILIES = frozenset(f"{family}MLP" for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "Olmo2", "Granite"))
"""transformers' classes that compute down(act(gate(x)) * up(x))."""


class GatedMLP(nn.Module):
    """An MLP that computes down(silu(gate(x)) * up(x)) (SwiGLU; Shazeer, 2020).

    Args:
        mlp: transformers' MLP; its layers are shared, so names and checkpoints stay as they are.
    """

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., H] to the same shape."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        if torch.compiler.is_compiling():
            return self.down_proj(functional.silu(gate) * up)  # type: ignore[no-any-return]
        return self.down_proj(_SiluTimes.apply(gate, up))  # type: ignore[no-untyped-call, no-any-return]


class _SiluTimes(torch.autograd.Function):
    """Computes silu(gate) * up, and silu(gate) again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        gate_grad = torch.ops.aten.silu_backward(gradients[0] * up, gate)
        return gate_grad, functional.silu(gate).mul_(gradients[0])


def fuse(model: nn.Module) -> int:
    """Replace a model's gated MLPs that use silu, in place; return how many were replaced (0 if it has none).

    Only the MLP classes of Llama, Mistral, Qwen2, Qwen3, Olmo2 and Granite are known; others stay as they are.
    """
    found = [
        name
        for name, module in model.named_modules()
        if type(module).__name__ in _FAMILIES and "silu" in type(module.act_fn).__name__.lower()
    ]
    for name in found:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, GatedMLP(model.get_submodule(name)))
    return len(found)
