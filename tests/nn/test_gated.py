import copy

import pytest
import torch

from readapt_ray.nn import gated
from tests.nn.test_norms import model_of


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "olmo2", "granite"])
def test_outputs_gradients_and_names_stay_as_they_are(family: str) -> None:
    plain = model_of(family).double()
    fused = copy.deepcopy(plain)
    assert gated.fuse(fused) == 2
    assert fused.state_dict().keys() == plain.state_dict().keys()
    ids = torch.arange(1, 21)[None]
    for model in (plain, fused):
        model(ids).logits.square().mean().backward()
    torch.testing.assert_close(fused(ids).logits, plain(ids).logits, atol=1e-12, rtol=1e-12)
    for (name, one), (_, other) in zip(fused.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-12, rtol=1e-9, msg=name)


def test_an_mlp_with_another_activation_stays() -> None:
    assert gated.fuse(model_of("gemma")) == 0
