"""Attention over passages laid end to end in one row: none sees another, and nothing is padded.

Put into transformers' models through its AttentionInterface. On CUDA it is the flash kernel of
`torch.nn.attention.varlen` (torch 2.11 and newer, bfloat16 or float16, no flash-attn package); elsewhere,
and where attention has dropout, torch's own attention over the passages one below the other, those of about
one length together. Either costs about the sum of the squared passage lengths, where a mask over the row
would cost its length squared.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from readapt_ray.errors import ModelError

F = TypeVar("F", bound=Callable[..., Any])

NAME = "readapt_passages"
_KERNEL_DEVICE = "cuda"
_KERNEL_DTYPES = (torch.bfloat16, torch.float16)
_KERNEL_OPTIONS = frozenset({"scale", "window_size"})
"""What torch 2.10 had not yet."""
_UNSUPPORTED = ("softcap", "s_aux")
"""What some models' attention adds to the common one: capped scores, sinks."""
_MIN_WIDTH_STEP = 16


def install(model: Any, name: str) -> None:
    """Make a transformers model attend this way; its batches then say where passages end (cu_seq_lens_q, max_length_q).

    Args:
        model: its layers keep their weights.
        name: what the user calls it.

    Raises:
        ModelError: its attention cannot be exchanged.
    """
    from transformers import AttentionInterface

    if not is_exchangeable(model):
        raise ModelError(
            f"{name} ({type(model).__name__}) does not take attention functions of transformers' AttentionInterface, which "
            f"passages end to end need; give a model whose class does"
        )
    # No mask function beside it: with one, transformers looks for packed rows, and the host waits for the device.
    AttentionInterface.register(NAME, attend)
    model.set_attn_implementation(NAME)


def is_exchangeable(model: Any) -> bool:
    """Return whether a transformers model takes attention functions of transformers' AttentionInterface."""
    return bool(model._can_set_attn_implementation())


