"""Compute the output and gradients of a linear layer with an adapter, with little memory and memory traffic.

    y = d * (W x + s B A x), d = m / norm        without d for LoRA

The backward pass keeps the input, the output, and tensors of the size of the rank. It recomputes the input of A after
dropout: on a GPU from the seed, on a CPU from a kept mask, since drawing random numbers there takes longer.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from readapt_ray.nn.quantized import QuantizedLinear
from readapt_ray.training.dropout import draw_seed, keep_mask, kept_share

_BLOCK = 64
"""Columns per matrix product in `diagonal_products`, of which only the diagonal is used."""


def adapted_output(base: Tensor, x: Tensor, scaled_A_RI: Tensor, B_OR: Tensor, share_O: Tensor | None) -> Tensor:
    """Compute the output of an adapted layer in plain operations, for torch.compile and as a reference in tests.

    The output [..., O] is without bias. No argument is changed.

    Args:
        base: W x, [..., O].
        x: the input after dropout, [..., I].
        scaled_A_RI: s A, of any type; it is cast to the type of `x`.
        B_OR: B, of any type; it is cast like A.
        share_O: d; None for LoRA.
    """
    low_rank = functional.linear(x, scaled_A_RI.to(x.dtype))
    updated = base + functional.linear(low_rank, B_OR.to(low_rank.dtype))
    return updated if share_O is None else updated * share_O.to(base.dtype)


class CastFactor(torch.autograd.Function):
    """A function that returns a ready cast of `scale * factor`, and passes its gradient on to the factor."""

    @staticmethod
    def forward(ctx: Any, factor: Tensor, cast: Tensor, scale: float) -> Tensor:
        """Return `cast`, which must hold `scale * factor` in the type of the products; it shares its memory."""
        ctx.scale, ctx.dtype = scale, factor.dtype
        return cast.view_as(cast)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of the factor, in its type."""
        return gradients[0].to(ctx.dtype) * ctx.scale, None, None


class AdaptedOutput(torch.autograd.Function):
    """`adapted_output` with dropout, as an autograd function; the norm gets no gradient (DoRA, section 4.3).

    Either `base` (W x) is given, which is overwritten, or the weight. With the weight, the whole gradient of the input
    is summed here in place. A quantized weight is decoded in both passes.
    """

    @staticmethod
    def forward(  # noqa: PLR0917 -- autograd passes arguments by position
        ctx: Any,
        base: Tensor | None,
        weight: Tensor | QuantizedLinear | None,
        x: Tensor,
        A_RI: Tensor,
        B_OR: Tensor,
        magnitude_O: Tensor | None,
        norm_O: Tensor | None,
        scaling: float,
        probability: float,
    ) -> Tensor:
        """Map x [..., I] to the output [..., O] without bias, in the type of W x; a given `base` is overwritten by it.

        `magnitude_O` and `norm_O` are None for LoRA; `scaling` is s; `probability` is that of dropout.
        """
        ctx.quantized = weight if isinstance(weight, QuantizedLinear) else None
        weight_OI = weight if isinstance(weight, Tensor) else None
        if base is None:
            base = functional.linear(x, weight_OI) if weight_OI is not None else ctx.quantized.product(x)
        else:
            ctx.mark_dirty(base)
        ctx.probability, ctx.seed = probability, draw_seed() if probability else 0
        ctx.scaling = scaling / kept_share(probability)
        mask = keep_mask(x, probability, ctx.seed) if probability else None
        scaled_A_RI, cast_B_OR = _scaled(A_RI, ctx.scaling, base.dtype), B_OR.to(base.dtype)
        low_rank_NR = _dropped(x, mask, base.dtype) @ scaled_A_RI.T
        y_NO = base.flatten(0, -2).addmm_(low_rank_NR, cast_B_OR.T)
        share_O = None
        if magnitude_O is not None and norm_O is not None:
            share_O = torch.div(magnitude_O, norm_O, out=torch.empty_like(norm_O, dtype=base.dtype))
            y_NO.mul_(share_O)
        kept_mask = mask if keeps_mask(x.device.type) else None
        scaled_y = None if share_O is None else base
        ctx.save_for_backward(
            weight_OI, x, scaled_A_RI, cast_B_OR, low_rank_NR, scaled_y, magnitude_O, share_O, kept_mask
        )
        return base

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of base, x, A, B and m at the positions of forward's parameters, None elsewhere."""
        weight_OI, x, scaled_A_RI, B_OR, low_rank_NR, y, magnitude_O, share_O, mask = ctx.saved_tensors
        gradient_NO, magnitude_grad = gradients[0].flatten(0, -2), None
        if share_O is not None:
            along_O = column_products(gradient_NO, y.flatten(0, -2)).to(magnitude_O.dtype)
            magnitude_grad = along_O.div_(magnitude_O).masked_fill_(magnitude_O == 0, 0)
            gradient_NO = gradient_NO * share_O
        if ctx.probability and mask is None:
            mask = keep_mask(x, ctx.probability, ctx.seed)
        low_rank_grad_NR = gradient_NO @ B_OR
        A_grad = _scaled(
            low_rank_grad_NR.T @ _dropped(x, mask, B_OR.dtype), ctx.scaling, torch.promote_types(x.dtype, torch.float32)
        )
        B_grad = gradient_NO.T @ low_rank_NR
        x_grad = None
        if ctx.needs_input_grad[2]:
            x_grad = (low_rank_grad_NR @ scaled_A_RI).view_as(x)
            if mask is not None:
                x_grad.mul_(mask)
            if weight_OI is not None or ctx.quantized is not None:
                x_grad.flatten(0, -2).addmm_(gradient_NO, _decoded(ctx.quantized, weight_OI).to(gradient_NO.dtype))
        base_grad = gradient_NO.view_as(gradients[0]) if ctx.needs_input_grad[0] else None
        return base_grad, None, x_grad, A_grad, B_grad, magnitude_grad, None, None, None


def _decoded(quantized: QuantizedLinear | None, weight_OI: Tensor | None) -> Tensor:
    if quantized is not None:
        return quantized.decoded()
    assert weight_OI is not None
    return weight_OI


def keeps_mask(device_type: str) -> bool:
    """Return whether the dropout mask is kept for the backward pass. It is on a CPU, where drawing it again is slow."""
    return device_type == "cpu"


def column_products(one_NO: Tensor, other_NO: Tensor) -> Tensor:
    """Return the sum over N of one * other, [O], in float32 on a CPU, and on a GPU in the type of the inputs.

    On a GPU it is computed as diagonals of matrix products of 64 columns each. This takes more arithmetic, but reads
    each input once and writes no tensor of their size. If their number is no multiple of 64, a GPU computes as a CPU.
    """
    if one_NO.device.type == "cpu" or one_NO.shape[1] % _BLOCK:
        return (one_NO * other_NO).sum(0, dtype=torch.promote_types(one_NO.dtype, torch.float32))
    return diagonal_products(one_NO, other_NO)


def diagonal_products(one_NO: Tensor, other_NO: Tensor) -> Tensor:
    """Compute `column_products` by matrix products; the number of columns must be a multiple of 64."""
    one, other = (each.reshape(len(each), -1, _BLOCK).transpose(0, 1) for each in (one_NO, other_NO))
    return torch.bmm(one.mT, other).diagonal(dim1=1, dim2=2).flatten()


def _dropped(x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the input of A after dropout, [N, I]."""
    return (x if mask is None else x * mask).flatten(0, -2).to(dtype)


def _scaled(tensor: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """Scale, then cast, in one kernel."""
    return torch.mul(tensor, factor, out=torch.empty_like(tensor, dtype=dtype))
