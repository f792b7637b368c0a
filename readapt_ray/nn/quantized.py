"""Store the frozen weights of linear layers in 8 or 4 bits, and decode them for each matrix product.

A 7B model takes 14.5 GB in bfloat16, 7.5 GB in int8 or fp8 and 4.5 GB in nf4. The forward and the backward pass each
decode a weight for its product; the decoded weight is not kept.

- int8: one scale per output row: the largest magnitude of the row, divided by 127.
- nf4: 16 levels, which are quantiles of a normal distribution, and one scale per 64 weights (Dettmers et al., 2023,
  section 3). It uses the kernels of bitsandbytes, for CPUs and GPUs.
- fp8: e4m3 with one scale per output row (Micikevicius et al., 2022). The forward pass rounds its input to fp8 too,
with
  one scale per token. GPUs from compute capability 8.9 (H100, L4) compute the product in fp8 at twice the rate of
  bfloat16; other devices compute it from decoded numbers. The backward pass decodes the weight.
"""

import functools
import importlib.util
import logging
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from readapt_ray.catalog.shapes import BaseDtype, is_in_layer
from readapt_ray.errors import InputError

logger = logging.getLogger("readapt_ray")

_FP8 = torch.float8_e4m3fn
_FP8_MAX = float(torch.finfo(_FP8).max)
_FP8_STEP = 16
"""The fp8 kernel needs sizes that are multiples of this."""
_NF4_BLOCK = 64
"""Weights that share a scale."""
_ROWS_AT_ONCE = 1024
"""Rows that are converted to float32 at a time, to limit memory."""


class QuantizedLinear(nn.Module, ABC):
    """A frozen linear layer that stores its weight [O, I] in 8 or 4 bits. I = inputs, O = outputs.

    Gradients flow to its input, not to the weight. The weight is not in `state_dict`.

    Args:
        linear: the layer to replace; its bias is shared.
    """

    bias: nn.Parameter | None
    full_norm: Tensor
    """Norm of each row of the weight before it was quantized, float32 [O]."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = linear.weight.dtype
        self.register_parameter("bias", linear.bias)
        self.register_buffer("full_norm", row_norms(linear.weight.detach()), persistent=False)

    @abstractmethod
    def decoded(self) -> Tensor:
        """Return the dequantized weight [O, I], in the data type that it had before."""

    def product(self, x: Tensor) -> Tensor:
        """Compute x W^T, [..., I] to [..., O], without bias, in the data type of `x`."""
        return functional.linear(x, self.decoded().to(x.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Compute x W^T + bias, [..., I] to [..., O]; the backward pass gives the gradients of `x` and of the bias."""
        y: Tensor = _DecodedProduct.apply(x, self)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias


class Int8Linear(QuantizedLinear):
    """A frozen linear layer with int8 weights and one scale per output row."""

    numbers: Tensor
    scales: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        weight = linear.weight.detach()
        scales = weight.abs().amax(1, keepdim=True).float() / 127
        numbers = [
            (part.float() / scale.clamp_min(torch.finfo(torch.float32).tiny)).round_().to(torch.int8)
            for part, scale in zip(_split_rows(weight), _split_rows(scales), strict=True)
        ]
        self.register_buffer("numbers", torch.cat(numbers), persistent=False)
        self.register_buffer("scales", scales, persistent=False)

    def decoded(self) -> Tensor:
        """Return the dequantized weight [O, I], multiplied in float32 and rounded once."""
        out = torch.empty(self.numbers.shape, dtype=self.dtype, device=self.numbers.device)
        return torch.mul(self.numbers, self.scales, out=out)


class Nf4Linear(QuantizedLinear):
    """A frozen linear layer with 4-bit nf4 weights and one scale per 64 weights."""

    numbers: Tensor
    scales: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        numbers, scales = _kernels().quantize_4bit(linear.weight.detach(), _NF4_BLOCK, "nf4", torch.uint8)
        self.register_buffer("numbers", numbers, persistent=False)
        self.register_buffer("scales", scales, persistent=False)

    def decoded(self) -> Tensor:
        """Return the dequantized weight [O, I], in the data type that it had before."""
        shape = [self.out_features, self.in_features]
        # bitsandbytes 0.50 decodes wrongly on CPUs with AVX512 if a block of 64 weights spans two rows.
        flat = shape if self.in_features % _NF4_BLOCK == 0 else [self.out_features * self.in_features]
        weight: Tensor = _kernels().dequantize_4bit(self.numbers, self.scales, _NF4_BLOCK, "nf4", flat, self.dtype)
        return weight.view(shape)


class Fp8Linear(QuantizedLinear):
    """A frozen linear layer with fp8 weights; the forward product also rounds its input to fp8 (see `product`)."""

    numbers: Tensor
    scales: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        numbers, scales = zip(*map(_to_fp8, _split_rows(linear.weight.detach())), strict=True)
        self.register_buffer("numbers", torch.cat(numbers), persistent=False)
        self.register_buffer("scales", torch.cat(scales), persistent=False)
        fits = self.dtype == torch.bfloat16 and not (self.in_features % _FP8_STEP or self.out_features % _FP8_STEP)
        self._has_kernel = fits and _kernel_is_right(self.numbers.device)

    def decoded(self) -> Tensor:
        """Return the dequantized weight [O, I], multiplied in float32 and rounded once."""
        parts = zip(_split_rows(self.numbers), _split_rows(self.scales), strict=True)
        return torch.cat([_from_fp8(numbers, scales, self.dtype) for numbers, scales in parts])

    def product(self, x: Tensor) -> Tensor:
        """Compute x W^T without bias, [..., I] to [..., O], from the weight and the input in fp8.

        The fp8 kernel computes it if the GPU has one, the layer was in bfloat16 and its sizes are multiples of 16; else
        the fp8 numbers are decoded first. An input in another data type than the layer's is not rounded to fp8.
        """
        if x.dtype != self.dtype:
            return super().product(x)
        rows, scales = _to_fp8(x.flatten(0, -2))
        if self._has_kernel:
            y = _scaled_product(rows, scales, self.numbers, self.scales)
        else:
            y = functional.linear(_from_fp8(rows, scales, x.dtype), self.decoded())
        return y.view(*x.shape[:-1], self.out_features)


