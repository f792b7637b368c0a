"""Scale scores of bridged queries with old vectors, so that they compare with the new model's scores with new vectors.

In: queries before and after a bridge's map, and a sample of passages with the vectors of both models, none of which was
used to fit the map. Out: a factor and an offset per query, which give its bridged scores of the sample the mean and the
standard deviation of the new model's scores. With half of the quickstart's passages re-embedded, .91 of the 10 best are
those of a full re-embedding; with raw scores .50, since a bridged score of .3 means something else than a score of the
new model. To shrink the scores as well, by their correlation, is no better for similar models and worse for others
(`benchmarks/reembedding.py`). A sample of 1,000 takes 8 KB of memory per dimension, and a query 2,000 multiplications
per dimension.
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
    """A sample of passages with their vectors by the old and the new model."""

    old: Matrix
    """[N, D_old]."""
    new: Matrix
    """[N, D_new]."""

    def scale(self, queries: Matrix, mapped: Matrix) -> tuple[Matrix, Matrix]:
        """Return factor and offset per query, so that score * factor + offset compares with scores of the new model.

        Args:
            queries: [Q, D_new], vectors by the new model.
            mapped: [Q, D_old], the same after the bridge's map.

        Returns:
            The factors, float32 [Q, 1], above 0; and the offsets, float32 [Q, 1].
        """
        real, bridged = (
            torch.from_numpy(asked) @ torch.from_numpy(there).T
            for asked, there in ((queries, self.new), (mapped, self.old))
        )
        factor = (real.std(1, keepdim=True) + _LEAST_DEVIATION) / (bridged.std(1, keepdim=True) + _LEAST_DEVIATION)
        return factor.numpy(), (real.mean(1, keepdim=True) - factor * bridged.mean(1, keepdim=True)).numpy()

    def to_bytes(self) -> bytes:
        """Return the sample as the content of a safetensors file."""
        return bytes(save({"old": np.ascontiguousarray(self.old), "new": np.ascontiguousarray(self.new)}))

    @classmethod
    def from_bytes(cls, content: bytes) -> "Calibration":
        """Read what `to_bytes` wrote."""
        return cls(**load(content))
