"""Compute attention over passages that are packed into one row, without padding; tokens attend only within a passage.

It is registered with transformers' AttentionInterface. On CUDA it calls the flash kernel of
`torch.nn.attention.varlen` (torch 2.11 and newer, bfloat16 or float16, compute capability 8.0 and newer; the package
flash-attn is not needed). Otherwise, and with attention dropout, it calls torch's `scaled_dot_product_attention` on
batches of passages with similar lengths. Both cost about the sum of the squared passage lengths; a mask over the row
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
"""Parameters of the kernel that torch 2.10 lacks."""
_UNSUPPORTED = ("softcap", "s_aux")
"""Arguments of attention variants that are not supported: capped scores, attention sinks."""
_MIN_WIDTH_STEP = 16


def install(model: Any, name: str) -> None:
    """Replace the attention of a transformers model by `attend`, in place.

    Its batches must then contain `cu_seq_lens_q` and `max_length_q`, which say where passages end (see `attend`).
    Padding is not masked, since the attention mask is not used.

    Args:
        model: the transformers model.
        name: the user's name of the model, for the error message.

    Raises:
        ModelError: the model's class does not let its attention be replaced.
    """
    from transformers import AttentionInterface

    if not is_exchangeable(model):
        raise ModelError(
            f"{name} ({type(model).__name__}) does not take attention functions of transformers' AttentionInterface, which "
            f"passages end to end need; give a model whose class does"
        )
    # Register no mask function: with one, transformers searches for packed rows, and the CPU waits for the GPU.
    AttentionInterface.register(NAME, attend)
    model.set_attn_implementation(NAME)


def is_exchangeable(model: Any) -> bool:
    """Return whether `install` can replace the attention of a transformers model (through AttentionInterface)."""
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
    """Compute attention within each passage of a packed row; transformers calls this in every layer.

    Args:
        module: the attention layer; its attribute `is_causal` decides unless the argument does.
        query: [1, heads, tokens, head_dim].
        key: [1, key heads, tokens, head_dim]; with fewer key heads than heads it is grouped-query attention.
        value: same shape as `key`.
        attention_mask: unused.
        scaling: factor of the inner products; None for 1 / sqrt(head_dim).
        dropout: dropout probability of the attention weights.
        cu_seq_lens_q: int32 [passages + 1]: 0, then the end of each passage.
        max_length_q: length of the longest passage, in tokens.
        is_causal: whether tokens attend only to earlier tokens and themselves; None for the module's value, and True if
            it has none.
        sliding_window: a token attends only to tokens that are fewer positions than this away. That is `sliding_window`
            tokens with itself if causal, else on each side. None for no limit.
        others: further arguments of transformers; unused, except that unsupported parts are refused.

    Returns:
        The output [1, tokens, heads, head_dim], and None in place of the attention weights.

    Raises:
        ModelError: the model's attention has parts that are not supported here, such as softcap.
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
    elif len(cu_seq_lens_q) == 2 and not torch.is_grad_enabled():  # one passage, such as a query in serving
        output = _alone(query, key, value, scaling, causal=causal, window=window, dropout=dropout)
    else:
        layout = _layout(tuple(cu_seq_lens_q.diff().tolist()), query.device)
        output = _by_passage(query, key, value, scaling, layout, causal=causal, window=window, dropout=dropout)
    return output, None


def _constant_when_compiled(function: F) -> F:
    """Mark a function like `torch.compiler.assume_constant_result`, without importing the compiler (1.2 s of CPU)."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the flash kernel supports a device and data type.

    It needs CUDA with compute capability 8.0 or newer, bfloat16 or float16, and a torch that has it (2.11 and newer).
    """
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
    """Return the parameter names of this torch's kernel; empty if it has no kernel."""
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
    if _takes("enable_gqa"):  # older kernels accept fewer key heads without this argument
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
    states = [layout.to_slots(each.to(value.dtype).squeeze(0).transpose(0, 1)) for each in (query, key, value)]
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
    return layout.to_tokens(torch.cat(outputs)).to(value.dtype).unsqueeze(0)


