"""Count the FLOPs of training, and look up the peak FLOPS of devices, for MFU (model FLOPs utilisation) and `plan`."""

import torch

from readapt_ray.catalog.shapes import ModelShape
from readapt_ray.training.dora import AdapterShape

PEAK_FLOPS: dict[str, float] = {
    "B200": 2.25e15,
    "H200": 9.89e14,
    "H100 PCIe": 7.56e14,
    "H100": 9.89e14,
    "GH200": 9.89e14,
    "A100": 3.12e14,
    "L40S": 3.62e14,
    "L40": 1.81e14,
    "L4": 1.21e14,
    "A10G": 7.0e13,
    "A10": 1.25e14,
    "T4": 6.5e13,
}
"""Dense bfloat16 (T4: float16) operations per second, by a part of the device's name; from NVIDIA's data sheets."""


def peak_flops(device: torch.device) -> float | None:
    """Return the peak operations per second of a device in bfloat16; None if unknown, as for every CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def flops_per_token(shape: ModelShape, adapter: AdapterShape | None, *, mean_tokens: float = 0.0) -> float:
    """Count the model FLOPs per token of one forward and backward pass.

    A weight takes 2 forward, 2 for the gradient of its input, and 2 for its own gradient if it is trained. So N weights
    take 4 N if they are frozen, 6 N if they are trained. Embeddings do not count, since they are looked up. Attention
    adds 4 times its width per layer and attended token forward, and twice that backward (Chowdhery et al., 2022,
    appendix B). Recomputation under gradient checkpointing does not count.

    Args:
        shape: shape of the model with its language-model head.
        adapter: the adapter that is trained; None trains all weights.
        mean_tokens: tokens of a text on average; in a causal model a token attends to half of them.
    """
    if adapter is None:
        weights = 6.0 * shape.num_matrix_parameters
    else:
        low_rank = sum(adapter.rank * (inputs + outputs) for inputs, outputs in shape.adapted(adapter.targets))
        weights = 4.0 * shape.num_matrix_parameters + 6.0 * low_rank
    return weights + 12.0 * shape.num_layers * shape.attention_width * shape.attended(mean_tokens)


def run_flops(
    shape: ModelShape,
    adapter: AdapterShape | None,
    *,
    num_tokens: float,
    num_passages: float,
    num_steps: float,
    gradient_checkpointing: bool,
) -> float:
    """Count the FLOPs of a whole training run: model FLOPs, recomputed forward passes and DoRA's norms.

    Args:
        shape, adapter: as for `flops_per_token`.
        num_tokens, num_passages: over all epochs; attention stays within a passage.
        num_steps: optimizer steps; each computes DoRA's norms once, 2 * rank FLOPs per weight of an adapted layer.
        gradient_checkpointing: whether the backward pass runs the forward pass again.
    """
    mean_tokens = num_tokens / max(1.0, num_passages)
    each = flops_per_token(shape, adapter, mean_tokens=mean_tokens)
    again = shape.forward_flops(mean_tokens) if gradient_checkpointing else 0.0
    norms = 0.0
    if adapter is not None and adapter.method == "dora":
        norms = 2.0 * adapter.rank * sum(inputs * outputs for inputs, outputs in shape.adapted(adapter.targets))
    return num_tokens * (each + again) + num_steps * norms
