"""Compute language-model losses in chunks of tokens, without the logits of a whole batch in memory.

For a vocabulary of 32,000 and 8,192 tokens the logits alone would take 1 GB in float32. Here the head and the cross
entropy are computed for some tokens at a time (as many as fit a CPU's cache, or 256 MB on a GPU), with their gradients.
On a CPU the last chunk is padded, so that all have one shape (see `packing.padded_width` for the reason).
"""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from readapt_ray.catalog.shapes import first_position
from readapt_ray.errors import ModelError
from readapt_ray.nn import attention, gated, norms
from readapt_ray.training.packing import IGNORED, Batch

logger = logging.getLogger("readapt_ray")

_CPU_CHUNK_TOKENS = 128
_MIN_CHUNK_TOKENS = 32
_CHUNK_LOGITS = {"cpu": 1 << 20, "cuda": 1 << 26}


def _chunk_tokens(device_type: str, vocab_size: int) -> int:
    tokens = max(_MIN_CHUNK_TOKENS, _CHUNK_LOGITS.get(device_type, _CHUNK_LOGITS["cuda"]) // vocab_size)
    return min(tokens, _CPU_CHUNK_TOKENS) if device_type == "cpu" else tokens


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The sum of -log softmax(hidden @ weight.T + bias)[label]. The forward pass computes gradients, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, labels_N: Tensor) -> Tensor:
        needs_weight, needs_bias = ctx.needs_input_grad[1:3]
        hidden_grad = torch.empty_like(hidden_NH)
        weight_grad = torch.zeros_like(weight_VH, dtype=torch.float32) if needs_weight else None
        bias_grad = torch.zeros_like(bias_V, dtype=torch.float32) if needs_bias and bias_V is not None else None
        total = hidden_NH.new_zeros((), dtype=torch.float32)
        num_tokens = _chunk_tokens(hidden_NH.device.type, len(weight_VH))
        for start in range(0, len(labels_N), num_tokens):
            rows = slice(start, start + num_tokens)
            hidden, labels = hidden_NH[rows], labels_N[rows]
            num_real = len(labels)
            if hidden.device.type == "cpu":
                hidden = functional.pad(hidden, (0, 0, 0, num_tokens - num_real))
                labels = functional.pad(labels, (0, num_tokens - num_real))
            logits = (hidden @ weight_VH.T).float()
            if bias_V is not None:
                logits += bias_V
            log_probabilities = torch.log_softmax(logits, dim=-1)
            chosen = labels[:, None]
            total -= log_probabilities.gather(1, chosen)[:num_real].sum()
            logits_grad = log_probabilities.exp_()
            logits_grad.scatter_add_(1, chosen, logits_grad.new_full(chosen.shape, -1.0))
            logits_grad[num_real:] = 0
            gradient = logits_grad.to(hidden.dtype)
            hidden_grad[rows] = (gradient @ weight_VH)[:num_real]
            if weight_grad is not None:
                weight_grad += (gradient.T @ hidden).float()
            if bias_grad is not None:
                bias_grad += logits_grad.sum(0)
        ctx.save_for_backward(hidden_grad, weight_grad, bias_grad)
        ctx.dtypes = weight_VH.dtype, None if bias_V is None else bias_V.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad, bias_grad = ctx.saved_tensors
        scale = gradients[0]
        weight_dtype, bias_dtype = ctx.dtypes
        scaled_weight = None if weight_grad is None else (weight_grad * scale).to(weight_dtype)
        scaled_bias = None if bias_grad is None else (bias_grad * scale).to(bias_dtype)
        return hidden_grad * scale.to(hidden_grad.dtype), scaled_weight, scaled_bias, None


class LossHead(nn.Module):
    """A linear output layer that returns the summed cross entropy instead of logits while labels are set.

    It has the same parameters under the same names as the layer that it replaces. So checkpoints, tied weights and
    DeepSpeed's hooks (which fetch a partitioned weight when a module is called) work unchanged.
    """

    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self._labels: tuple[Tensor, Tensor] | None = None

    @contextlib.contextmanager
    def predicting(self, labels_BT: Tensor, places_N: Tensor) -> Iterator[None]:
        """Make the layer return the loss of labels during a `with` block.

        Args:
            labels_BT: int64 [B, T], the token to predict at each position (shifted already for next-token prediction).
            places_N: int64 [N], the positions in the flattened batch that count; labels elsewhere are not read.
        """
        self._labels = labels_BT, places_N
        try:
            yield
        finally:
            self._labels = None

    def forward(self, hidden_BTH: Tensor) -> Tensor:
        """Return logits [B, T, V]; inside `predicting` the summed cross entropy, a float32 scalar."""
        if self._labels is None:
            return functional.linear(hidden_BTH, self.weight, self.bias)
        labels_BT, places_N = self._labels
        hidden_NH = hidden_BTH.flatten(0, 1).index_select(0, places_N)
        weight_VH = self.weight.to(hidden_NH.dtype)
        labels_N = labels_BT.flatten().index_select(0, places_N)
        return _ChunkedCrossEntropy.apply(hidden_NH, weight_VH, self.bias, labels_N)  # type: ignore[no-untyped-call,no-any-return]


def prepare(model: Any, name: str) -> None:
    """Prepare a language model for training: replace its output layer by a LossHead, and install faster kernels.

    The kernels are attention for packed passages (attention.py), if the model allows that (else `loss_sum` pads them),
    and on a GPU fused norms and gated layers (norms.py, gated.py).

    Args:
        model: a transformers `*ForCausalLM` or `*ForMaskedLM`; changed in place.
        name: what the user calls the model; used in errors.

    Raises:
        ModelError: its head is not linear, or its logits are scaled or capped after the head.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ModelError(
            f"{name} has no linear output layer ({type(head).__name__}); give the pretrained model with its language-model head"
        )
    for option in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(model.config, option, None) not in (None, 1, 1.0):
            raise ModelError(
                f"{name} changes its logits ({option} = {getattr(model.config, option)}), which training here does not do; "
                f"give a model without"
            )
    model.set_output_embeddings(LossHead(head))
    if attention.is_exchangeable(model):
        attention.install(model, name)
    else:
        logger.info("%s: its attention cannot keep packed passages apart, so each is padded to the longest", name)
    if head.weight.device.type == "cuda":
        norms.fuse(model)
        gated.fuse(model)


def loss_sum(model: Any, batch: Batch) -> Tensor:
    """Compute the cross entropy of a language model in nats, summed over all labelled tokens, a float32 scalar.

    Args:
        model: a language model that `prepare` made ready.
        batch: a batch from `collate`, on the model's device.
    """
    if not attention.is_exchangeable(model):
        rows = batch.in_rows()
        labels = rows.pop("labels")
        rows["position_ids"] += first_position(model)
        with model.get_output_embeddings().predicting(labels, (labels.flatten() != IGNORED).nonzero().flatten()):
            return model(**rows).logits  # type: ignore[no-any-return]
    with model.get_output_embeddings().predicting(batch.labels, batch.label_places):
        return model(  # type: ignore[no-any-return]
            input_ids=batch.input_ids,
            position_ids=batch.position_ids + first_position(model),
            use_cache=False,
            cu_seq_lens_q=batch.passage_ends,
            cu_seq_lens_k=batch.passage_ends,
            max_length_q=batch.longest_passage,
            max_length_k=batch.longest_passage,
        ).logits