def attend(  # noqa: PLR0917 -- the order is transformers'
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return what transformers calls in every layer.

    Args:
        module: the attention layer; says whether it is causal.
        query: [1, heads, tokens, head_dim].
        key: [1, key heads, tokens, head_dim]; fewer heads than queries have is grouped-query attention.
        value: as `key`.
        attention_mask: unused.
        scaling: of the inner products.
        dropout: of the attention's weights.
        cu_seq_lens_q: int32 [passages + 1], where each ends.
        max_length_q: the longest passage.
        is_causal: overrides the module's.
        sliding_window: tokens that a query sees, itself included; None for all.
        others: what else transformers hands over.

    Returns:
        [1, tokens, heads, head_dim], and no weights.

    Raises:
        ModelError: the model's attention is more than this.
    """
    for name in _UNSUPPORTED:
        if others.get(name) is not None:
            raise ModelError(
                f"{type(module).__name__} wants {name}, which passages end to end do not get; give another model"
            )
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    window = sliding_window if sliding_window and sliding_window < max_length_q else None
    if dropout == 0 and has_kernel(value.device, value.dtype):
        output = _by_kernel(query, key, value, scaling, cu_seq_lens_q, max_length_q, causal=causal, window=window)
    elif len(cu_seq_lens_q) == 2 and not torch.is_grad_enabled():  # one alone, such as a query that is served
        output = _alone(query, key, value, scaling, causal=causal, window=window, dropout=dropout)
    else:
        layout = _layout(tuple(cu_seq_lens_q.diff().tolist()), query.device)
        output = _by_passage(query, key, value, scaling, layout, causal=causal, window=window, dropout=dropout)
    return output, None


def _constant_when_compiled(function: F) -> F:
    """Mark a function as `torch.compiler.assume_constant_result` does, which imports the compiler: 1.2 s of a core."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the flash kernel runs there, in this type."""
    return device.type == _KERNEL_DEVICE and dtype in _KERNEL_DTYPES and _is_able(device)


@_constant_when_compiled
def _is_able(device: torch.device) -> bool:
    return _capability(device) >= (8, 0) and _kernel_options() >= _KERNEL_OPTIONS


@_constant_when_compiled
def _takes(option: str) -> bool:
    return option in _kernel_options()


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def _kernel_options() -> frozenset[str]:
    """Return what this torch's kernel takes by name; nothing where there is none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def _by_kernel(  # noqa: PLR0917
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    ends: Tensor,
    longest: int,
    *,
    causal: bool,
    window: int | None,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    query_THD, key_THD, value_THD = (each.squeeze(0).transpose(0, 1).to(value.dtype) for each in (query, key, value))
    left = -1 if window is None else window - 1
    right = 0 if causal else -1 if window is None else window - 1
    grouped: dict[str, Any] = {}
    if _takes("enable_gqa"):  # older ones take fewer key heads unasked
        grouped["enable_gqa"] = query_THD.shape[1] != key_THD.shape[1]
    output_THD: Any = varlen_attn(
        query_THD,
        key_THD,
        value_THD,
        ends,
        ends,
        longest,
        longest,
        scale=scaling,
        window_size=(left, right),
        **grouped,
    )
    output: Tensor = output_THD.unsqueeze(0)
    return output


def _alone(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    *,
    causal: bool,
    window: int | None,
    dropout: float,
) -> Tensor:
    mask = None
    if window is not None:
        length = query.shape[2]
        mask = Group(torch.tensor([length], device=query.device), length).mask(causal=causal, window=window)
    output: Tensor = functional.scaled_dot_product_attention(
        query.to(value.dtype),
        key.to(value.dtype),
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal and mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2)


def _by_passage(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    layout: "Layout",
    *,
    causal: bool,
    window: int | None,
    dropout: float,
) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    states = [layout.spread(each.to(value.dtype).squeeze(0).transpose(0, 1)) for each in (query, key, value)]
    outputs = []
    masks = _masks(layout, causal=causal, window=window)
    for mask, query_NHTD, key_NHTD, value_NHTD in zip(masks, *states, strict=True):
        with torch.autocast(value.device.type, enabled=False):
            output_NHTD = functional.scaled_dot_product_attention(
                query_NHTD,
                key_NHTD,
                value_NHTD,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=causal and mask is None,
                scale=scaling,
            )
        outputs.append(output_NHTD.transpose(1, 2).flatten(0, 1))
    return layout.gather(torch.cat(outputs)).to(value.dtype).unsqueeze(0)


@dataclass(frozen=True)
class Group:
    """Passages of about one length, each in as many slots: the first hold its tokens, the rest are empty."""

    lengths: Tensor
    """int64 [N]"""
    width: int
    """Slots of a passage."""

    @property
    def num_slots(self) -> int:
        """Of all its passages."""
        return len(self.lengths) * self.width

    def mask(self, *, causal: bool, window: int | None) -> Tensor | None:
        """Return what a slot sees: bool, broadcast to [N, heads, width, width]. None is all of them, or all before.

        Empty slots are the last: no token sees them where it sees only what is before it.
        """
        places = torch.arange(self.width, device=self.lengths.device)
        back = places[:, None] - places[None, :]
        if causal:
            return None if window is None or window >= self.width else (back < window) & (back >= 0)
        if window is None and bool((self.lengths == self.width).all()):
            return None
        is_filled = (places < self.lengths[:, None])[:, None, None, :]
        near = back.abs() < (window or self.width)
        # An empty slot sees itself, else its softmax has no term.
        return (near & is_filled) | (back == 0)


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the tokens of a row go: the slots of all groups, one after the other."""

    groups: tuple[Group, ...]
    token_of_slot: Tensor
    """int64 [S]; 0 where the slot is empty."""
    slot_of_token: Tensor
    """int64 [T]"""
    empty_slots: Tensor
    """int64"""

    def spread(self, row_THD: Tensor) -> list[Tensor]:
        """Spread [T, H, D] to [N, H, width, D] of each group; on a CPU in float32, where torch's attention is fastest."""
        slots_SHD: Tensor = _Spread.apply(row_THD, self)  # type: ignore[no-untyped-call]
        parts = torch.split(slots_SHD, [group.num_slots for group in self.groups])
        dtype = torch.float32 if slots_SHD.device.type == "cpu" and slots_SHD.dtype.itemsize < 4 else slots_SHD.dtype
        return [
            part.view(-1, group.width, *part.shape[1:]).transpose(1, 2).to(dtype)
            for part, group in zip(parts, self.groups, strict=True)
        ]

    def gather(self, slots_SHD: Tensor) -> Tensor:
        """Gather [S, H, D] to [T, H, D]."""
        return _Gather.apply(slots_SHD, self)  # type: ignore[no-untyped-call, no-any-return]


class _Spread(torch.autograd.Function):
    """Each token to its slot. Torch's own gradient of indexing adds row by row, ten times slower."""

    @staticmethod
    def forward(ctx: Any, row: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        # Attention multiplies empty slots by 0, which is NaN where a slot holds NaN or infinity: only 0 is safe.
        return row.index_select(0, layout.token_of_slot).index_fill_(0, layout.empty_slots, 0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].index_select(0, ctx.layout.slot_of_token), None


class _Gather(torch.autograd.Function):
    """The inverse of `_Spread`."""

    @staticmethod
    def forward(ctx: Any, slots: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        return slots.index_select(0, layout.slot_of_token)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        layout = ctx.layout
        return gradients[0].index_select(0, layout.token_of_slot).index_fill_(0, layout.empty_slots, 0), None


@functools.lru_cache(maxsize=8)  # every layer asks for the same
def _layout(lengths: tuple[int, ...], device: torch.device) -> Layout:
    """Return passages sorted into few widths."""
    starts = np.cumsum((0, *lengths))
    widths = np.array([_width(length) for length in lengths])
    groups, tokens = [], []
    for width in np.unique(widths):
        mine = np.flatnonzero(widths == width)
        filled = np.array([lengths[number] for number in mine])
        places = np.arange(width)
        tokens.append(np.where(places < filled[:, None], starts[mine, None] + places, -1).ravel())
        groups.append(Group(torch.from_numpy(filled).to(device), int(width)))
    token_of_slot = np.concatenate(tokens)
    is_empty = token_of_slot < 0
    slot_of_token = np.empty(starts[-1], np.int64)
    slot_of_token[token_of_slot[~is_empty]] = np.flatnonzero(~is_empty)
    numbers = (np.where(is_empty, 0, token_of_slot), slot_of_token, np.flatnonzero(is_empty))
    return Layout(tuple(groups), *(torch.from_numpy(each).to(device) for each in numbers))


@functools.lru_cache(maxsize=8)  # as above
def _masks(layout: Layout, *, causal: bool, window: int | None) -> list[Tensor | None]:
    return [group.mask(causal=causal, window=window) for group in layout.groups]


def _width(length: int) -> int:
    """Return a passage's slots: its length and up to a quarter more, 15 where that is more.

    A CPU's matrix library compiles and keeps a program for each shape that it meets: with passages at their
    own lengths a worker grew by 18 MB a step and took half as many steps a second.
    """
    step = max(_MIN_WIDTH_STEP, (1 << (length - 1).bit_length()) // 8)
    return -(-length // step) * step
