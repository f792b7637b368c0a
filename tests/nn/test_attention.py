import pytest
import torch
from torch import nn

from readapt_ray.nn import attention

LENGTHS = (5, 16, 40, 1, 130, 17, 33)


def drawn(num_heads: int, num_tokens: int, seed: int, *, head_dim: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, num_heads, num_tokens, head_dim, generator=generator, dtype=torch.float64, requires_grad=True)


def attend(states, lengths, *, causal: bool, window: int | None) -> torch.Tensor:
    ends = torch.tensor([0, *lengths]).cumsum(0).int().to(states[0].device)
    options = {"cu_seq_lens_q": ends, "max_length_q": max(lengths), "is_causal": causal, "sliding_window": window}
    return attention.attend(nn.Identity(), *states, None, **options)[0]


def expected_of(states, lengths, *, causal: bool, window: int | None) -> torch.Tensor:
    """Attention written out, with a mask over the row."""
    query, key, value = states
    passage = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    back = torch.arange(len(passage))[:, None] - torch.arange(len(passage))
    seen = passage[:, None] == passage
    if causal:
        seen &= back >= 0
    if window is not None:
        seen &= back.abs() < window
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).mT / query.shape[-1] ** 0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("num_key_heads", [4, 2])
def test_passages_attend_to_themselves_alone(causal: bool, window: int | None, num_key_heads: int) -> None:
    states = [drawn(heads, sum(LENGTHS), seed) for seed, heads in enumerate((4, num_key_heads, num_key_heads))]
    with torch.inference_mode():  # what it keeps does not stand in the way of training
        attend(states, LENGTHS, causal=causal, window=window)
    output = attend(states, LENGTHS, causal=causal, window=window)
    expected = expected_of(states, LENGTHS, causal=causal, window=window)
    torch.testing.assert_close(output, expected, atol=1e-12, rtol=0)

    direction = torch.randn(output.shape, dtype=torch.float64)
    ours = torch.autograd.grad((output * direction).sum(), states)
    theirs = torch.autograd.grad((expected * direction).sum(), states)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("poisoned", range(len(LENGTHS)))
def test_a_passage_that_overflows_spoils_no_other(
    poisoned: int, value: float, causal: bool, window: int | None
) -> None:
    """Outputs and gradients of the other passages are those that they have without it."""
    passage = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    is_sound = passage != poisoned
    clean = [drawn(4, sum(LENGTHS), seed) for seed in range(3)]
    spoilt = [each.detach().masked_fill(~is_sound[:, None], value).requires_grad_() for each in clean]
    outputs, gradients = [], []
    for states in (clean, spoilt):
        output = attend(states, LENGTHS, causal=causal, window=window)[:, is_sound]
        outputs.append(output)
        gradients.append([each[:, :, is_sound] for each in torch.autograd.grad(output.sum(), states)])
    assert torch.equal(outputs[0], outputs[1])
    for expected, found in zip(*gradients, strict=True):
        assert torch.equal(expected, found)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("poisoned", range(len(LENGTHS)))
def test_a_passage_that_overflows_spoils_no_other_in_the_flash_kernel(
    kernel_device: str, poisoned: int, causal: bool
) -> None:
    passage = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    is_sound = (passage != poisoned).to(kernel_device)
    clean = [drawn(4, sum(LENGTHS), seed).detach().to(kernel_device, torch.bfloat16) for seed in range(3)]
    spoilt = [each.masked_fill(~is_sound[:, None], torch.nan) for each in clean]
    assert attention.has_kernel(clean[0].device, clean[0].dtype)
    expected, found = (attend(states, LENGTHS, causal=causal, window=None)[:, is_sound] for states in (clean, spoilt))
    assert torch.equal(expected, found)


@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("num_key_heads", [4, 2])
def test_a_passage_alone(causal: bool, window: int | None, num_key_heads: int) -> None:
    states = [drawn(heads, 40, seed) for seed, heads in enumerate((4, num_key_heads, num_key_heads))]
    expected = expected_of(states, (40,), causal=causal, window=window)
    with torch.inference_mode():
        output = attend(states, (40,), causal=causal, window=window)
    torch.testing.assert_close(output, expected.detach(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("num_key_heads", [4, 2])
def test_the_flash_kernel_attends_as_written_out(
    kernel_device: str, causal: bool, window: int | None, num_key_heads: int
) -> None:
    """Forward and backward in bfloat16, against float64."""
    lengths = (*LENGTHS, 700)
    drawn_states = [
        drawn(heads, sum(lengths), seed, head_dim=64) for seed, heads in enumerate((4, *2 * (num_key_heads,)))
    ]
    states = [each.detach().to(kernel_device, torch.bfloat16).requires_grad_() for each in drawn_states]
    exact = [each.detach().double().cpu().requires_grad_() for each in states]
    assert attention.has_kernel(states[0].device, states[0].dtype)
    output = attend(states, lengths, causal=causal, window=window)
    expected = expected_of(exact, lengths, causal=causal, window=window)
    direction = torch.randn(expected.shape, dtype=torch.float64)
    ours = torch.autograd.grad((output * direction.to(output)).sum(), states)
    theirs = torch.autograd.grad((expected * direction).sum(), exact)
    for one, other in zip((output, *ours), (expected, *theirs), strict=True):
        assert (one.double().cpu() - other).norm() / other.norm() < 1e-2


def test_torch_without_the_kernels_options_goes_without_it(monkeypatch) -> None:
    """As torch 2.10 has it, whose GPUs pad."""
    monkeypatch.setattr(attention, "_capability", lambda device: (9, 0))
    device = torch.device("cuda")
    assert attention.has_kernel(device, torch.bfloat16) and not attention.has_kernel(device, torch.float32)
    monkeypatch.setattr(attention, "_kernel_options", lambda: frozenset({"is_causal", "return_aux"}))
    assert not attention.has_kernel(device, torch.bfloat16)
    monkeypatch.undo()
    monkeypatch.setattr(attention, "_capability", lambda device: (7, 5))
    assert not attention.has_kernel(device, torch.float16)


def test_few_shapes_for_many_lengths() -> None:
    """A CPU's matrix library keeps a program for each."""
    widths = {attention._width(length) for length in range(1, 4097)}
    assert len(widths) <= 32
    assert all(length <= attention._width(length) <= max(length + 15, 1.25 * length) for length in range(1, 4097))
