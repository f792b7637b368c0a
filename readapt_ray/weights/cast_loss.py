"""Measure what the cast to the output type lost of the intended update, for each kind of tensor.

bfloat16 keeps 8 bits of a weight, so an update a hundredth of its size is mostly rounding. In: rows
in float32 and what they were cast to. Out: of each kind of tensor (`layers.*.mlp.up_proj.weight`)
the share of the squared update that survives, `1 - ||cast - exact||^2 / ||update||^2`, once for the
whole update and once for what the knowledge adapters add. Sums in float64, in a fixed order.
"""

import dataclasses
import json
import math
import re
from dataclasses import dataclass, field

import torch

from readapt_ray.weights.merging import TensorRows
from readapt_ray.weights.reused_buffers import ScratchBuffers


@dataclass
class _Squares:
    update: float = 0.0
    """Squared norm of `readapted - pretrained`."""
    knowledge: float = 0.0
    """Squared norm of what the knowledge adapters add."""
    error: float = 0.0
    """Squared norm of what the cast changed."""


@dataclass
class CastLoss:
    """Squared norms by kind of tensor."""

    squares: dict[str, _Squares] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, rows: TensorRows, cast: torch.Tensor, scratch: ScratchBuffers) -> "CastLoss":
        """Measure the loss of a slice; `rows.pretrained` is overwritten.

        Args:
            name: of the tensor.
            rows: the slice in float32.
            cast: the same in the output type.
            scratch: where the differences are made.
        """
        exact = rows.readapted
        knowledge = 0.0
        if rows.retrieval is not exact:
            knowledge = _square(rows.retrieval.sub_(exact))
        update = _square(rows.pretrained.sub_(exact))
        error = _square(scratch.float32("term", cast).sub_(exact)) if cast.dtype != torch.float32 else 0.0
        kind = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        return cls({kind: _Squares(update, knowledge, error)})

    def is_finite(self) -> bool:
        """Return whether all sums are finite; then so is every value that entered them."""
        return all(math.isfinite(value) for each in self.squares.values() for value in dataclasses.astuple(each))

    def add(self, other: "CastLoss") -> None:
        """Add the sums of other slices."""
        for kind, squares in other.squares.items():
            mine = self.squares.setdefault(kind, _Squares())
            mine.update += squares.update
            mine.knowledge += squares.knowledge
            mine.error += squares.error

    def survives(self) -> dict[str, dict[str, float | None]]:
        """Return by kind of tensor which share of the whole update and of the knowledge survives the cast; None without
        any.
        """
        return {
            kind: {"update": _share(each.error, each.update), "knowledge": _share(each.error, each.knowledge)}
            for kind, each in sorted(self.squares.items())
        }

    def to_json(self) -> str:
        """Return the sums as JSON, to resume from."""
        return json.dumps({kind: dataclasses.asdict(each) for kind, each in self.squares.items()})

    @classmethod
    def from_json(cls, text: str) -> "CastLoss":
        """Restore what `to_json` returned."""
        return cls({kind: _Squares(**values) for kind, values in json.loads(text).items()})


def _square(difference: torch.Tensor) -> float:
    flat = difference.reshape(-1)
    return float(torch.dot(flat, flat))


def _share(error: float, update: float) -> float | None:
    return None if update == 0 else max(0.0, 1 - error / update)
