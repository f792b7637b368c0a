"""Bring the scores of bridged queries among old vectors to the scale of the new model's scores among its own vectors.

Enters: queries before and after a bridge's map, and a sample of passages with the vectors of both models, of which none
fitted the map. Leaves: a factor and an offset per query, by which its bridged scores of the sample get the mean and the
standard deviation of the new model's. With half of the quickstart's passages re-embedded, .91 of the 10 best are those of a full
re-embedding; by raw scores .50, since a bridged score of .3 says something else than a real one. To shrink the scores
besides, by their correlation, is no better for models that are near, and worse for others (`benchmarks/reembedding.py`).
A sample of 1,000 takes 8 KB per dimension in memory, and a query 4,000 multiplications per dimension.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load, save

Matrix = NDArray[np.float32]

MAX_PASSAGES = 1000
_LEAST_DEVIATION = 1e-6


@dataclass(frozen=True)
class Calibration:
    """Vectors of the same passages by both models."""

    old: Matrix
    """[N, D_old]."""
    new: Matrix
    """[N, D_new]."""

    def scale(self, queries: Matrix, mapped: Matrix) -> tuple[Matrix, Matrix]:
        """Return what brings bridged scores to the scale of real ones: score * factor + offset.

        Args:
            queries: [Q, D_new], of the new model.
            mapped: [Q, D_old], the same after the bridge's map.

        Returns:
            float32 [Q, 1], over 0, and float32 [Q, 1].
        """
        real, bridged = (
            torch.from_numpy(asked) @ torch.from_numpy(there).T
            for asked, there in ((queries, self.new), (mapped, self.old))
        )
        factor = (real.std(1, keepdim=True) + _LEAST_DEVIATION) / (bridged.std(1, keepdim=True) + _LEAST_DEVIATION)
        return factor.numpy(), (real.mean(1, keepdim=True) - factor * bridged.mean(1, keepdim=True)).numpy()

    def to_bytes(self) -> bytes:
        """Return the content of a safetensors file."""
        return bytes(save({"old": np.ascontiguousarray(self.old), "new": np.ascontiguousarray(self.new)}))

    @classmethod
    def from_bytes(cls, content: bytes) -> "Calibration":
        """Read what `to_bytes` wrote."""
        return cls(**load(content))