@dataclass(frozen=True)
class Group:
    """A batch of N passages with similar lengths, padded to `width` slots each.

    A slot is a position in the padded batch that holds one token or is empty. Empty slots of a passage come last.
    """

    lengths: Tensor
    """Tokens of each passage, int64 [N]."""
    width: int
    """Slots per passage."""

    @property
    def num_slots(self) -> int:
        """Return the number of slots of all its passages, with empty ones: N * width."""
        return len(self.lengths) * self.width

    def mask(self, *, causal: bool, window: int | None) -> Tensor | None:
        """Return the attention mask: bool, broadcasts to [N, heads, width, width]; None if none is needed.

        True marks pairs (query slot, key slot) that attend. Causal attention without a window needs no mask: empty
        slots come last, so no token attends to them. Other attention needs none if it has no window and no slot is
        empty.

        Args:
            causal: whether tokens attend only to earlier tokens and themselves.
            window: `sliding_window` of `attend`; None for no limit.
        """
        places = torch.arange(self.width, device=self.lengths.device)
        back = places[:, None] - places[None, :]
        if causal:
            return None if window is None or window >= self.width else (back < window) & (back >= 0)
        if window is None and bool((self.lengths == self.width).all()):
            return None
        is_filled = (places < self.lengths[:, None])[:, None, None, :]
        near = back.abs() < (window or self.width)
        # An empty slot attends to itself: a softmax over no slot would be NaN.
        return (near & is_filled) | (back == 0)


@dataclass(frozen=True, eq=False)
class Layout:
    """The slot of each of the T tokens of a packed row; the S slots of all groups follow each other."""

    groups: tuple[Group, ...]
    token_of_slot: Tensor
    """Token of each slot, int64 [S]; 0 for an empty slot."""
    slot_of_token: Tensor
    """Slot of each token, int64 [T]."""
    empty_slots: Tensor
    """Numbers of the empty slots, int64."""

    def to_slots(self, row_THD: Tensor) -> list[Tensor]:
        """Copy the tokens of a packed row [T, H, D] to padded slots; return one tensor [N, H, width, D] per group.

        Empty slots are 0. On CPUs, bfloat16 and float16 become float32, which is the fastest there. Gradients flow
        back.
        """
        slots_SHD: Tensor = _ToSlots.apply(row_THD, self)  # type: ignore[no-untyped-call]
        parts = torch.split(slots_SHD, [group.num_slots for group in self.groups])
        dtype = torch.float32 if slots_SHD.device.type == "cpu" and slots_SHD.dtype.itemsize < 4 else slots_SHD.dtype
        return [
            part.view(-1, group.width, *part.shape[1:]).transpose(1, 2).to(dtype)
            for part, group in zip(parts, self.groups, strict=True)
        ]

    def to_tokens(self, slots_SHD: Tensor) -> Tensor:
        """Return each token's row from the padded slots, without the empty slots: [S, H, D] to [T, H, D].

        It undoes `to_slots`, after the groups were joined to [S, H, D] in their order. Gradients flow back.
        """
        return _ToTokens.apply(slots_SHD, self)  # type: ignore[no-untyped-call, no-any-return]


class _ToSlots(torch.autograd.Function):
    """Copies each token to its slot. The gradient is a copy too: torch's gradient of indexing is ten times slower."""

    @staticmethod
    def forward(ctx: Any, row: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        # Fill empty slots with 0: attention multiplies them by 0, and 0 times infinity or NaN is NaN.
        return row.index_select(0, layout.token_of_slot).index_fill_(0, layout.empty_slots, 0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].index_select(0, ctx.layout.slot_of_token), None


class _ToTokens(torch.autograd.Function):
    """Copies the values of slots back to the tokens: the inverse of `_ToSlots`."""

    @staticmethod
    def forward(ctx: Any, slots: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        return slots.index_select(0, layout.slot_of_token)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        layout = ctx.layout
        return gradients[0].index_select(0, layout.token_of_slot).index_fill_(0, layout.empty_slots, 0), None


@functools.lru_cache(maxsize=8)  # all layers of a model use the same layout
def _layout(lengths: tuple[int, ...], device: torch.device) -> Layout:
    """Group passages by padded width, and return the slots of their tokens."""
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


@functools.lru_cache(maxsize=8)  # all layers use the same masks
def _masks(layout: Layout, *, causal: bool, window: int | None) -> list[Tensor | None]:
    return [group.mask(causal=causal, window=window) for group in layout.groups]


def _width(length: int) -> int:
    """Return the number of slots of a passage: its length rounded up, by at most a quarter or 15, whichever is more.

    Few widths are better: the CPU's matrix library compiles and keeps a program for each new shape. Without rounding, a
    worker grew by 18 MB per step and took half as many steps per second.
    """
    step = max(_MIN_WIDTH_STEP, (1 << (length - 1).bit_length()) // 8)
    return -(-length // step) * step
