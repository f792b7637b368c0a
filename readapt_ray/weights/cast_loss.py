"""Measure how much of the update of a merge the cast to the output type loses, for each kind of tensor.

bfloat16 keeps 8 significant bits of a weight, so an update of a hundredth of its size is mostly lost in rounding.
In: rows in float32, and the same rows after the cast. Out: for each kind of tensor (`layers.*.mlp.up_proj.weight`) the
share of the squared update that survives, `1 - ||cast - exact||^2 / ||update||^2`. It is computed for the whole
update, and for the part that the knowledge adapters add. Slices are summed in float64, in a fixed order.
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
    """Squared norm of the rounding error of the cast."""


@dataclass
class CastLoss:
    """The loss of a cast: squared norms of update, knowledge and rounding error, by kind of tensor."""

    squares: dict[str, _Squares] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, rows: TensorRows, cast: torch.Tensor, scratch: ScratchBuffers) -> "CastLoss":
        """Measure the loss of one slice of rows; `rows.pretrained` and `rows.retrieval` are overwritten.

        `rows.readapted` is kept.

        Args:
            name: name of the tensor; "*" replaces the number of its layer in the kind.
            rows: the slice in float32.
            cast: the same rows in the output type.
            scratch: buffers for the differences.
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
        """Return whether all sums are finite; if so, every summed value is finite too."""
        return all(math.isfinite(value) for each in self.squares.values() for value in dataclasses.astuple(each))

    def add(self, other: "CastLoss") -> None:
        """Add the sums of other slices to this object, in place."""
        for kind, squares in other.squares.items():
            mine = self.squares.setdefault(kind, _Squares())
            mine.update += squares.update
            mine.knowledge += squares.knowledge
            mine.error += squares.error

    def survives(self) -> dict[str, dict[str, float | None]]:
        """Return the shares of the update and of the knowledge that survive the cast, by kind of tensor.

        The keys are "update" and "knowledge". Both compare the same rounding error: with all that was added to the
        pretrained weights, and with what the knowledge adapters added. A share is 1 if nothing was lost, and 0 if the
        error is as large as the update or larger; None if there is no update, or no knowledge.
        """
        return {
            kind: {"update": _share(each.error, each.update), "knowledge": _share(each.error, each.knowledge)}
            for kind, each in sorted(self.squares.items())
        }

    def to_json(self) -> str:
        """Return the sums as JSON, so that a killed merge can resume with `from_json`."""
        return json.dumps({kind: dataclasses.asdict(each) for kind, each in self.squares.items()})

    @classmethod
    def from_json(cls, text: str) -> "CastLoss":
        """Restore the sums from the text that `to_json` returned."""
        return cls({kind: _Squares(**values) for kind, values in json.loads(text).items()})


def _square(difference: torch.Tensor) -> float:
    flat = difference.reshape(-1)
    return float(torch.dot(flat, flat))


def _share(error: float, update: float) -> float | None:
    return None if update == 0 else max(0.0, 1 - error / update)
