"""Reuse memory buffers. New memory costs a page fault per 4 KiB, which takes longer than the sum computed in it."""

import math
from collections.abc import Sequence

import torch


class ScratchBuffers:
    """Named memory buffers for one thread. A tensor is valid until its role is requested again, in any shape."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.device], torch.Tensor] = {}

    def empty(self, role: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return an uninitialised tensor of this shape and type, in the buffer with the name `role`."""
        num_bytes = math.prod(shape) * dtype.itemsize
        held = self._held.get((role, device))
        if held is None or held.numel() < num_bytes:
            held = self._held[role, device] = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        return held[:num_bytes].view(dtype).view(tuple(shape))

    def float32(self, role: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy of a tensor in float32, in the buffer with the name `role`."""
        return self.empty(role, tensor.shape, torch.float32, tensor.device).copy_(tensor)
