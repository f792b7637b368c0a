"""Training objectives. The logits of a whole batch are never held at once.

For a vocabulary of 32,000 and 8,192 tokens the logits alone would be 1 GB in float32; here the
head and the cross entropy go over 128 tokens at a time, and the gradient is made on the way. The last
chunk is filled up, so that all have one shape (see packing.py on why).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from readapt_ray.training.packing import IGNORED, Batch

_CHUNK_TOKENS = 128


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of -log softmax(hidden @ weight.T)[label]; gradients are made in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> Tensor:
        needs_weight = ctx.needs_input_grad[1]
        hidden_grad = torch.empty_like(hidden_NH)
        weight_grad = torch.zeros_like(weight_VH, dtype=torch.float32) if needs_weight else None
        total = hidden_NH.new_zeros((), dtype=torch.float32)
        for start in range(0, len(labels_N), _CHUNK_TOKENS):
            rows = slice(start, start + _CHUNK_TOKENS)
            hidden, labels = hidden_NH[rows], labels_N[rows]
            num_real = len(labels)
            hidden = functional.pad(hidden, (0, 0, 0, _CHUNK_TOKENS - num_real))
            labels = functional.pad(labels, (0, _CHUNK_TOKENS - num_real))
            log_probabilities = torch.log_softmax((hidden @ weight_VH.T).float(), dim=-1)
            chosen = labels[:, None]
            total -= log_probabilities.gather(1, chosen)[:num_real].sum()
            probabilities = log_probabilities.exp_()
            probabilities.scatter_add_(1, chosen, probabilities.new_full(chosen.shape, -1.0))
            gradient = probabilities.to(hidden.dtype)
            gradient[num_real:] = 0
            hidden_grad[rows] = (gradient @ weight_VH)[:num_real]
            if weight_grad is not None:
                weight_grad += (gradient.T @ hidden).float()
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.weight_dtype = weight_VH.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        hidden_grad, weight_grad = ctx.saved_tensors
        scale = gradients[0]
        scaled_weight = None if weight_grad is None else (weight_grad * scale).to(ctx.weight_dtype)
        return hidden_grad * scale.to(hidden_grad.dtype), scaled_weight, None


def causal_lm_loss_sum(model: Any, batch: Batch) -> Tensor:
    """Sum over all labelled tokens of the next-token cross entropy, float32 scalar.

    Args:
        model: a transformers `*ForCausalLM` with a plain linear head.
        batch: as `collate` makes it, on the model's device.
    """
    hidden_BTH = model.base_model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=batch.attention_mask,
        use_cache=False,
    ).last_hidden_state
    chosen = batch.labels != IGNORED
    head_VH = model.get_output_embeddings().weight
    hidden_NH = hidden_BTH[chosen]
    return _ChunkedCrossEntropy.apply(hidden_NH, head_VH.to(hidden_NH.dtype), batch.labels[chosen])  # type: ignore[no-untyped-call,no-any-return]
