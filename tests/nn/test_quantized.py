"""Quantized layers against levels and scales by hand, and their gradients against float64."""

import copy
import importlib.util
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from readapt_ray.errors import InputError
from readapt_ray.nn import quantized
from readapt_ray.training import dora

KINDS: Any = pytest.mark.parametrize("kind", ["int8", "fp8", "nf4"])
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The levels of Dettmers et al., 2023, appendix E."""


def make_network(dtype: torch.dtype = torch.float32, *, has_zeros: bool = True) -> nn.Module:
    """Two layers and a head; the weights of some rows and blocks are far larger than others, and one row may be zero."""
    torch.manual_seed(0)
    network = nn.Module()
    network.layers = nn.Sequential(nn.Linear(96, 40), nn.Linear(40, 24, bias=False))
    network.head = nn.Linear(24, 50)
    with torch.no_grad():
        network.layers[0].weight[3] *= 50
        network.layers[0].weight[5, :9] *= 20
        network.layers[0].weight[7] *= not has_zeros
    return network.to(dtype)


def test_int8_is_off_by_half_a_level_at_most() -> None:
    linear = make_network().layers[0]
    weight = linear.weight.detach().double()
    level = weight.abs().amax(1, keepdim=True) / 127
    decoded = quantized.Int8Linear(linear).decoded().double()
    assert ((decoded - weight).abs() <= level * 0.50001).all()
    assert (decoded - weight).abs().max() > 0


def test_nf4_takes_the_nearest_of_the_papers_levels_in_blocks_of_64() -> None:
    linear = make_network().layers[0]
    blocks = linear.weight.detach().double().numpy().reshape(-1, 64)
    scales = np.abs(blocks).max(1, keepdims=True)
    places = np.abs(blocks[..., None] / np.where(scales == 0, 1, scales)[..., None] - np.array(NF4)).argmin(-1)
    expected = np.array(NF4)[places] * scales
    decoded = quantized.Nf4Linear(linear).decoded().double().numpy().reshape(-1, 64)
    np.testing.assert_allclose(decoded, expected, rtol=1e-6, atol=1e-9)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_layers_are_quantized_and_bytes_are_counted(kind: Any, dtype: torch.dtype) -> None:
    network = make_network(dtype)
    quantized.quantize(network, kind, torch.device("cpu"))
    assert isinstance(network.head, nn.Linear)
    for layer in network.layers:
        assert isinstance(layer, quantized.QuantizedLinear)
        assert layer.decoded().dtype == dtype
        size = sum(each.nbytes for each in layer.buffers())
        assert size == quantized.stored_bytes(kind, layer.in_features, layer.out_features)
    assert [each.bias is None for each in network.layers] == [False, True]


@DEVICES
@pytest.mark.parametrize("kind", ["int8", "nf4"])  # fp8 rounds inputs, too
@pytest.mark.parametrize("method", ["dora", "lora"])
def test_adapters_get_the_gradients_of_the_decoded_weight_in_float64(kind: Any, method: Any, device: str) -> None:
    """An adapted layer, then one without an adapter, whose input has a gradient too. Norms are those of the decoded weight."""
    network = make_network().layers
    quantized.quantize(network, kind, torch.device(device))
    reference = nn.Sequential(nn.Linear(96, 40), nn.Linear(40, 24, bias=False)).double().to(device)
    with torch.no_grad():
        for mine, other in zip(network, reference, strict=True):
            other.weight.copy_(mine.decoded())
            if mine.bias is not None:
                other.bias.copy_(mine.bias)
    shape = dora.AdapterShape(method=method, rank=4, alpha=8.0, dropout=0.0, targets=("0",))
    for module in (network, reference):
        dora.add_adapters(module, shape)
    reference.double()
    ours, theirs = network[0], reference[0]
    with torch.no_grad():
        ours.lora_B.normal_(std=0.2)
        theirs.lora_A.copy_(ours.lora_A)
        theirs.lora_B.copy_(ours.lora_B)
        if method == "dora":
            theirs.base_norm_squared.copy_(theirs.base.weight.square().sum(1))
            torch.testing.assert_close(ours.magnitude.double(), theirs.base.weight.norm(dim=1), rtol=1e-6, atol=0)
            theirs.magnitude.copy_(ours.magnitude)
    for module in (network, reference):
        dora.refresh(module)
    if method == "dora":
        dense = theirs.base.weight + 2.0 * theirs.lora_B @ theirs.lora_A
        torch.testing.assert_close(ours.norm.double(), dense.norm(dim=1), rtol=1e-5, atol=1e-6)
    x = torch.randn(3, 5, 96, device=device)
    direction = torch.randn(3, 5, 24, device=device)
    gradients = []
    for module, dtype in ((network, torch.float32), (reference, torch.float64)):
        given = x.to(dtype).requires_grad_()
        trained = [each for each in module.parameters() if each.requires_grad]
        loss = (module(given) * direction.to(dtype)).sum()
        gradients.append([each.double() for each in torch.autograd.grad(loss, [given, *trained])])
    assert len(gradients[0]) == (4 if method == "dora" else 3)
    for mine, other in zip(*gradients, strict=True):
        assert (mine - other).norm() / other.norm() < 1e-5
        assert other.norm() > 0


@KINDS
def test_nothing_of_the_size_of_a_weight_is_kept_for_the_backward_pass(kind: Any) -> None:
    network = make_network().layers
    quantized.quantize(network, kind, torch.device("cpu"))
    dora.add_adapters(network, dora.AdapterShape(method="dora", rank=2, alpha=4.0, dropout=0.0, targets=("0",)))
    kept: list[torch.Tensor] = []
    fixed = {each.data_ptr() for each in (*network.parameters(), *network.buffers())}
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each):
        network(torch.randn(2, 96, requires_grad=True))
    sizes = [each.numel() for each in kept if each.data_ptr() not in fixed]
    assert sizes and max(sizes) < 24 * 40


@KINDS
def test_an_adapter_that_learned_nothing_leaves_the_full_precision_model_as_it_is(kind: Any) -> None:
    """And one that learned keeps m / norm, which quantizing the rows would have changed."""
    full = make_network().layers
    network = copy.deepcopy(full)
    quantized.quantize(network, kind, torch.device("cpu"))
    dora.add_adapters(network, dora.AdapterShape(method="dora", rank=2, alpha=4.0, dropout=0.0, targets=("0",)))
    layer = network[0]
    name = "base_model.model.0.lora_magnitude_vector"
    weight = full[0].weight.detach()
    fresh = dora.adapter_state(network)[name]
    torch.testing.assert_close(fresh, weight.norm(dim=1), rtol=1e-6, atol=1e-9)
    off = (layer.magnitude.detach() / weight.norm(dim=1) - 1).abs().nan_to_num()
    assert off.max() > (1e-5 if kind == "int8" else 1e-3)
    with torch.no_grad():
        layer.lora_B.normal_(std=0.02)
        layer.magnitude.mul_(1.1)
    dora.refresh(network)
    dense = weight + layer.scaling * layer.lora_B @ layer.lora_A
    expected = layer.magnitude / layer.norm
    saved, as_trained = (
        (each / dense.norm(dim=1) / expected - 1).nan_to_num().square().mean().sqrt()
        for each in (dora.adapter_state(network)[name], layer.magnitude)
    )
    assert saved < 0.1 * as_trained
    trained, state = layer.magnitude.detach().clone(), dora.adapter_state(network)
    layer.magnitude.detach().zero_()
    dora.load_adapter_state(network, state, name="saved")
    torch.testing.assert_close(layer.magnitude.detach(), trained, rtol=1e-6, atol=1e-9)


@KINDS
def test_a_compiled_layer_computes_the_same(kind: Any) -> None:
    network = make_network(has_zeros=False).layers
    quantized.quantize(network, kind, torch.device("cpu"))
    dora.add_adapters(network, dora.AdapterShape(method="dora", rank=2, alpha=4.0, dropout=0.0, targets=("0",)))
    nn.init.normal_(network[0].lora_B)
    dora.refresh(network)
    x = torch.randn(3, 96)
    found = []
    for compute in (network, torch.compile(network, backend="aot_eager", fullgraph=True)):
        network.zero_grad()
        y = compute(x)
        y.square().sum().backward()
        found.append([y, *(each.grad.clone() for each in network.parameters() if each.grad is not None)])
    assert len(found[0]) == 4
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_nf4_without_its_package_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    quantized.check_installed("int8")
    with pytest.raises(InputError, match=r"base_dtype nf4 needs bitsandbytes.*readapt-ray\[nf4\].*int8"):
        quantized.check_installed("nf4")
