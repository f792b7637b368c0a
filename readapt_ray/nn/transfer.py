"""Copy arrays to a device without waiting for its pending computations."""

from typing import Any

import torch
from numpy.typing import NDArray


def to_device(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Return a numpy array as a tensor on a device, with the same shape and data type.

    On the CPU nothing is copied: the tensor shares the memory of the array. A GPU copies from pinned memory later,
    while this process builds the next batch. A copy from other memory, also by `torch.tensor(..., device="cuda")`,
    would wait until the GPU has finished all earlier work.
    """
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
