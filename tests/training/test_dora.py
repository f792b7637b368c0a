"""Our DoRA against PEFT's own: the oracle for outputs, gradients and files."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from readapt_ray.errors import ModelError
from readapt_ray.storage import Location
from readapt_ray.training import dora
from readapt_ray.training.adapted_output import AdaptedOutput, adapted_output, column_products, diagonal_products
from readapt_ray.training.dora import AdapterShape
from readapt_ray.training.dropout import draw_seed, keep_mask, kept_share
from tests import factories

TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")


def shape(method: Any = "dora", dropout: float = 0.0, targets: tuple[str, ...] = ("first", "second")) -> AdapterShape:
    return AdapterShape(method=method, rank=4, alpha=8.0, dropout=dropout, targets=targets)


def pair(method: Any, dropout: float = 0.0) -> tuple[nn.Module, nn.Module]:
    """The same two layers with the same non-trivial adapters, by us and by PEFT, in float64."""
    torch.manual_seed(0)
    plain = nn.Sequential()
    plain.add_module("first", nn.Linear(24, 16))
    plain.add_module("second", nn.Linear(16, 8, bias=False))
    config = peft.LoraConfig(
        r=4, lora_alpha=8, lora_dropout=dropout, target_modules=["first", "second"], use_dora=method == "dora"
    )
    theirs = peft.get_peft_model(copy.deepcopy(plain), config).double()
    ours = plain
    dora.add_adapters(ours, shape(method, dropout))
    ours = ours.double()
    for name, layer in dora.adapted_layers(ours):
        peer = theirs.base_model.model.get_submodule(name)
        with torch.no_grad():
            layer.lora_B.normal_(std=0.3)
            peer.lora_A["default"].weight.copy_(layer.lora_A)
            peer.lora_B["default"].weight.copy_(layer.lora_B)
            if layer.magnitude is not None:
                layer.magnitude.mul_(torch.rand_like(layer.magnitude) + 0.5)
                peer.lora_magnitude_vector["default"].weight.copy_(layer.magnitude)
                layer.base_norm_squared = layer.base.weight.square().sum(1)
                layer.norm = layer.norm.double()
    dora.refresh(ours)
    return ours, theirs


@pytest.mark.parametrize("method", ["dora", "lora"])
def test_outputs_and_gradients_equal_pefts(method: str) -> None:
    ours, theirs = pair(method)
    x = torch.randn(5, 24, dtype=torch.float64)
    theirs(x).square().sum().backward()
    ours(x).square().sum().backward()
    assert torch.allclose(ours(x), theirs(x), rtol=0, atol=1e-12)
    for name, layer in dora.adapted_layers(ours):
        peer = theirs.base_model.model.get_submodule(name)
        pairs = [(layer.lora_A, peer.lora_A["default"].weight), (layer.lora_B, peer.lora_B["default"].weight)]
        if layer.magnitude is not None:
            pairs.append((layer.magnitude, peer.lora_magnitude_vector["default"].weight))
        for our, their in pairs:
            assert our.grad is not None
            assert torch.allclose(our.grad, their.grad, rtol=0, atol=1e-10)
            assert our.grad.abs().max() > 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_on_a_gpu_outputs_gradients_and_norms_equal_the_cpus(dtype: torch.dtype, tolerance: float) -> None:
    on_cpu, _ = pair("dora")
    on_gpu = copy.deepcopy(on_cpu).float().to("cuda")
    for _, layer in dora.adapted_layers(on_gpu):
        layer.base.to(dtype)
    x = torch.randn(64, 24, dtype=torch.float64)
    dora.refresh(on_gpu)
    on_cpu(x).square().sum().backward()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        output = on_gpu(x.to("cuda", dtype))
    output.float().square().sum().backward()

    def off(one: torch.Tensor, other: torch.Tensor) -> float:
        return float((one.double().cpu() - other).norm() / other.norm())

    assert off(output, on_cpu(x)) < tolerance
    for (_, one), (_, other) in zip(dora.adapted_layers(on_gpu), dora.adapted_layers(on_cpu), strict=True):
        assert off(one.norm, other.norm) < tolerance
        for name in ("lora_A", "lora_B", "magnitude"):
            assert off(getattr(one, name).grad, getattr(other, name).grad) < tolerance, name


def test_with_dropout_the_mean_output_equals_pefts() -> None:
    ours, theirs = pair("dora", dropout=0.3)
    x = torch.randn(1, 24, dtype=torch.float64)
    first = x.expand(40_000, -1)
    ours_mean = ours.train().get_submodule("first")(first).mean(0)
    theirs_mean = theirs.train().base_model.model.get_submodule("first")(first).mean(0)
    spread = ours.get_submodule("first")(first).std(0).max()
    assert spread > 0.01
    assert (ours_mean - theirs_mean).abs().max() < 0.05


def test_the_factored_norm_is_the_norm() -> None:
    ours, _ = pair("dora")
    for _, layer in dora.adapted_layers(ours):
        dense = layer.base.weight + layer.scaling * layer.lora_B @ layer.lora_A
        assert torch.allclose(layer.norm, dense.norm(dim=1), rtol=1e-12)


@pytest.mark.parametrize(("probability", "keeps_mask"), [(0.0, True), (0.3, True), (0.3, False)])
@pytest.mark.parametrize("is_partitioned", [False, True])
@pytest.mark.parametrize("method", ["dora", "lora"])
def test_the_output_and_its_gradients_equal_the_reference(
    method: str, is_partitioned: bool, probability: float, keeps_mask: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, with the mask that the function draws, kept or drawn again as on a GPU. A magnitude of zero stays."""
    monkeypatch.setattr("readapt_ray.training.adapted_output.keeps_mask", lambda device_type: keeps_mask)
    made = torch.Generator().manual_seed(3)
    sizes = ((2, 5, 6), (2, 6), (4, 2), (4,))
    x, A, B, m = (torch.randn(size, generator=made, dtype=torch.float64).requires_grad_() for size in sizes)
    weight, direction = (torch.randn(size, generator=made, dtype=torch.float64) for size in ((4, 6), (2, 5, 4)))
    with torch.no_grad():
        m[1] = 0
    norm = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    magnitudes, trained = ((m, norm), [x, A, B, m]) if method == "dora" else ((None, None), [x, A, B])
    torch.manual_seed(5)
    given = (x @ weight.T, None) if is_partitioned else (None, weight)
    ours = AdaptedOutput.apply(*given, x, A, B, *magnitudes, 2.0, probability)
    torch.manual_seed(5)
    mask = torch.ones_like(x)
    if probability:
        mask = keep_mask(x, probability, draw_seed()) / kept_share(probability)
        assert 0 < int((mask == 0).sum()) < mask.numel()
    share = m / norm if method == "dora" else None
    theirs = adapted_output(x @ weight.T, x * mask, 2.0 * A, B, share)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    one, other = (list(torch.autograd.grad((y * direction).sum(), trained)) for y in (ours, theirs))
    if method == "dora":
        other[3] = torch.where(m == 0, 0, other[3])
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_column_products_by_diagonals() -> None:
    one, other = torch.randn(2, 30, 128, dtype=torch.float64)
    torch.testing.assert_close(diagonal_products(one, other), (one * other).sum(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(column_products(one, other), (one * other).sum(0), rtol=0, atol=1e-12)


def test_under_autocast_a_float32_base_computes_in_bfloat16() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 8))
    dora.add_adapters(plain, shape(targets=("0", "1")))
    gradients = []
    for enabled in (True, False):
        plain.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = plain(torch.linspace(-1, 1, 72).view(3, 24))
        y.float().square().sum().backward()
        gradients.append([each.grad for each in plain.parameters() if each.requires_grad])
    assert gradients[0][0].dtype == torch.float32
    torch.testing.assert_close(*gradients, rtol=0.05, atol=0.05)


