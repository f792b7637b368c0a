"""Apply dropout whose mask is drawn again in the backward pass, and that is fast on a CPU.

Most of an adapter's own time on a CPU went into random numbers, so there the mask is kept. On a GPU masks and dropped
copies were a quarter of what a layer kept of its activations, and a seed takes their place.
"""

import numpy as np
import torch
from torch import Tensor


def draw_seed() -> int:
    """Return a seed from torch's generator of the host, so that no device is waited for."""
    return int(torch.randint(2**62, ()))


def kept_share(probability: float) -> float:
    """Return the share of elements that `keep_mask` keeps in the mean: the nearest multiple of 2^-16."""
    return 1 - round(probability * 65536) / 65536


def keep_mask(x: Tensor, probability: float, seed: int) -> Tensor:
    """Draw which elements of `x` are kept; the same for the same seed, shape and device.

    On a CPU 16-bit pieces of NumPy's fastest generator take a third of the time of torch's Bernoulli draws, and the mask
    has the type of `x`: a product with booleans converts them, forward and backward. Elsewhere it is bool.
    """
    if x.device.type != "cpu":
        generator = torch.Generator(x.device).manual_seed(seed)
        mask = torch.empty(x.shape, dtype=torch.bool, device=x.device)
        return mask.bernoulli_(kept_share(probability), generator=generator)
    pieces = torch.from_numpy(np.random.SFC64(seed).random_raw(-(-x.numel() // 4)).view(np.int16))[: x.numel()]
    dropped_of_65536 = round(probability * 65536)
    return torch.ge(pieces.view(x.shape), dropped_of_65536 - 32768, out=torch.empty(x.shape, dtype=x.dtype))
