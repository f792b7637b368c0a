"""Count the arithmetic of training and the peak of devices, for MFU (model FLOPs utilisation) and for plan."""

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
"""Dense bfloat16 (T4: float16) operations a second by part of the device's name; NVIDIA's data sheets."""


def peak_flops(device: torch.device) -> float | None:
    """Return the peak of a device; None if it is unknown, as for every CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def flops_per_token(shape: ModelShape, adapter: AdapterShape | None, *, mean_attended: float = 0.0) -> float:
    """Count the model FLOPs per token of one forward and backward pass.

    2 per weight forward, 2 for the gradient of its input, 2 for its own gradient where it is trained: 4 N with a frozen
    base, 6 N with all weights trained. Embeddings look up, they do not multiply. Attention adds 4 times its width per
    layer and attended token forward, twice that backward (Chowdhery et al., 2022, appendix B). Recomputation under
    gradient checkpointing does not count.

    Args:
        shape: of the model with its language-model head.
        adapter: what is trained; None trains all weights.
        mean_attended: tokens that a token attends to on average.
    """
    if adapter is None:
        weights = 6.0 * shape.num_matrix_parameters
    else:
        low_rank = sum(adapter.rank * (inputs + outputs) for inputs, outputs in shape.adapted(adapter.targets))
        weights = 4.0 * shape.num_matrix_parameters + 6.0 * low_rank
    return weights + 12.0 * shape.num_layers * shape.attention_width * mean_attended


def run_flops(
    shape: ModelShape,
    adapter: AdapterShape | None,
    *,
    num_tokens: float,
    num_passages: float,
    num_steps: float,
    gradient_checkpointing: bool,
) -> float:
    """Count what a whole run computes: model FLOPs, recomputed forward passes and DoRA's norms.

    Args:
        shape, adapter: as for `flops_per_token`.
        num_tokens, num_passages: over all epochs; attention never leaves a passage.
        num_steps: optimizer steps; each computes DoRA's norms once, 2 * rank FLOPs per weight of an adapted layer.
        gradient_checkpointing: whether the forward pass is run again for the backward one.
    """
    mean_tokens = num_tokens / max(1.0, num_passages)
    each = flops_per_token(shape, adapter, mean_attended=shape.attended(mean_tokens))
    again = shape.forward_flops(mean_tokens) if gradient_checkpointing else 0.0
    norms = 0.0
    if adapter is not None and adapter.method == "dora":
        norms = 2.0 * adapter.rank * sum(inputs * outputs for inputs, outputs in shape.adapted(adapter.targets))
    return num_tokens * (each + again) + num_steps * norms
