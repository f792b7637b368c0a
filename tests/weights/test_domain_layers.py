"""A layer whose slices of tokens are of many domains: what it adds to each, one by one and together."""

import pytest
import torch

from readapt_ray.weights import domain_layers
from readapt_ray.weights.deltas import Factors
from readapt_ray.weights.domain_layers import Domain, DomainBatch, DomainLinear, DomainUse

IN, OUT = 48, 80


def _factors(random, rank, *, with_magnitude=True):
    made = Factors(
        A_rI=torch.randn(rank, IN, generator=random) / 7, B_Or=torch.randn(OUT, rank, generator=random) / 3, scaling=0.5
    )
    magnitude = 1 + torch.rand(OUT, generator=random) if with_magnitude else None
    return Factors(A_rI=made.A_rI, B_Or=made.B_Or, scaling=made.scaling, magnitude=magnitude)


def _merged(pretrained, retriever, factors, scales):
    """The domain's weight in float64 (RE-AdaptIR, section 2.2)."""
    weight = pretrained.double()
    result = weight.clone()
    if retriever is not None:
        result += retriever.scaling * retriever.B_Or.double() @ retriever.A_rI.double()
    for each, scale in zip(factors, scales, strict=True):
        tuned = weight + each.scaling * each.B_Or.double() @ each.A_rI.double()
        if each.magnitude is not None:
            tuned *= (each.magnitude.double() / tuned.norm(dim=1)).unsqueeze(1)
        result += scale * (tuned - weight)
    return result


def _layer(random, retriever, *, keeps_pretrained, has_bias):
    pretrained = (torch.randn(OUT, IN, generator=random) / 7).bfloat16().float()
    linear = torch.nn.Linear(IN, OUT, bias=has_bias)
    weight = pretrained.clone()
    if retriever is not None:
        weight += retriever.scaling * retriever.B_Or @ retriever.A_rI
    linear.weight.data = weight.bfloat16()
    if has_bias:
        linear.bias.data = torch.randn(OUT, generator=random).bfloat16()
    layer = DomainLinear(
        linear,
        name="w",
        batch=DomainBatch(),
        pretrained_OI=pretrained.bfloat16() if keeps_pretrained else None,
        retriever=retriever,
        norm_squared_O=pretrained.square().sum(1),
    )
    return layer, pretrained


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("num_adapters", [1, 2])
@pytest.mark.parametrize("is_dora", [True, False])
@pytest.mark.parametrize("kind", ["none", "lora", "full"])
@pytest.mark.parametrize("lengths", [(5, 5, 5, 5), (5, 3, 8, 4), (5, 5, 5, 2, 5)], ids=str)
@torch.inference_mode()
def test_slices_of_one_length_are_multiplied_together_and_all_are_as_the_merged_weight(  # noqa: PLR0917
    monkeypatch, grouped, num_adapters, is_dora, kind, lengths
):
    monkeypatch.setattr(domain_layers, "_has_grouped_products", lambda device: grouped)
    random = torch.Generator().manual_seed(num_adapters)
    retriever = _factors(random, 4, with_magnitude=False) if kind == "lora" else None
    layer, pretrained = _layer(random, retriever, keeps_pretrained=kind == "full", has_bias=kind == "none")
    factors = [[_factors(random, 3 + k, with_magnitude=is_dora) for k in range(num_adapters)] for _ in lengths]
    scales = [tuple(0.5 if number % 2 else 0.3 for _ in each) for number, each in enumerate(factors)]
    uses = [
        DomainUse(Domain(name=str(number), terms={"w": layer.terms_of(each)}, num_bytes=0), scale)
        for number, (each, scale) in enumerate(zip(factors, scales, strict=True))
    ]
    layer.batch.uses, layer.batch.num_tokens = [None, *uses, None], [2, *lengths, 3]
    x = torch.randn(sum(layer.batch.num_tokens), IN, generator=random).bfloat16()
    together, real = [], domain_layers._add_together
    monkeypatch.setattr(domain_layers, "_add_together", lambda out, own: together.append(len(own)) or real(out, own))
    found = layer(x)
    assert together == ([4] if lengths == (5, 5, 5, 5) and not grouped else [])
    monkeypatch.setattr(domain_layers, "_are_alike", lambda _: False)
    monkeypatch.setattr(domain_layers, "_has_grouped_products", lambda device: False)
    torch.testing.assert_close(found.float(), layer(x).float(), atol=0.03, rtol=0.03)
    bias = 0 if layer.bias is None else layer.bias.double()
    merged = [_merged(pretrained, retriever, *each) for each in zip(factors, scales, strict=True)]
    plain = _merged(pretrained, retriever, [], [])
    expected = [
        part.double() @ weight.T + bias
        for part, weight in zip(x.split([2, *lengths, 3]), [plain, *merged, plain], strict=True)
    ]
    cosines = torch.nn.functional.cosine_similarity(found.double(), torch.cat(expected), dim=1)
    assert cosines.min() > 0.9995


