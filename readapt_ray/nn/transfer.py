"""Copy arrays to a device without waiting for what it computes."""

from typing import Any

import torch
from numpy.typing import NDArray


def to_device(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Return a tensor on a device.

    A GPU copies from pinned memory when it comes to it, and the next batch is built meanwhile; from other memory, and by
    `torch.tensor(..., device="cuda")`, this process would wait until all that was started before is done.
    """
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
