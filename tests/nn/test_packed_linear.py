"""Linear layers from packed weights: the same products, also after the weights change, and torch's own where they are not right."""

import copy
import logging
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

from readapt_ray import hardware
from readapt_ray.nn import packed_linear
from readapt_ray.nn.packed_linear import PackedLinear, PackedProduct, install, should_pack

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3}


@pytest.fixture
def amd(monkeypatch):
    monkeypatch.setattr(hardware, "is_amd", lambda: True)
    monkeypatch.setattr(hardware, "has_bfloat16_units", lambda: True)


def layer(dtype: torch.dtype = torch.float32, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    with torch.inference_mode(False):
        return nn.Linear(48, 32, bias=bias).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "x", [torch.randn(3, 5, 48), torch.randn(1, 48), torch.randn(48), torch.randn(5, 96)[:, ::2], torch.randn(48, 7).T]
)
@torch.inference_mode()
def test_the_product_is_that_of_float64(dtype, bias, x):
    plain = layer(dtype, bias=bias)
    x = x.to(dtype)
    wanted = copy.deepcopy(plain).double()(x.double())

    found = PackedLinear(plain)(x)

    assert found.dtype == dtype and found.shape == wanted.shape
    assert (found.double() - wanted).norm() <= TOLERANCE[dtype] * wanted.norm()


@torch.inference_mode()
def test_no_rows_give_no_rows():
    assert PackedLinear(layer())(torch.empty(0, 48)).shape == (0, 32)


def test_a_weight_that_is_written_is_packed_again():
    packed = PackedLinear(layer(bias=False))
    x = torch.randn(4, 48)
    with torch.inference_mode():
        before = packed(x).clone()
    with torch.no_grad():
        packed.weight.mul_(2)
    with torch.inference_mode():
        assert torch.allclose(packed(x), 2 * before, atol=1e-6)
        packed.weight = nn.Parameter(torch.zeros(32, 48))  # as load_state_dict(assign=True) does
        assert not packed(x).any()


def test_a_weight_that_is_widened_for_a_while_is_used_as_it_is():
    packed = PackedLinear(layer(torch.bfloat16, bias=False))
    x = torch.randn(4, 48)
    with torch.inference_mode():
        packed(x.bfloat16())
    packed.weight.data = packed.weight.data.float() * 3  # other numbers, so that the old ones would show
    with torch.inference_mode():
        assert torch.equal(packed(x), functional.linear(x, packed.weight))


def test_gradients_are_those_of_torch():
    plain, x = layer(), torch.randn(4, 48, requires_grad=True)
    packed = PackedLinear(plain)
    with torch.inference_mode():
        packed(x.detach())
    packed(x).square().sum().backward()
    found, x.grad, weight_grad = x.grad, None, plain.weight.grad.clone()
    plain.weight.grad = None
    plain(x).square().sum().backward()
    assert torch.equal(found, x.grad) and torch.equal(weight_grad, plain.weight.grad)


@torch.inference_mode()
def test_a_weight_whose_writes_are_not_counted_is_not_packed(monkeypatch):
    monkeypatch.setattr(packed_linear, "_ops", None)
    x, weight = torch.randn(2, 48), torch.randn(32, 48)
    assert torch.equal(PackedProduct()(x, weight), functional.linear(x, weight))


def test_a_layer_can_be_copied_and_pickled():
    packed, x = PackedLinear(layer()), torch.randn(2, 48)
    with torch.inference_mode():
        wanted = packed(x)
    copies = [copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))]
    with torch.inference_mode():
        assert all(torch.equal(each(x), wanted) for each in copies)


def test_linear_layers_of_a_model_are_replaced_under_the_same_names(amd):
    model = nn.Sequential(layer(), nn.GELU(), nn.ModuleDict({"out": nn.Linear(32, 4)}))
    before = {name: each.data_ptr() for name, each in model.state_dict().items()}

    assert install(model) == 2

    assert {name: each.data_ptr() for name, each in model.state_dict().items()} == before
    assert isinstance(model[0], PackedLinear) and isinstance(model[2]["out"], PackedLinear)
    assert install(model) == 0


@pytest.mark.parametrize(
    ("dtype", "is_amd", "has_units", "wanted"),
    [
        (torch.float32, True, False, True),
        (torch.float32, False, True, False),
        (torch.bfloat16, False, True, True),
        (torch.bfloat16, True, False, False),
        (torch.float16, True, True, False),
    ],
)
def test_the_cpu_and_the_type_decide(monkeypatch, dtype, is_amd, has_units, wanted):
    monkeypatch.setattr(hardware, "is_amd", lambda: is_amd)
    monkeypatch.setattr(hardware, "has_bfloat16_units", lambda: has_units)
    assert should_pack([layer(dtype).weight]) is wanted


def test_large_models_and_other_devices_keep_their_layers(amd, monkeypatch):
    weight = layer().weight
    assert not should_pack([])
    assert not should_pack([nn.Parameter(weight.to("meta"))])
    monkeypatch.setattr(packed_linear, "MAX_BYTES", 2 * weight.nbytes - 1)
    assert should_pack([weight]) and not should_pack([weight, weight])


def _missing(*given):
    raise AttributeError("no such operator")


def _refusing(*given):
    raise RuntimeError("oneDNN cannot do this\nat some length")


@pytest.mark.parametrize("failing", [_missing, _refusing])
def test_torchs_own_product_is_used_where_there_is_no_kernel(amd, monkeypatch, failing):
    monkeypatch.setattr(packed_linear, "_ops", SimpleNamespace(_reorder_linear_weight=failing))
    packed_linear._is_right.cache_clear()
    try:
        assert install(nn.Sequential(layer())) == 0
    finally:
        packed_linear._is_right.cache_clear()


def test_a_kernel_with_wrong_results_is_named_and_not_used(amd, monkeypatch, caplog):
    wrong = SimpleNamespace(
        _reorder_linear_weight=lambda weight, rows: weight,
        _linear_pointwise=lambda x, weight, bias, *given: functional.linear(x, weight, bias) + 0.01,
    )
    monkeypatch.setattr(packed_linear, "_ops", wrong)
    packed_linear._is_right.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert install(nn.Sequential(layer())) == 0
    finally:
        packed_linear._is_right.cache_clear()
    assert "not packed in torch.float32: results are off by" in caplog.text


@torch.inference_mode()
def test_two_weights_of_one_shape_are_not_mixed_up():
    product = PackedProduct()
    x, one, other = torch.randn(3, 48), layer().weight, layer().weight
    with torch.inference_mode(False), torch.no_grad():
        other.mul_(-2)
    for weight in (one, other, one):
        assert torch.allclose(product(x, weight), functional.linear(x, weight), atol=1e-5)
