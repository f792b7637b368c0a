"""Linear layers in 8-bit floating point against float64; the kernel runs on CPUs, too."""

import logging
import re
from typing import Any

import pytest
import torch
from torch import nn

from readapt_ray.nn import quantized
from readapt_ray.nn.quantized import Fp8Linear
from readapt_ray.training import dora

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@pytest.fixture(autouse=True)
def kernel_is_not_known() -> Any:
    quantized._kernel_is_right.cache_clear()
    yield
    quantized._kernel_is_right.cache_clear()


def make_linear(inputs: int, outputs: int, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> nn.Linear:
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs)
    with torch.no_grad():
        linear.weight[1] *= 1000
        linear.weight[2] = 0
    return linear.to(device, dtype)


def expected(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """The product of both in fp8, in float64; rounded from float32, so that ties go the same way."""
    rounded = []
    for each in (x.flatten(0, -2), linear.weight.detach()):
        scale = (each.float().abs().amax(1, keepdim=True) / 448).clamp_min(2e-38)
        rounded.append((each.float() / scale).to(torch.float8_e4m3fn).double() * scale.double())
    y = rounded[0] @ rounded[1].T
    assert linear.bias is not None
    return (y + linear.bias.double()).view(*x.shape[:-1], -1)


def count_kernels(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Return a list that gets an entry for each product by the kernel."""
    counted: list[None] = []
    product = quantized._scaled_product

    def counting(*given: torch.Tensor) -> torch.Tensor:
        counted.append(None)
        return product(*given)

    monkeypatch.setattr(quantized, "_scaled_product", counting)
    return counted


@DEVICES
@pytest.mark.parametrize(
    ("inputs", "outputs", "dtype", "bound"),
    [(64, 32, torch.bfloat16, 4e-3), (96, 40, torch.bfloat16, 8e-3), (64, 32, torch.float32, 1e-6)],
    ids=["kernel", "other sizes", "float32"],
)
def test_a_product_is_that_of_rounded_numbers(
    inputs: int, outputs: int, dtype: torch.dtype, bound: float, device: str, *, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear = make_linear(inputs, outputs, dtype, device)
    layer = Fp8Linear(linear)
    by_kernel = count_kernels(monkeypatch)
    x = torch.randn(3, 7, inputs, dtype=dtype, device=device)
    x[0, 1] *= 1e4
    x[0, 2] = 0
    found, wanted = layer(x), expected(linear, x)
    assert len(by_kernel) == ((inputs, outputs, dtype) == (64, 32, torch.bfloat16))
    assert found.dtype == dtype
    terms = x.double().abs() @ linear.weight.double().abs().T + 1
    assert ((found - wanted).abs() <= bound * terms).all()
    exact = linear(x).double()
    assert ((found - exact).abs() <= 0.13 * terms).all()
    assert ((found - exact).abs() > bound * terms).any()


def test_a_weight_is_off_by_a_sixteenth_at_most() -> None:
    linear = make_linear(64, 32, torch.float32)
    weight, decoded = linear.weight.detach(), Fp8Linear(linear).decoded()
    smallest = weight.abs().amax(1, keepdim=True) / 448 * 2**-6
    assert ((decoded - weight).abs() <= torch.maximum(weight.abs(), smallest) / 16 * 1.001).all()


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (lambda *_: torch.ones(48, 32, dtype=torch.bfloat16), r"its results are off by .* of their norm"),
        (RuntimeError("fp8 needs compute capability >= 8.9\nmore"), r"fp8 needs compute capability >= 8.9"),
    ],
    ids=["wrong", "missing"],
)
def test_a_kernel_that_is_wrong_or_missing_is_not_used(
    kernel: Any, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def product(*given: Any) -> torch.Tensor:
        if isinstance(kernel, Exception):
            raise kernel
        found: torch.Tensor = kernel(*given)
        return found

    monkeypatch.setattr(quantized, "_scaled_product", product)
    linear = make_linear(64, 32)
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    with caplog.at_level(logging.WARNING, "readapt_ray"):
        found = [Fp8Linear(linear)(x) for _ in range(2)]
    wanted = expected(linear, x)
    assert (found[0] - wanted).norm() < 0.02 * wanted.norm()
    (message,) = caplog.messages
    assert re.fullmatch(f"no product is in fp8 on cpu, but decoded.*: {reason}", message)


def test_gradients_go_through_the_decoded_weight() -> None:
    linear = make_linear(64, 32)
    layers = nn.Sequential(Fp8Linear(linear))
    decoded = layers[0].decoded()
    dora.add_adapters(layers, dora.AdapterShape(method="dora", rank=2, alpha=4.0, dropout=0.0, targets=("0",)))
    x = torch.randn(5, 64, dtype=torch.bfloat16, requires_grad=True)
    direction = torch.randn(5, 32, dtype=torch.bfloat16)
    (gradient,) = torch.autograd.grad((layers(x) * direction).sum(), [x])
    wanted = direction.double() @ decoded.double()
    assert (gradient - wanted).norm() < 0.01 * wanted.norm()


def test_a_compiled_layer_runs_the_kernel_in_one_graph() -> None:
    layers = nn.Sequential(Fp8Linear(make_linear(64, 32)))
    dora.add_adapters(layers, dora.AdapterShape(method="dora", rank=2, alpha=4.0, dropout=0.0, targets=("0",)))
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    found = torch.compile(layers, backend="aot_eager", fullgraph=True)(x)
    assert (found - layers(x)).norm() < 0.01 * found.norm()
