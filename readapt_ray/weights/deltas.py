"""Add `scale * (tuned - pretrained)` to a pretrained weight, in each form in which a difference is stored.

In: rows of the pretrained weight W and of the tuned one, its factors, or the difference itself.
Out: `total += scale * (tuned - W)`, in place. Memory: at most one buffer of the size of the rows.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from readapt_ray.weights.reused_buffers import ScratchBuffers


@dataclass(frozen=True, kw_only=True)
class Whole:
    """The tuned weight itself; the rows are in memory."""

    rows: torch.Tensor
    """[O, I], of any type."""
    reads_weight: ClassVar[bool] = True

    def add_to(
        self, total_OI: torch.Tensor, weight_OI: torch.Tensor, scale: float, first_row: int, scratch: ScratchBuffers
    ) -> None:
        """Add the scaled difference from `weight_OI`."""
        del first_row  # the rows are already those in hand
        total_OI.add_(scratch.float32("term", self.rows).sub_(weight_OI), alpha=scale)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """`tuned - pretrained`; the rows are in memory."""

    rows: torch.Tensor
    """[O, I], of any type."""
    reads_weight: ClassVar[bool] = False

    def add_to(
        self, total_OI: torch.Tensor, weight_OI: torch.Tensor, scale: float, first_row: int, scratch: ScratchBuffers
    ) -> None:
        """Add the scaled difference."""
        del weight_OI, first_row
        total_OI.add_(scratch.float32("term", self.rows), alpha=scale)


@dataclass(frozen=True, kw_only=True)
class Factors:
    """The update of a LoRA or DoRA adapter to a weight W [O, I]."""

    A_rI: torch.Tensor
    """The inner factor [rank, I]."""
    B_Or: torch.Tensor
    """The outer factor [O, rank]."""
    magnitude: torch.Tensor | None = None
    """DoRA's norm of each output row [O]; None for LoRA."""
    scaling: float = 1.0
    """What B A is multiplied by."""

    @property
    def reads_weight(self) -> bool:
        """Whether the update depends on W."""
        return self.magnitude is not None

    def add_to(
        self, total_OI: torch.Tensor, weight_OI: torch.Tensor, scale: float, first_row: int, scratch: ScratchBuffers
    ) -> None:
        """Add the scaled update of the rows from `first_row` on.

        LoRA adds s B A. DoRA makes the tuned weight d (W + s B A), d = m / ||W + s B A|| by output row
        (arXiv 2402.09353, section 4.1, as `peft` merges it).

        Args:
            total_OI: what is added to; the sums are made in its type.
            weight_OI: the same rows of W, in that type.
            scale: share of the update that is added.
            first_row: which output row the first row is.
            scratch: gives the buffer of W + s B A.
        """
        rows = slice(first_row, first_row + total_OI.shape[0])
        A_rI, B_Or = self.A_rI.to(total_OI), self.B_Or[rows].to(total_OI)
        if self.magnitude is None:
            total_OI.addmm_(B_Or, A_rI, alpha=scale * self.scaling)
            return
        tuned_OI = scratch.empty("term", total_OI.shape, total_OI.dtype, total_OI.device)
        torch.addmm(weight_OI, B_Or, A_rI, alpha=self.scaling, out=tuned_OI)
        norm_O1 = torch.linalg.vector_norm(tuned_OI, dim=1, keepdim=True)
        magnitude_O1 = self.magnitude[rows].to(total_OI).unsqueeze(1)
        # A row that is zero as a whole has no direction to scale: it stays zero.
        d_O1 = torch.where(norm_O1 == 0, torch.ones_like(norm_O1), magnitude_O1 / norm_O1)
        total_OI.add_(tuned_OI.mul_(d_O1 * scale)).sub_(weight_OI, alpha=scale)

    def update(self, weight_OI: torch.Tensor, first_row: int = 0) -> torch.Tensor:
        """Return `tuned - pretrained` of the rows of W from `first_row` on, in the type of `weight_OI`."""
        update_OI = torch.zeros_like(weight_OI)
        self.add_to(update_OI, weight_OI, 1.0, first_row, ScratchBuffers())
        return update_OI

    def to(self, device: torch.device) -> "Factors":
        """Return the same factors on a device."""
        magnitude = None if self.magnitude is None else self.magnitude.to(device)
        return Factors(A_rI=self.A_rI.to(device), B_Or=self.B_Or.to(device), magnitude=magnitude, scaling=self.scaling)


Term = Whole | Difference | Factors
