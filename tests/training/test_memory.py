"""The estimate of memory against a hand count, and against a process that is measured."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

from readapt_ray import hardware
from readapt_ray.catalog.shapes import shape_of
from readapt_ray.errors import PlacementError
from readapt_ray.training import memory, speed
from readapt_ray.training.dora import AdapterShape
from readapt_ray.training.memory import WorkerSetup

H, F, V, L, R = 64, 160, 1000, 3, 8
CONFIG = LlamaConfig(
    hidden_size=H,
    intermediate_size=F,
    vocab_size=V,
    num_hidden_layers=L,
    num_attention_heads=4,
    tie_word_embeddings=False,
)
SHAPE = AdapterShape(method="dora", rank=R, alpha=16.0, dropout=0.0, targets=("q_proj", "down_proj"))
FROZEN = 2 * V * H + L * (4 * H * H + 3 * H * F + 2 * H) + H
TRAINED = L * ((R * H + R * H + H) + (R * F + R * H + H))


HEADED = shape_of(CONFIG.to_dict(), "model", "causal_lm")


def setup(zero_stage: int = 0, num_workers: int = 4, *, recompute: bool = False) -> WorkerSetup:
    return WorkerSetup(
        adapter=SHAPE,
        num_workers=num_workers,
        zero_stage=zero_stage,
        micro_batch_tokens=512,
        dtype=torch.bfloat16,
        gradient_checkpointing=recompute,
        device_type="cuda",
    )


def test_weights_gradients_and_moments_are_counted_exactly() -> None:
    whole = memory.estimate_memory(HEADED, setup()).parts
    assert whole["frozen weights"] == 2 * FROZEN
    assert whole["trained weights"] == whole["gradients"] == 4 * TRAINED
    assert whole["optimizer"] == 8 * TRAINED
    by_stage = {stage: memory.estimate_memory(HEADED, setup(stage)).parts for stage in (1, 2, 3)}
    assert [by_stage[stage]["optimizer"] for stage in (1, 2, 3)] == [3 * TRAINED] * 3
    sent = 2 * 25 * 1024**2
    assert [by_stage[stage]["gradients"] - sent for stage in (1, 2, 3)] == [4 * TRAINED, TRAINED, TRAINED]
    assert [by_stage[stage]["frozen weights"] for stage in (1, 2, 3)] == [2 * FROZEN, 2 * FROZEN, FROZEN // 2]


def test_checkpointed_activations_are_one_layers() -> None:
    plain = memory.estimate_memory(HEADED, setup()).parts["activations"]
    recomputed = memory.estimate_memory(HEADED, setup(recompute=True)).parts["activations"]
    assert recomputed == plain // L + L * 512 * H * 2


def test_what_is_kept_on_a_gpu_is_counted_from_the_linear_layers() -> None:
    """A layer has four products of H to H, two of H to F and one back; query and key are kept rotated, too."""
    kept = (4 * H + 2 * F + H) + (2 * H + H) + F + 4 * H
    found = [
        memory.estimate_memory(HEADED, replace(setup(), device_type=device)).parts["activations"]
        for device in ("cuda", "cpu")
    ]
    assert found == [L * 512 * 2 * each for each in (kept, 16 * H + 6 * F)]


def test_a_measured_run_corrects_the_next_start() -> None:
    first = memory.estimate_memory(HEADED, setup())
    measured = first.total_bytes + 2 * first.parts["activations"]
    correction = first.corrected(measured)
    second = memory.estimate_memory(HEADED, setup(), correction=correction)
    assert correction == pytest.approx(3.0)
    assert second.total_bytes == pytest.approx(measured, rel=1e-6)
    assert "times 3.00 as measured before" in second.arithmetic()


def test_what_does_not_fit_is_refused_with_the_sum() -> None:
    found = memory.estimate_memory(HEADED, setup(3))
    memory.check_fits(HEADED, setup(3), free_bytes=found.total_bytes)
    with pytest.raises(PlacementError, match=r"has 0\.00 GB: frozen weights .* over 4 workers\) \+ .* = \d") as refused:
        memory.check_fits(HEADED, setup(3), free_bytes=1000)
    assert "zero_stage" in str(refused.value)


def test_what_would_fit_is_named_with_its_bytes() -> None:
    sizes = [
        memory.estimate_memory(HEADED, replace(setup(), base_dtype=kind, gradient_checkpointing=True)).total_bytes
        for kind in ("auto", "int8", "nf4")
    ]
    assert sizes == sorted(sizes, reverse=True)
    for size, named in zip(
        sizes, ("set grad", "set base_dtype int8 and grad", "set base_dtype nf4 and grad"), strict=True
    ):
        with pytest.raises(
            PlacementError, match=rf"Lower micro_batch_tokens, {named}.* true, which needs .* GB, raise"
        ):
            memory.check_fits(HEADED, setup(), free_bytes=size)
    assert memory.advice_that_fits(HEADED, setup(), sizes[-1] - 1) == ""
    assert memory.advice_that_fits(HEADED, replace(setup(), adapter=None), sizes[0]) == ""


def test_workers_share_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "free_memory_bytes", lambda: 1_200)
    assert memory.free_bytes(torch.device("cpu"), 2) == 600


def test_flops_are_four_a_frozen_and_six_a_trained_weight() -> None:
    matrices = V * H + L * (4 * H * H + 3 * H * F)
    low_rank = L * R * (H + H + F + H)
    attention = 12 * L * H * 10
    assert speed.flops_per_token(HEADED, SHAPE, mean_tokens=20) == 4 * matrices + 6 * low_rank + attention
    encoder = replace(HEADED, is_causal=False)  # a token attends to all tokens, not to those before it
    assert speed.flops_per_token(encoder, SHAPE, mean_tokens=10) == 4 * matrices + 6 * low_rank + attention
