"""What a step costs in arithmetic, and what a device could do: for the MFU (model FLOPs utilisation)."""

from typing import Any

import torch

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
    """The peak of a device; None where it is unknown, as that of every CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def flops_per_token(model: Any, *, mean_attended: float = 0.0) -> float:
    """Model FLOPs of one forward and backward pass, a token.

    2 a weight forward, 2 for the gradient of its input, 2 for its own gradient where it is trained: 4 N with
    a frozen base, 6 N with all weights trained. Embeddings look up, they do not multiply. Attention adds
    4 * hidden size a layer and attended token forward, twice that backward (Chowdhery et al., 2022,
    appendix B). Recomputation under gradient checkpointing does not count.

    Args:
        model: a transformers model, adapters in it already.
        mean_attended: tokens that a token sees in the mean.
    """
    total = 0.0
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.ndim >= 2 or hasattr(parameter, "ds_numel"):
                total += (6 if parameter.requires_grad else 4) * getattr(parameter, "ds_numel", parameter.numel())
    config = model.config
    return float(total + 12 * config.num_hidden_layers * config.hidden_size * mean_attended)
