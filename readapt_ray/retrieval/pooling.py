"""Pool the hidden states of all tokens of a text to one vector.

Padding may be on either side, or on both: only the mask says which tokens are real. Sums and
norms are computed in float32, whatever the dtype of the hidden states.
"""

from collections.abc import Sequence

import numpy as np
import torch

from readapt_ray.catalog.encoding import Pooling
from readapt_ray.nn.transfer import to_device


def pool(hidden: torch.Tensor, mask: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """Pool padded states to one vector per text.

    Args:
        hidden: hidden states [B, T, H], any floating type.
        mask: [B, T], not 0 for real tokens; every row needs at least one.
        pooling: `last` takes the last real token, `cls` the first, `mean` the mean of the real tokens.

    Returns:
        float32 [B, H].

    Raises:
        ValueError: the shapes differ, or the pooling is unknown.
    """
    if hidden.dim() != 3 or mask.shape != hidden.shape[:2]:
        raise ValueError(f"hidden states {tuple(hidden.shape)} and mask {tuple(mask.shape)} do not go together")
    real = mask != 0
    if pooling == "mean":
        weights = real.unsqueeze(-1).to(torch.float32)
        # A padded position may hold anything, even NaN. where() removes it; multiplying by 0 would not.
        kept = torch.where(real.unsqueeze(-1), hidden, torch.zeros((), dtype=hidden.dtype, device=hidden.device))
        return kept.sum(dim=1, dtype=torch.float32) / weights.sum(dim=1).clamp(min=1.0)
    if pooling == "cls":
        chosen = real.int().argmax(dim=1)
    elif pooling == "last":
        chosen = mask.shape[1] - 1 - real.flip(1).int().argmax(dim=1)
    else:
        raise ValueError(f"pooling {pooling!r} is unknown; it must be one of last, mean, cls")
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), chosen].float()


def pool_packed(hidden: torch.Tensor, lengths: Sequence[int], pooling: Pooling) -> torch.Tensor:
    """Pool concatenated texts to one vector per text.

    Args:
        hidden: hidden states [T, H] of all tokens.
        lengths: tokens of each of the B texts, at least 1; their sum is T.
        pooling: as in `pool`.

    Returns:
        float32 [B, H].
    """
    counts = np.asarray(lengths, np.int64)
    ends = np.cumsum(counts)
    if pooling == "mean":
        texts = to_device(np.repeat(np.arange(len(counts)), counts), hidden.device)
        sums = torch.zeros(len(counts), hidden.shape[1], dtype=torch.float32, device=hidden.device)
        return sums.index_add_(0, texts, hidden.float()) / to_device(counts, hidden.device).unsqueeze(-1)
    return hidden[to_device(ends - counts if pooling == "cls" else ends - 1, hidden.device)].float()


def normalized(vectors: torch.Tensor) -> torch.Tensor:
    """Divide each row by its length, in float32 [B, H]. A row of zeros stays zero."""
    return torch.nn.functional.normalize(vectors.float(), dim=-1, eps=1e-12)
