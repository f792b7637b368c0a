"""Attention over passages laid end to end in one row: none sees another, and nothing is padded.

Put into transformers' models through its AttentionInterface. On CUDA it is the flash kernel of
`torch.nn.attention.varlen` (torch 2.10 and newer, bfloat16 or float16, no flash-attn package); elsewhere,
and where attention has dropout, torch's own attention passage by passage. Either costs the sum of the
squared passage lengths, where a mask over the row would cost its length squared.
"""

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from readapt_ray.errors import ModelError

NAME = "readapt_passages"
_KERNEL_DTYPES = (torch.bfloat16, torch.float16)
_UNSUPPORTED = ("softcap", "s_aux")
"""What some models' attention adds to the common one: capped scores, sinks."""


def install(model: Any, name: str) -> None:
    """Make a transformers model attend this way; its batches are then those of packing.py.

    Args:
        model: its layers keep their weights.
        name: what the user calls it.

    Raises:
        ModelError: its attention cannot be exchanged.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    if not model._can_set_attn_implementation():
        raise ModelError(
            f"{name} ({type(model).__name__}) does not take attention functions of transformers' AttentionInterface, which "
            f"training here needs; give a model whose class does"
        )
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, _no_mask)
    model.set_attn_implementation(NAME)


def _no_mask(*_: Any, **__: Any) -> None:
    """Which tokens see which follows from the passages' ends."""


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
    """What transformers calls in every layer.

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
                f"{type(module).__name__} wants {name}, which training here does not do; give another model"
            )
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    window = sliding_window if sliding_window and sliding_window < max_length_q else None
    if _kernel_runs(value, dropout):
        output = _by_kernel(query, key, value, scaling, cu_seq_lens_q, max_length_q, causal=causal, window=window)
    else:
        lengths = cu_seq_lens_q.diff().tolist()
        output = _by_passage(query, key, value, scaling, lengths, causal=causal, window=window, dropout=dropout)
    return output, None


def _kernel_runs(value: Tensor, dropout: float) -> bool:
    return (
        value.device.type == "cuda"
        and value.dtype in _KERNEL_DTYPES
        and dropout == 0
        and importlib.util.find_spec("torch.nn.attention.varlen") is not None
        and torch.cuda.get_device_capability(value.device) >= (8, 0)
    )


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
    query_THD, key_THD, value_THD = (each.squeeze(0).transpose(0, 1).to(value.dtype) for each in (query, key, value))
    left = -1 if window is None else window - 1
    right = 0 if causal else -1 if window is None else window - 1
    output_THD = _kernel()(
        query_THD,
        key_THD,
        value_THD,
        ends,
        ends,
        longest,
        longest,
        scale=scaling,
        window_size=(left, right),
        enable_gqa=query_THD.shape[1] != key_THD.shape[1],
    )
    return output_THD.unsqueeze(0)  # type: ignore[no-any-return]


def _kernel() -> Any:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


def _by_passage(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    lengths: list[int],
    *,
    causal: bool,
    window: int | None,
    dropout: float,
) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    # split and cat: their gradients are a cat and a split, where that of a slice is a row of zeros for each passage.
    parts = [torch.split(each.to(value.dtype), lengths, dim=2) for each in (query, key, value)]
    outputs = []
    for query_HTD, key_HTD, value_HTD in zip(*parts, strict=True):
        num_tokens = query_HTD.shape[2]
        mask = None
        if window is not None and num_tokens > window:
            mask = _band(num_tokens, window, causal=causal, device=query.device)
        outputs.append(
            functional.scaled_dot_product_attention(
                query_HTD,
                key_HTD,
                value_HTD,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=causal and mask is None,
                scale=scaling,
            ).transpose(1, 2)
        )
    return torch.cat(outputs, dim=1)


def _band(num_tokens: int, window: int, *, causal: bool, device: torch.device) -> Tensor:
    """bool [T, T]: a query sees keys less than `window` before it, and after it unless it is causal."""
    places = torch.arange(num_tokens, device=device)
    back = places[:, None] - places[None, :]
    return (back < window) & (back >= 0 if causal else back > -window)
