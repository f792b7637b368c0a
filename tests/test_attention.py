import pytest
import torch
from torch import nn

from readapt_ray import attention

LENGTHS = (5, 16, 40, 1, 130, 17, 33)


@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("num_key_heads", [4, 2])
def test_passages_attend_to_themselves_alone(causal: bool, window: int | None, num_key_heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    num_tokens = sum(LENGTHS)

    def drawn(num_heads: int) -> torch.Tensor:
        return torch.randn(1, num_heads, num_tokens, 8, generator=generator, dtype=torch.float64, requires_grad=True)

    query, key, value = drawn(4), drawn(num_key_heads), drawn(num_key_heads)
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    output, _ = attention.attend(
        nn.Identity(),
        query,
        key,
        value,
        None,
        cu_seq_lens_q=ends,
        max_length_q=max(LENGTHS),
        is_causal=causal,
        sliding_window=window,
    )
    passage = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    back = torch.arange(num_tokens)[:, None] - torch.arange(num_tokens)
    seen = passage[:, None] == passage
    if causal:
        seen &= back >= 0
    if window is not None:
        seen &= back.abs() < window
    scores = query @ key.repeat_interleave(4 // num_key_heads, 1).mT / 8**0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    expected = (weights @ value.repeat_interleave(4 // num_key_heads, 1)).transpose(1, 2)
    torch.testing.assert_close(output, expected, atol=1e-12, rtol=0)

    direction = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    ours = torch.autograd.grad((output * direction).sum(), (query, key, value))
    theirs = torch.autograd.grad((expected * direction).sum(), (query, key, value))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_few_shapes_for_many_lengths() -> None:
    """A CPU's matrix library keeps a program for each."""
    widths = {attention._width(length) for length in range(1, 4097)}
    assert len(widths) <= 32
    assert all(length <= attention._width(length) <= max(length + 15, 1.25 * length) for length in range(1, 4097))
