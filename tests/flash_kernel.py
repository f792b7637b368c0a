"""A stand-in for torch's flash kernel on a CPU: slow, in float64, with the kernel's conditions on what it is given.

So the call is tried on every machine, through the installed torch's own `torch.nn.attention.varlen`. Unlike the
kernel it takes float32 too.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from readapt_ray.nn import attention


@contextlib.contextmanager
def installed(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, attention on a CPU goes by the kernel."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", _forward, "CPU")
    library.impl("_flash_attention_backward", _backward, "CPU")
    patch.setattr(attention, "_KERNEL_DEVICE", "cpu")
    patch.setattr(attention, "_KERNEL_DTYPES", (torch.bfloat16, torch.float16, torch.float32))
    patch.setattr(attention, "_capability", lambda device: (9, 0))
    yield
    library._destroy()


def _forward(  # noqa: PLR0917 -- the order is torch's
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_ends: torch.Tensor,
    key_ends: torch.Tensor,
    longest_query: int,
    longest_key: int,
    dropout: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, ...]:
    assert query.dtype == key.dtype == value.dtype
    assert all(each.stride(-1) == 1 for each in (query, key, value))
    assert query_ends.dtype == key_ends.dtype == torch.int32 and torch.equal(query_ends, key_ends)
    assert query.shape[1] % key.shape[1] == 0 and query.shape[2] % 8 == 0 and query.shape[2] <= 256
    assert longest_query == longest_key == int(query_ends.diff().max()) and query_ends[-1] == len(query)
    window = window_size_left, window_size_right
    passages = _weights(query, key, query_ends, scale, is_causal=is_causal, window=window)
    output = torch.cat([_heads_last(weights @ _of_all_heads(query, value, rows)) for rows, weights in passages])
    unused = torch.empty(0)
    lse = torch.zeros(query.shape[1], len(query))
    return output.to(query.dtype), lse, torch.zeros(2, dtype=torch.uint64), unused, unused


def _backward(  # noqa: PLR0917
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    query_ends: torch.Tensor,
    key_ends: torch.Tensor,
    longest_query: int,
    longest_key: int,
    dropout: float,
    is_causal: bool,
    rng_state: torch.Tensor,
    unused: torch.Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[torch.Tensor, ...]:
    window = window_size_left, window_size_right
    scale = scale or query.shape[2] ** -0.5
    found: list[list[torch.Tensor]] = [[], [], []]
    for rows, weights in _weights(query, key, query_ends, scale, is_causal=is_causal, window=window):
        query_HTD, key_HTD, value_HTD, gradient_HTD = (
            _of_all_heads(query, each, rows) for each in (query, key, value, gradient)
        )
        weights_gradient = gradient_HTD @ value_HTD.mT
        scores_gradient = weights * (weights_gradient - (weights_gradient * weights).sum(-1, keepdim=True)) * scale
        found[0].append(_heads_last(scores_gradient @ key_HTD))
        found[1].append(_heads_last(scores_gradient.mT @ query_HTD))
        found[2].append(_heads_last(weights.mT @ gradient_HTD))
    shapes = query.shape, *2 * ((len(key), key.shape[1], -1, key.shape[2]),)
    whole = [torch.cat(parts).view(shape) for parts, shape in zip(found, shapes, strict=True)]
    return whole[0].to(query.dtype), whole[1].sum(2).to(query.dtype), whole[2].sum(2).to(query.dtype)


def _weights(
    query: torch.Tensor,
    key: torch.Tensor,
    ends: torch.Tensor,
    scale: float | None,
    *,
    is_causal: bool,
    window: tuple[int | None, int | None],
) -> Iterator[tuple[slice, torch.Tensor]]:
    """The rows of each passage, and who attends to whom in it: float64 [heads, T, T]; -1 leaves a window's side open."""
    left, right = window
    for start, stop in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        back = torch.arange(stop - start)[:, None] - torch.arange(stop - start)
        seen = torch.ones_like(back, dtype=torch.bool)
        if left is not None and left >= 0:
            seen &= back <= left
        if right is not None and right >= 0:
            seen &= back >= -right
        if is_causal:
            seen &= back >= 0
        rows = slice(start, stop)
        scores = _of_all_heads(query, query, rows) @ _of_all_heads(query, key, rows).mT
        scores = scores * (scale or query.shape[2] ** -0.5)
        yield rows, scores.masked_fill(~seen, -torch.inf).softmax(-1)


def _of_all_heads(query: torch.Tensor, states: torch.Tensor, rows: slice) -> torch.Tensor:
    """[T, heads, D] to float64 [query's heads, T, D]: a key's head serves a group of the query's."""
    return states[rows].double().transpose(0, 1).repeat_interleave(query.shape[1] // states.shape[1], 0)


def _heads_last(states_HTD: torch.Tensor) -> torch.Tensor:
    return states_HTD.transpose(0, 1)
