"""What a training step costs on a GPU, counted by benchmarks/step_traffic.py: whoever adds a kernel or a copy sees it here.

A figure that falls is lowered here with the change that lowers it.
"""

import pytest
import torch
from transformers import AutoConfig

from benchmarks import compiled_traffic, merged_forward, step_traffic
from readapt_ray.catalog.shapes import shape_of
from readapt_ray.training import dora, memory

TOKENS = 4096
FIGURES = {
    "mistral-7b": (236, 8.18, 167.8),
    "llama-2-7b": (236, 8.15, 166.2),
    "qwen3-0.6b": (238, 2.53, 50.1),
    "modernbert-base": (168, 1.64, 29.4),
}
"""Kernels per layer, elementwise GB per layer, saved KB per token and layer; of forward and backward together."""


@pytest.mark.parametrize("shape", FIGURES)
def test_a_step_starts_no_more_kernels_and_moves_no_more_bytes_than_before(shape: str) -> None:
    found = step_traffic.measure(shape, TOKENS)
    names = ("kernels_per_layer", "elementwise_gb_per_layer", "saved_kb_per_token_and_layer")
    figures = [found[name] for name in names]
    assert figures == pytest.approx(FIGURES[shape], rel=0.01)
    assert found["host_syncs"] == 0


ENCODING = {"mistral-7b": (24, 5.36), "llama-2-7b": (24, 5.82), "qwen3-0.6b": (26, 2.06), "modernbert-base": (30, 1.92)}
"""Kernels per layer, elementwise GB per layer, of 16,384 tokens."""


@pytest.mark.parametrize("shape", ENCODING)
def test_encoding_starts_no_more_kernels_and_moves_no_more_bytes_than_before(shape: str) -> None:
    """Mistral's goal: 5.4 GB."""
    found = step_traffic.measure_encoding(shape, 16_384)
    figures = [found["kernels_per_layer"], found["elementwise_gb_per_layer"]]
    assert figures == pytest.approx(ENCODING[shape], rel=0.01)
    assert found["host_syncs"] == 0


COMPILED = {
    "mistral-7b": (100, 5.13, 156.2),
    "llama-2-7b": (98, 4.99, 158.0),
    "qwen3-0.6b": (106, 1.58, 48.7),
    "modernbert-base": (63, 0.72, 26.0),
}


@pytest.mark.parametrize("shape", COMPILED)
@pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd")
def test_a_compiled_step_is_estimated_at_no_more_than_before(shape: str) -> None:
    """Mistral's goals: 120 kernels, 6.0 GB and 180 KB."""
    found = compiled_traffic.estimate(shape, TOKENS)
    assert list(found.values()) == pytest.approx(COMPILED[shape], rel=0.01)


@pytest.mark.parametrize("shape", FIGURES)
def test_the_check_of_memory_counts_what_is_kept(shape: str) -> None:
    """Within 15%, compiled or not; 7% for Mistral."""
    config = AutoConfig.for_model(**step_traffic.SHAPES[shape]).to_dict()
    objective = "masked_lm" if shape == "modernbert-base" else "causal_lm"
    estimate_kb = 2 * memory.kept_numbers(shape_of(config, shape, objective), "cuda") / 1e3
    for counted_kb in (FIGURES[shape][2], COMPILED[shape][2]):
        assert 0.85 * counted_kb < estimate_kb < (1.11 if shape == "mistral-7b" else 1.07) * counted_kb


@pytest.mark.parametrize(("base_dtype", "read_bytes"), [("int8", 1.0), ("nf4", 0.5 + 4 / 64)])
def test_a_quantized_base_is_decoded_twice_per_layer_and_pass(base_dtype: str, read_bytes: float) -> None:
    """Once forward and once backward, each time written in bfloat16; nothing more is kept."""
    plain, found = (step_traffic.measure("mistral-7b", TOKENS, each) for each in ("auto", base_dtype))
    assert found["kernels_per_layer"] == plain["kernels_per_layer"] + 2 * 7
    weights = 2 * 4096 * (4096 + 1024) + 3 * 4096 * 14336
    more = found["elementwise_gb_per_layer"] - plain["elementwise_gb_per_layer"]
    assert more == pytest.approx(2 * weights * (read_bytes + 2) / 1e9, abs=2e-3)
    same = ("saved_kb_per_token_and_layer", "gemm_tflop_per_layer", "host_syncs")
    assert [found[name] for name in same] == [plain[name] for name in same]


def test_products_are_counted_as_by_hand() -> None:
    """Forward and backward; the gradient of a magnitude takes 64 columns of products, of which the diagonal counts."""
    hidden, intermediate, key = 4096, 14336, 1024
    sizes = [(hidden, hidden)] * 2 + [(hidden, key)] * 2 + [(hidden, intermediate)] * 2 + [(intermediate, hidden)]
    frozen = sum(2 * inputs * outputs for inputs, outputs in sizes)
    low_rank = sum(3 * 32 * (inputs + outputs) for inputs, outputs in sizes)
    magnitudes = sum(64 * outputs for _, outputs in sizes)
    found = step_traffic.measure("mistral-7b", TOKENS)
    assert found["gemm_tflop_per_layer"] == pytest.approx(
        2 * TOKENS * (frozen + low_rank + magnitudes) / 1e12, abs=1e-3
    )


def test_a_merged_forward_pass_gives_the_output_and_gradients_of_an_unmerged_one() -> None:
    """In float32, with factors that have learned something."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 40))
    dora.add_adapters(model, dora.AdapterShape(method="dora", rank=4, alpha=8.0, dropout=0.0, targets=("0",)))
    with torch.no_grad():
        for each in (model[0].lora_B, model[0].magnitude):
            each.add_(torch.randn_like(each) / 5)
    dora.refresh(model)
    found = []
    for change in (merged_forward.drop_dropout, merged_forward.merge_layers):
        change(model)
        x = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = model(x)
        trained = [each for each in model.parameters() if each.requires_grad]
        found.append([y, *torch.autograd.grad((y * torch.linspace(-1, 1, 40)).sum(), [x, *trained])])
    assert len(found[0]) == 5
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
