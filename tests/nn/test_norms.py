import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from readapt_ray.nn import norms

FAMILIES = {"llama": 5, "mistral": 5, "qwen2": 5, "qwen3": 9, "phi3": 5, "olmo2": 9, "granite": 5, "gemma": 0}


def model_of(family: str) -> torch.nn.Module:
    config = AutoConfig.for_model(
        family,
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
        rms_norm_eps=1e-3,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.normal_(mean=1.0, std=0.3)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_gradients_and_names_stay_as_they_are(family: str) -> None:
    plain = model_of(family)
    fused = copy.deepcopy(plain)
    assert norms.fuse(fused) == FAMILIES[family]
    assert fused.state_dict().keys() == plain.state_dict().keys()
    ids = torch.arange(1, 21)[None]
    for model in (plain, fused):
        model(ids).logits.square().mean().backward()
    torch.testing.assert_close(fused(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-5)
    for (name, one), (_, other) in zip(fused.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-3, msg=name)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_in_bfloat16_it_is_nearer_to_the_exact_norm(device: str) -> None:
    plain = next(module for name, module in model_of("llama").bfloat16().named_modules() if name.endswith("layernorm"))
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = plain.double()(x.double())
    plain.bfloat16()
    ours = norms.FusedRMSNorm(plain.to(device))(x.to(device)).cpu()
    assert ours.dtype == torch.bfloat16
    assert (ours.double() - exact).norm() <= (plain.to("cpu")(x).double() - exact).norm() < 1e-2 * exact.norm()
