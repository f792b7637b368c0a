"""Choose the size of a training step if batch_size is auto: large enough for every worker, with enough steps to learn.

In: the size of the packed corpus and the number of workers. Out: blocks per step, the number of workers that these keep
busy, and the factor of the learning rate. It is plain arithmetic; `readapt plan` uses it too.
"""

import math
from dataclasses import dataclass
from typing import Final

TOKENS_PER_WORKER: Final = 16_384
"""Least tokens per worker and step. With fewer, the fixed work of a step on a GPU (kernel launches, exchange of
gradients, optimizer) takes longer than the matrix products."""
MIN_STEPS: Final = 500
"""Least optimizer steps per run; a small corpus takes smaller steps, and then fewer workers."""
REFERENCE_PASSAGES: Final = 4
"""Passages per step for which the option learning_rate is meant: the batch of the paper."""
MAX_RATE_FACTOR: Final = 5.0
"""Largest factor. Adapters diverge at much higher rates with any batch; 5 x 2e-4 is the usual upper end for LoRA."""

_ROUNDING: Final = 1 + 1e-9


@dataclass(frozen=True, kw_only=True)
class PackedSize:
    """The size of a packed corpus, summed over all epochs. In `readapt plan` it is an estimate."""

    num_blocks: float
    num_passages: float
    num_tokens: float


@dataclass(frozen=True, kw_only=True)
class StepSize:
    """The chosen size of a training step."""

    batch_size: int
    """Blocks per step, over all workers."""
    num_workers: int
    """Number of workers that this batch keeps busy, at most the available ones."""
    num_tokens: float
    """Mean tokens per step."""
    rate_factor: float
    """Factor by which the learning rate is multiplied."""

    def describe(self, num_offered: int) -> str:
        """Describe the size in one line, with the reason if the corpus is too small for all available workers.

        Args:
            num_offered: number of available workers.
        """
        said = (
            f"{self.batch_size:,} blocks ({self.num_tokens:,.0f} tokens) per step on {_workers(self.num_workers)}, "
            f"learning rate x {self.rate_factor:.2f}"
        )
        if self.num_workers == num_offered and self.num_tokens * _ROUNDING >= TOKENS_PER_WORKER * num_offered:
            return said
        return (
            f"{said}; the corpus is small for {_workers(num_offered)} of {TOKENS_PER_WORKER:,} tokens per step, and a run "
            f"takes at least {MIN_STEPS} steps"
        )


def _workers(count: int) -> str:
    return f"{count} {'worker' if count == 1 else 'workers'}"


def choose_step_size(
    size: PackedSize, *, num_workers: int, least_workers: int = 1, batch_size: int | None = None
) -> StepSize:
    """Choose the batch size, the number of workers and the factor of the learning rate.

    Each worker gets TOKENS_PER_WORKER tokens per step, unless the run would then have fewer than MIN_STEPS steps. The
    learning rate grows with the square root of the passages per step, the rule for Adam (Malladi et al., 2022), at most
    by MAX_RATE_FACTOR; it is never lowered.

    Args:
        size: size of the packed corpus.
        num_workers: number of available workers.
        least_workers: number of workers that take part for any size of the corpus.
        batch_size: blocks per step with which the run began, to keep; None chooses one.
    """
    mean_tokens = size.num_tokens / max(1.0, size.num_blocks)
    if batch_size is None:
        enough = math.ceil(TOKENS_PER_WORKER * num_workers / max(1.0, mean_tokens))
        batch_size = max(least_workers, min(enough, int(size.num_blocks // MIN_STEPS)))
    num_tokens = batch_size * mean_tokens
    num_passages = batch_size * size.num_passages / max(1.0, size.num_blocks)
    return StepSize(
        batch_size=batch_size,
        num_workers=max(least_workers, min(num_workers, int(num_tokens * _ROUNDING / TOKENS_PER_WORKER))),
        num_tokens=num_tokens,
        rate_factor=min(MAX_RATE_FACTOR, max(1.0, math.sqrt(num_passages / REFERENCE_PASSAGES))),
    )