def test_a_layer_that_is_computed_again_draws_the_same_dropout() -> None:
    plain = nn.Sequential(nn.Linear(24, 16))
    dora.add_adapters(plain, shape(dropout=0.5, targets=("0",)))
    x = torch.randn(3, 24, requires_grad=True)
    gradients = []
    for compute in (plain, lambda given: torch.utils.checkpoint.checkpoint(plain, given, use_reentrant=False)):
        plain.zero_grad()
        torch.manual_seed(1)
        compute(x).square().sum().backward()
        gradients.append([each.grad.clone() for each in plain.parameters() if each.requires_grad])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_a_mask_that_is_drawn_again_is_the_same_and_keeps_the_share_asked_for() -> None:
    x = torch.empty(300, 400)
    one, same, other = (keep_mask(x, 0.05, seed) for seed in (7, 7, 8))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert one.mean().item() == pytest.approx(kept_share(0.05), abs=0.003)


def test_a_fresh_adapter_changes_nothing_and_trains_all_its_parts() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential()
    plain.add_module("first", nn.Linear(24, 16))
    x = torch.randn(3, 24)
    before = plain(x)
    dora.add_adapters(plain, shape(targets=("first",)))
    assert torch.allclose(plain(x), before, atol=1e-6)
    trained = [name for name, tensor in plain.named_parameters() if tensor.requires_grad]
    assert trained == ["first.lora_A", "first.lora_B", "first.magnitude"]


