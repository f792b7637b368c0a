"""Add `scale * (tuned - pretrained)` to a pretrained weight, for each form in which a difference can be given.

In: rows of the pretrained weight W, and the rows of the tuned weight, or the adapter's factors, or the difference.
Out: `total += scale * (tuned - W)`, in place. Memory: at most one buffer of the size of the rows.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from readapt_ray.weights.reused_buffers import ScratchBuffers


@dataclass(frozen=True, kw_only=True)
class Whole:
    """Rows of a tuned weight, in memory."""

    rows: torch.Tensor
    """[O, I], of any type."""
    reads_weight: ClassVar[bool] = True

    def add_to(
        self, total_OI: torch.Tensor, weight_OI: torch.Tensor, scale: float, first_row: int, scratch: ScratchBuffers
    ) -> None:
        """Add `scale * (rows - weight_OI)` to `total_OI`, in place; arguments as in `Factors.add_to`."""
        del first_row  # `rows` already holds only the wanted rows
        total_OI.add_(scratch.float32("term", self.rows).sub_(weight_OI), alpha=scale)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Rows of the difference `tuned - pretrained`, in memory."""

    rows: torch.Tensor
    """[O, I], of any type."""
    reads_weight: ClassVar[bool] = False

    def add_to(
        self, total_OI: torch.Tensor, weight_OI: torch.Tensor, scale: float, first_row: int, scratch: ScratchBuffers
    ) -> None:
        """Add `scale * rows` to `total_OI`, in place; arguments as in `Factors.add_to`, `weight_OI` is not used."""
        del weight_OI, first_row
        total_OI.add_(scratch.float32("term", self.rows), alpha=scale)


@dataclass(frozen=True, kw_only=True)
class Factors:
    """The factors with which a LoRA or DoRA adapter changes a weight W [O, I]."""

    A_rI: torch.Tensor
    """The inner factor [rank, I]."""
    B_Or: torch.Tensor
    """The outer factor [O, rank]."""
    magnitude: torch.Tensor | None = None
    """DoRA's norm of each output row [O]; None for LoRA."""
    scaling: float = 1.0
    """Multiplier of B A; written s below."""

    @property
    def reads_weight(self) -> bool:
        """Whether the update depends on W: True for DoRA, False for LoRA."""
        return self.magnitude is not None

    def add_to(
        self, total_OI: torch.Tensor, weight_OI: torch.Tensor, scale: float, first_row: int, scratch: ScratchBuffers
    ) -> None:
        """Add the scaled update of some rows to `total_OI`, in place.

        LoRA adds s B A. DoRA makes the tuned weight d (W + s B A), with d = m / ||W + s B A|| per output row
        (arXiv 2402.09353, section 4.1, as `peft` merges it).

        Args:
            total_OI: the rows to add to; the sums are made in their type.
            weight_OI: the same rows of W, in that type.
            scale: factor of the update: 1 adds all of it, 0 nothing.
            first_row: index in W of the first of these rows.
            scratch: gives the buffer for W + s B A.
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
        # A row of zeros has no direction to scale. It stays zero.
        d_O1 = torch.where(norm_O1 == 0, torch.ones_like(norm_O1), magnitude_O1 / norm_O1)
        total_OI.add_(tuned_OI.mul_(d_O1 * scale)).sub_(weight_OI, alpha=scale)

    def update(self, weight_OI: torch.Tensor, first_row: int = 0) -> torch.Tensor:
        """Compute `tuned - pretrained`, unscaled, for rows of W; the result is a new tensor of their shape and type.

        Args:
            weight_OI: rows of the pretrained weight W, or all of it.
            first_row: index in W of the first of these rows.
        """
        update_OI = torch.zeros_like(weight_OI)
        self.add_to(update_OI, weight_OI, 1.0, first_row, ScratchBuffers())
        return update_OI

    def to(self, device: torch.device) -> "Factors":
        """Return the factors on a device, in the same types."""
        magnitude = None if self.magnitude is None else self.magnitude.to(device)
        return Factors(A_rI=self.A_rI.to(device), B_Or=self.B_Or.to(device), magnitude=magnitude, scaling=self.scaling)


Term = Whole | Difference | Factors