@torch.inference_mode()
def test_slices_of_unlike_ranks_or_with_others_between_them_are_added_one_by_one(monkeypatch):
    random = torch.Generator().manual_seed(0)
    layer, _ = _layer(random, None, keeps_pretrained=False, has_bias=False)
    uses = [
        DomainUse(Domain(name=str(rank), terms={"w": layer.terms_of([_factors(random, rank)])}, num_bytes=0), (0.5,))
        for rank in (3, 3, 4)
    ]
    monkeypatch.setattr(domain_layers, "_add_together", None)
    x = torch.randn(12, IN, generator=random).bfloat16()
    for batch in (
        [uses[0], uses[1], uses[2]],
        [uses[0], None, uses[1]],
        [uses[0], DomainUse(uses[1].domain, (0.0,)), None],
    ):
        layer.batch.uses, layer.batch.num_tokens = batch, [4, 4, 4]
        found = layer(x)
        for number, use in enumerate(batch):
            layer.batch.uses, layer.batch.num_tokens = [use], [4]
            torch.testing.assert_close(found[4 * number : 4 * number + 4], layer(x[4 * number : 4 * number + 4]))


@pytest.mark.parametrize("num_domains", [1, 4])
@torch.inference_mode()
def test_magnitudes_that_change_little_are_not_rounded_away(num_domains):
    """All rows grow by .3%: 1.003 is 1 in bfloat16, and .003 is not 0."""
    random = torch.Generator().manual_seed(0)
    layer, pretrained = _layer(random, None, keeps_pretrained=False, has_bias=False)
    made = _factors(random, 3, with_magnitude=False)
    magnitude = 1.003 * pretrained.norm(dim=1)
    terms = layer.terms_of([Factors(A_rI=made.A_rI, B_Or=0 * made.B_Or, magnitude=magnitude, scaling=1.0)])
    use = DomainUse(Domain(name="a", terms={"w": terms}, num_bytes=0), (1.0,))
    x = torch.randn(400 * num_domains, IN, generator=random).bfloat16()
    layer.batch.uses, layer.batch.num_tokens = [use] * num_domains, [400] * num_domains
    plain = x.double() @ pretrained.double().T
    assert 1.002 < float(layer(x).double().abs().sum() / plain.abs().sum()) < 1.004


@torch.inference_mode()
def test_grouped_products_take_unlike_ranks_domains_without_magnitudes_and_one_without_tokens(monkeypatch):
    random = torch.Generator().manual_seed(3)
    retriever = _factors(random, 4, with_magnitude=False)
    layer, _ = _layer(random, retriever, keeps_pretrained=False, has_bias=True)
    ranks, lengths, scales = (3, 16, 9), (6, 1, 4), (0.5, 1.0, 0.25)
    uses = [
        DomainUse(
            Domain(
                name=str(rank),
                terms={"w": layer.terms_of([_factors(random, rank, with_magnitude=rank != 9)])},
                num_bytes=0,
            ),
            (scale,),
        )
        for rank, scale in zip(ranks, scales, strict=True)
    ]
    x = torch.randn(sum(lengths) + 2, IN, generator=random).bfloat16()
    layer.batch.uses, layer.batch.num_tokens = [*uses, None], [*lengths, 2]
    wanted = layer(x)
    monkeypatch.setattr(domain_layers, "_has_grouped_products", lambda device: True)
    monkeypatch.setattr(domain_layers, "_add", None)
    torch.testing.assert_close(layer(x).float(), wanted.float(), atol=0.03, rtol=0.03)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("failing", ["", "wrong", "missing"])
def test_grouped_products_are_compared_before_they_are_used(monkeypatch, caplog, device, failing):
    real = domain_layers.functional.grouped_mm

    def product(x, factors, *, offs):
        if failing == "missing":
            raise RuntimeError("grouped gemm is not supported on this device")
        return 2 * real(x, factors, offs=offs)

    if failing:
        monkeypatch.setattr(domain_layers.functional, "grouped_mm", product)
    with caplog.at_level("WARNING", "readapt_ray"):
        assert domain_layers._grouped_are_right(torch.device(device)) is (not failing)
    assert len(caplog.messages) == bool(failing)
    assert all("one after the other, without grouped products" in each for each in caplog.messages)
    assert not domain_layers._has_grouped_products(torch.device("cpu")), "CPUs have a faster way"