def _to_fp8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows in fp8 and their scales, float32 [N, 1]: a row's largest magnitude becomes the largest fp8 number."""
    scales = (rows.abs().amax(1, keepdim=True).float() / _FP8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    return (rows / scales).clamp_(-_FP8_MAX, _FP8_MAX).to(_FP8), scales


def _from_fp8(numbers: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return (numbers.float() * scales).to(dtype)


def _scaled_product(rows: Tensor, row_scales: Tensor, numbers: Tensor, scales: Tensor) -> Tensor:
    """Compute rows times numbers^T with torch's fp8 kernel and both scales; return bfloat16."""
    return torch._scaled_mm(
        rows, numbers.T, scale_a=row_scales, scale_b=scales.T.contiguous(), out_dtype=torch.bfloat16
    )


@functools.cache
def _kernel_is_right(device: torch.device) -> bool:
    """Return whether the fp8 kernel's product equals that of decoded numbers; if not, log a warning once per device."""
    one, other = (_to_fp8(torch.linspace(0, size, size * 64, device=device).view(size, 64).sin()) for size in (48, 32))
    wanted = _from_fp8(*one, torch.float32) @ _from_fp8(*other, torch.float32).T
    try:
        found = _scaled_product(*one, *other).float()
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
    else:
        off = float((found - wanted).norm() / wanted.norm())
        if off < 0.01:
            return True
        reason = f"its results are off by {off:.2g} of their norm"
    logger.warning("no product is in fp8 on %s, but decoded, which is slower than bfloat16: %s", device, reason)
    return False


class _DecodedProduct(torch.autograd.Function):
    """Computes x W^T, and the gradient of x from the weight, which is decoded again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0] @ ctx.layer.decoded().to(gradients[0].dtype), None


LINEAR_LAYERS = (nn.Linear, QuantizedLinear)
_CLASSES: dict[str, type[QuantizedLinear]] = {"int8": Int8Linear, "fp8": Fp8Linear, "nf4": Nf4Linear}


def weight_of(layer: nn.Linear | QuantizedLinear) -> Tensor:
    """Return the weight [O, I] that the layer's forward pass uses: its parameter; if quantized, the decoded weight."""
    return layer.decoded() if isinstance(layer, QuantizedLinear) else layer.weight


def row_norms(weight_OI: Tensor) -> Tensor:
    """Return the L2 norm of each row, float32 [O]; convert 1,024 rows at a time to float32."""
    return torch.cat([torch.linalg.vector_norm(part.float(), dim=1) for part in _split_rows(weight_OI)])


def quantize(model: nn.Module, base_dtype: BaseDtype, device: torch.device) -> None:
    """Quantize the linear layers inside a model's transformer layers, in place, and move them to the device.

    Embeddings, heads and norms stay as they are, on their device. Weights move one at a time, so that the device never
    holds more than the quantized model and one full weight.

    Args:
        model: the model to change.
        base_dtype: int8, fp8 or nf4; auto changes nothing and moves nothing.
        device: device of the quantized layers.

    Raises:
        InputError: nf4 is asked for and bitsandbytes is not installed.
    """
    if base_dtype == "auto":
        return
    check_installed(base_dtype)
    found = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and is_in_layer(name)]
    for name in found:
        parent, _, child = name.rpartition(".")
        linear = model.get_submodule(name).to(device)
        assert isinstance(linear, nn.Linear)
        model.get_submodule(parent).register_module(child, _CLASSES[base_dtype](linear))


def stored_bytes(base_dtype: BaseDtype, inputs: int, outputs: int) -> int:
    """Return the size in bytes of a quantized weight with its scales and row norms, without the bias.

    Args:
        base_dtype: int8, fp8 or nf4; auto is not allowed.
        inputs: columns of the weight.
        outputs: rows of the weight.
    """
    size = inputs * outputs
    if base_dtype in ("int8", "fp8"):
        return size + 8 * outputs
    return -(-size // 2) + 4 * -(-size // _NF4_BLOCK) + 4 * outputs


def check_installed(base_dtype: BaseDtype) -> None:
    """Check that the package that a quantized type needs is installed: bitsandbytes for nf4, none for the others.

    Raises:
        InputError: nf4 is asked for and bitsandbytes is not installed.
    """
    if base_dtype == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            "base_dtype nf4 needs bitsandbytes, which is not installed; pip install 'readapt-ray[nf4]' on every node, or take "
            "base_dtype int8, which needs nothing"
        )


def _split_rows(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.split(_ROWS_AT_ONCE)  # type: ignore[no-untyped-call, no-any-return]


def _kernels() -> Any:
    import bitsandbytes  # noqa: F401 -- registers the operations

    return torch.ops.bitsandbytes
