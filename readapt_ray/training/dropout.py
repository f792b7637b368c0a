"""Draw dropout masks from a seed, so that the backward pass can draw them again, and fast on a CPU.

On a GPU masks and dropped copies took a quarter of a layer's activation memory, so only the seed is kept. On a CPU
random numbers took most of an adapter's own time, so there the mask is kept (adapted_output.py).
"""

import numpy as np
import torch
from torch import Tensor


def draw_seed() -> int:
    """Draw a seed below 2^62 from torch's global CPU generator, so that the GPU need not be waited for."""
    return int(torch.randint(2**62, ()))


def kept_share(probability: float) -> float:
    """Return the share of elements that `keep_mask` keeps on average: 1 - probability, rounded to 2^-16."""
    return 1 - round(probability * 65536) / 65536


def keep_mask(x: Tensor, probability: float, seed: int) -> Tensor:
    """Draw a dropout mask for `x`: true or 1 where an element is kept, not scaled. Seed, shape and device decide it.

    On a CPU, 16-bit pieces of numbers from NumPy's fastest generator take a third of the time of torch's Bernoulli
    draws. There the mask has the type of `x`, since multiplying by booleans would convert them in both passes.
    Elsewhere it is bool.

    Args:
        x: gives shape and device, and on a CPU the type.
        probability: share of elements that is dropped. Divide by `kept_share(probability)` to scale the rest.
        seed: the same seed gives the same mask.
    """
    if x.device.type != "cpu":
        generator = torch.Generator(x.device).manual_seed(seed)
        mask = torch.empty(x.shape, dtype=torch.bool, device=x.device)
        return mask.bernoulli_(kept_share(probability), generator=generator)
    pieces = torch.from_numpy(np.random.SFC64(seed).random_raw(-(-x.numel() // 4)).view(np.int16))[: x.numel()]
    dropped_of_65536 = round(probability * 65536)
    return torch.ge(pieces.view(x.shape), dropped_of_65536 - 32768, out=torch.empty(x.shape, dtype=x.dtype))