def test_the_magnitude_of_a_bfloat16_model_moves() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential()
    plain.add_module("first", nn.Linear(24, 16))
    plain = plain.bfloat16()
    dora.add_adapters(plain, shape(targets=("first",)))
    layer = next(iter(dora.adapted_layers(plain)))[1]
    assert layer.magnitude is not None
    before = layer.magnitude.detach().clone()
    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-5, weight_decay=0.0)
    for _ in range(3):
        plain(torch.randn(4, 24, dtype=torch.bfloat16)).float().square().sum().backward()
        optimizer.step()
        dora.refresh(plain)
    assert layer.magnitude.dtype == torch.float32
    assert (layer.magnitude - before).abs().min() > 0


def test_a_target_that_matches_nothing_is_refused_with_what_there_is() -> None:
    plain = nn.Sequential()
    plain.add_module("first", nn.Linear(2, 2))
    with pytest.raises(ModelError, match=r"\['third'\] match no linear layer; the model has \['first'\]"):
        dora.add_adapters(plain, shape(targets=("first", "third")))


@pytest.mark.parametrize("method", ["dora", "lora"])
def test_the_saved_adapter_loads_in_plain_peft_with_the_same_output(tmp_path: Path, method: Any) -> None:
    from transformers import AutoModelForCausalLM

    base = factories.tiny_decoder(tmp_path / "base")
    ours = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapter = AdapterShape(method=method, rank=4, alpha=8.0, dropout=0.1, targets=TARGETS)
    dora.add_adapters(ours, adapter)
    torch.manual_seed(1)
    for _, layer in dora.adapted_layers(ours):
        with torch.no_grad():
            layer.lora_B.normal_(std=0.1)
            if layer.magnitude is not None:
                layer.magnitude.mul_(1.3)
    dora.refresh(ours)
    folder = Location(str(tmp_path / "adapter"))
    dora.save_adapter(folder, dora.adapter_state(ours), adapter, base=str(base), task_type="CAUSAL_LM")
    wanted = peft.LoraConfig(
        r=4,
        lora_alpha=8.0,
        lora_dropout=0.1,
        target_modules=list(TARGETS),
        use_dora=method == "dora",
        base_model_name_or_path=str(base),
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    read = peft.PeftConfig.from_pretrained(str(tmp_path / "adapter"))
    assert type(read) is peft.LoraConfig
    assert {**read.to_dict(), "peft_version": None} == {**wanted.to_dict(), "peft_version": None}
    assert read.target_modules == wanted.target_modules == set(TARGETS)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()
    ids = torch.tensor([[0, 5, 9, 7, 1]])
    ours.eval()
    with torch.no_grad():
        assert torch.allclose(ours(ids).logits, theirs(ids).logits, atol=1e-5)
        assert not torch.allclose(ours(ids).logits, AutoModelForCausalLM.from_pretrained(base)(ids).logits, atol=1e-2)
