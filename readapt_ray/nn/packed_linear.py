"""Compute linear layers on a CPU from weights that are packed into oneDNN's layout, for inference.

torch multiplies float32 with MKL, which is slow for few rows on CPUs other than Intel's, and it packs bfloat16 weights
again in each call. Speedup of a packed product over torch's on one core of an AMD EPYC (Zen 4), weight of 1,536 x 384:
6 rows 2.9 (float32) and 3.0 (bfloat16), 80 rows 1.25 and 1.25, 4,096 rows 1.15 and 1.18. Packed copies double the
memory of the weights.
"""

import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from readapt_ray import hardware

logger = logging.getLogger("readapt_ray")

MAX_BYTES = 2 << 30
"""Models with more bytes of linear weights than this are not packed, to save memory."""
_ROWS = 512
"""Number of input rows that the layout is chosen for. Layouts for 6 and for 4,096 rows were as fast."""
_ops: Any = torch.ops.mkldnn


class PackedProduct:
    """Products with one weight; keeps a packed copy of it, and packs again after the weight was changed."""

    def __init__(self) -> None:
        self._packed: Tensor | None = None
        self._packed_from: tuple[int, int] | None = None

    def __call__(self, x: Tensor, weight_OI: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute x W^T + bias, [..., I] to [..., O].

        torch's own product is used if gradients are enabled, `x` is empty or has another data type than the weight, or
        the weight is an inference tensor (its changes could not be noticed). There is no gradient otherwise.
        """
        is_watched = not weight_OI.is_inference()  # inference tensors do not count their changes (`_version`)
        if torch.is_grad_enabled() or not is_watched or x.dtype != weight_OI.dtype or not x.numel():
            return functional.linear(x, weight_OI, bias)
        written = (id(weight_OI), weight_OI._version)
        if self._packed is None or self._packed_from != written:
            self._packed, self._packed_from = _pack(weight_OI.detach()), written
        if self._packed.dtype != x.dtype:  # the weight has temporarily other, wider data with the same version
            return functional.linear(x, weight_OI, bias)
        return _product(x, self._packed, bias)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the packed copy, which torch cannot copy."""
        return {"_packed": None, "_packed_from": None}


class PackedLinear(nn.Linear):
    """A linear layer that multiplies with a packed weight; it shares weight and bias with the layer it replaces.

    With gradients enabled it computes as `nn.Linear` does.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.training = linear.training
        self.product = PackedProduct()

    def forward(self, input: Tensor) -> Tensor:  # the name is torch's
        """Compute the layer's output, [..., I] to [..., O]."""
        return self.product(input, self.weight, self.bias)


def install(model: nn.Module) -> int:
    """Replace a model's linear layers by packed ones, in place; return how many were replaced.

    All `nn.Linear` layers are replaced, or none (0) if `should_pack` is False for their weights. Subclasses stay.
    """
    found = {name: each for name, each in model.named_modules() if type(each) is nn.Linear}
    weights = [each.weight for each in found.values()]
    if not should_pack(weights):
        return 0
    for name, linear in found.items():
        parent, _, child = name.rpartition(".")
        model.get_submodule(parent).register_module(child, PackedLinear(linear))
    return len(found)


def should_pack(weights: Sequence[Tensor]) -> bool:
    """Return whether to pack these weights.

    They must all be on a CPU, take at most 2 GiB together, and have data types in which this CPU computes packed
    products faster and correctly. False for no weights.
    """
    if (
        not weights
        or any(each.device.type != "cpu" for each in weights)
        or not copy_bytes(sum(each.nbytes for each in weights))
    ):
        return False
    faster = faster_dtypes()
    return all(
        str(dtype).removeprefix("torch.") in faster and _is_right(dtype) for dtype in {each.dtype for each in weights}
    )


def copy_bytes(weight_bytes: int) -> int:
    """Return the bytes of the packed copies of a model's linear weights, for memory estimates.

    They are as large as the weights, or 0 if the weights are over 2 GiB, since these are not packed.

    Args:
        weight_bytes: bytes of all linear weights of the model.
    """
    return weight_bytes if weight_bytes <= MAX_BYTES else 0


def faster_dtypes() -> frozenset[str]:
    """Return the data types in which packed products are faster on this CPU: float32, bfloat16, both or none.

    float32 is faster on AMD, bfloat16 on CPUs with bfloat16 units. `should_pack` also tests that results are right.
    """
    is_faster = {"float32": hardware.is_amd(), "bfloat16": hardware.has_bfloat16_units()}
    return frozenset(name for name, faster in is_faster.items() if faster)


@functools.cache
def _is_right(dtype: torch.dtype) -> bool:
    """Return whether a packed product equals torch's, once per process and data type."""
    x, weight = (torch.linspace(0, size, size * 48).view(size, 48).sin().to(dtype) for size in (5, 32))
    bias = torch.linspace(-1, 1, 32).to(dtype)
    wanted = functional.linear(x.double(), weight.double(), bias.double())
    try:
        with torch.inference_mode():
            off = float((_product(x, _pack(weight), bias).double() - wanted).norm() / wanted.norm())
    except (RuntimeError, AttributeError) as error:
        logger.debug("linear layers are not packed in %s: %s", dtype, str(error).partition("\n")[0])
        return False
    if off > torch.finfo(dtype).eps:
        logger.warning("linear layers are not packed in %s: results are off by %.2g of their norm", dtype, off)
        return False
    return True


def _pack(weight_OI: Tensor) -> Tensor:
    packed: Tensor = _ops._reorder_linear_weight(weight_OI.contiguous(), _ROWS)
    return packed


def _product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = _ops._linear_pointwise(x, packed, bias, "none", [], "")
    return y
