"""Run the training loop of one worker, for training on token blocks (`train`) and on labelled pairs (`finetune`).

It resumes from the newest checkpoint, takes every step once, reports each step, and writes checkpoints in between.
"""

import functools
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from readapt_ray.errors import TrainingDivergedError
from readapt_ray.storage import Location
from readapt_ray.training.checkpoints import CheckpointWriter, DataOrder, newest_checkpoint
from readapt_ray.training.engine import DeepSpeedEngine, Optimization, linear_schedule
from readapt_ray.training.speed import peak_flops

T = TypeVar("T")
B = TypeVar("B")

_PASSES = 3
"""Time of a micro-batch as a multiple of its forward pass; the backward pass takes two."""


@dataclass(frozen=True, kw_only=True)
class StepWork(Generic[T]):
    """The work of one worker in one step: its micro-batches and their loss."""

    parts: Sequence[tuple[T, float]]
    """Micro-batches with their weights; every worker has the same number."""
    loss_of: Callable[[T], Tensor]
    """A function from a micro-batch to its share of the mean loss over all workers."""
    num_tokens: int
    """Tokens of text, over all workers."""
    num_slots: int
    """Tokens and padding together, over all workers."""
    num_passages: int
    """Passages, or in finetuning pairs, over all workers."""
    first_passages: Sequence[int]
    """Numbers of the first passages of the step, for error messages."""


class Objective(Protocol[B, T]):
    """A training objective: batches in a fixed order, and the micro-batches and loss of each."""

    @property
    def data_order(self) -> DataOrder:
        """The order in which units (blocks or pairs) are trained on."""

    def batches(self, first_step: int) -> Iterator[B]:
        """Yield what `work` needs of every step from `first_step` on: this worker's share, or numbers of all pairs."""

    def work(self, engine: DeepSpeedEngine, batch: B, step: int) -> StepWork[T]:
        """Return this worker's micro-batches and loss for a batch; `step` counts from 0. Collective."""


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """The measurements of one finished step."""

    step: int
    """Steps done, this one included."""
    num_steps: int
    loss: float
    """Mean over the tokens that count in the loss, or over the queries, of all workers, in nats."""
    learning_rate: float
    gradient_norm: float
    """Norm of the gradient before clipping."""
    num_tokens: int
    """Tokens of text in the step over all workers; padding does not count."""
    num_passages: int
    num_workers: int
    """Number of workers that took the step. It can change during a run, when nodes are lost or added."""
    tokens_per_s: float
    """Tokens per second over all workers."""
    mfu: float | None
    """Model FLOPs utilisation: share of the workers' peak FLOPS; None if the peak is unknown."""
    padding_share: float
    """Share of the computed tokens that is padding."""
    seconds: float
    """Seconds that the step took, with the wait for its batch."""
    data_wait_s: float
    """Part of `seconds` in which the step waited for its batch."""
    peak_memory_bytes: int
    """Peak memory of worker 0: allocated on its GPU, or resident in its process."""


@dataclass(frozen=True, kw_only=True)
class PartReport:
    """The progress of worker 0 inside a step."""

    step: int
    """Steps done before this one."""
    num_steps: int
    done: int
    """Micro-batches of this step that are done."""
    num_parts: int
    """Micro-batches of this step."""
    part_s: float
    """Mean seconds per micro-batch, without the first, which takes longer. Before a second one is done, the time of the
    first; during the first, an estimate from its forward pass. 0 before that."""
    num_tokens: int
    """Tokens of text in the whole step over all workers."""
    peak_memory_bytes: int
    """Peak memory of worker 0 so far."""
    checkpoint_every_s: float
    """Seconds between checkpoints. They are written only between steps."""


class Reporter(Protocol):
    """A receiver of worker 0's reports. `part` and the call must return soon, since training waits for them."""

    def part(self, report: PartReport) -> None:
        """Take a report of the progress inside a step, before each micro-batch and after the first forward pass."""

    def __call__(self, report: StepReport) -> None:
        """Take the report of a finished step."""

    def flush(self, step: int) -> None:
        """Store all reports up to this step permanently; called before the step's checkpoint is written."""


def run_steps(
    engine: DeepSpeedEngine,
    objective: Objective[Any, Any],
    optimization: Optimization,
    *,
    checkpoints: Location,
    reporter: Reporter,
    flops_per_token: float,
    doc_ids_of: Callable[[Sequence[int]], list[str]],
) -> None:
    """Train from the newest checkpoint to the last step. Collective: all workers call it.

    The last step also gets a checkpoint. If all steps are done, nothing is trained.

    Args:
        engine: the model under DeepSpeed.
        objective: the batches and their loss.
        optimization: settings of the optimizer and of checkpoints.
        checkpoints: folder of the checkpoints.
        reporter: gets the reports; called on worker 0.
        flops_per_token: model FLOPs per token of one forward and backward pass, for the MFU.
        doc_ids_of: a function from numbers of passages to their ids, for the message if the loss diverges.

    Raises:
        TrainingDivergedError: loss or gradient is NaN or infinite. The message names step and passages; the newest
            checkpoint is the last good one.
    """
    data_order = objective.data_order
    warmup_steps = int(optimization.warmup_fraction * data_order.num_steps)
    first_step = _resume(engine, checkpoints, data_order)
    writer = CheckpointWriter(checkpoints, data_order, keep=optimization.keep_checkpoints)
    clock = CheckpointClock(optimization.checkpoint_every_s)
    try:
        for step, (batch, waited_s) in enumerate(_timed(objective.batches(first_step)), start=first_step):
            started_s = time.monotonic()
            rate = linear_schedule(step, num_steps=data_order.num_steps, warmup_steps=warmup_steps)
            work = objective.work(engine, batch, step)
            try:
                part = _part_report(work, step, data_order.num_steps, optimization)
                loss_of = _with_reports(work, engine, reporter, part, is_first=step == first_step)
                outcome = engine.step(work.parts, loss_of=loss_of, rate=rate, step=step)
            except TrainingDivergedError as error:
                raise _with_passages_named(error, step + 1, work, doc_ids_of) from None
            seconds = time.monotonic() - started_s + waited_s
            if engine.worker_rank == 0:
                reporter(
                    StepReport(
                        step=step + 1,
                        num_steps=data_order.num_steps,
                        loss=outcome.loss,
                        learning_rate=rate * optimization.learning_rate,
                        gradient_norm=outcome.gradient_norm,
                        num_tokens=work.num_tokens,
                        num_passages=work.num_passages,
                        num_workers=engine.num_workers,
                        padding_share=1 - work.num_tokens / work.num_slots,
                        data_wait_s=waited_s,
                        peak_memory_bytes=peak_memory_bytes(engine.device),
                        **_speed(work.num_tokens, seconds, engine, flops_per_token),
                    )
                )
            if step + 1 == data_order.num_steps or engine.agree(clock.is_due(seconds)):
                _save(engine, step + 1, reporter, writer)
    finally:
        writer.wait()
    torch.distributed.barrier()


def _part_report(
    work: StepWork[Any], step: int, num_steps: int, optimization: Optimization
) -> Callable[..., PartReport]:
    """Return a function that makes `PartReport`s of a step, with the fields filled in that do not change."""
    return functools.partial(
        PartReport,
        step=step,
        num_steps=num_steps,
        num_parts=len(work.parts),
        num_tokens=work.num_tokens,
        checkpoint_every_s=optimization.checkpoint_every_s,
    )


def _with_reports(
    work: StepWork[T], engine: DeepSpeedEngine, reporter: Reporter, report: Callable[..., PartReport], *, is_first: bool
) -> Callable[[T], Tensor]:
    """Wrap the loss function of a step, so that worker 0 reports before each micro-batch.

    In the first step of this process it also reports after the first forward pass.
    """
    if engine.worker_rank != 0:
        return work.loss_of
    starts_s: list[float] = []

    def report_part(part_s: float) -> None:
        done = len(starts_s) - 1
        reporter.part(report(done=done, part_s=part_s, peak_memory_bytes=peak_memory_bytes(engine.device)))

    def loss_of(part: T) -> Tensor:
        starts_s.append(time.monotonic())
        first, *others = starts_s
        if len(others) > 1:
            report_part((others[-1] - others[0]) / (len(others) - 1))
        else:
            report_part(others[0] - first if others else 0.0)
        loss = work.loss_of(part)
        if is_first and not others:
            if engine.device.type == "cuda":
                torch.cuda.synchronize(engine.device)
            report_part(_PASSES * (time.monotonic() - first))
        return loss

    return loss_of


class CheckpointClock:
    """A clock that decides when to write a checkpoint.

    Args:
        every_s: seconds between checkpoints, counted from now.
    """

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._last_s = time.monotonic()

    def is_due(self, next_step_s: float = 0.0) -> bool:
        """Return whether to write a checkpoint now (always if `every_s` is 0). If so, the next interval starts now.

        Args:
            next_step_s: expected seconds of the next step; if the interval would end during it, write now.
        """
        now_s = time.monotonic()
        if now_s + next_step_s - self._last_s < self._every_s:
            return False
        self._last_s = now_s
        return True


def _save(engine: DeepSpeedEngine, step: int, reporter: Reporter, writer: CheckpointWriter) -> None:
    """Write a checkpoint. Only worker 0 copies its state to the CPU, unless each worker holds a part of it."""
    if engine.worker_rank != 0 and not engine.is_partitioned:
        return
    state = engine.state()
    if engine.worker_rank == 0:
        reporter.flush(step)
        writer.save(step, state)


def _speed(num_tokens: int, seconds: float, engine: DeepSpeedEngine, flops_per_token: float) -> dict[str, Any]:
    """Compute the fields of a `StepReport` that depend on the step's time."""
    peak = peak_flops(engine.device)
    tokens_per_s = num_tokens / max(seconds, 1e-9)
    mfu = None if peak is None else tokens_per_s * flops_per_token / (peak * engine.num_workers)
    return {"seconds": seconds, "tokens_per_s": tokens_per_s, "mfu": mfu}


def _resume(engine: DeepSpeedEngine, checkpoints: Location, data_order: DataOrder) -> int:
    """Load the newest checkpoint, and check that all workers found the same; return the number of steps done."""
    found = newest_checkpoint(checkpoints, data_order)
    step = torch.tensor([found[0] if found else 0], device=engine.device)
    torch.distributed.broadcast(step, src=0)
    done = int(step)
    if (found[0] if found else 0) != done:
        raise RuntimeError(
            f"worker {engine.worker_rank} sees step {found[0] if found else 0} in {checkpoints}, worker 0 step {done}"
        )
    if found is not None:
        engine.load_state(found[1], step=done)
    return done


def _with_passages_named(
    error: TrainingDivergedError, step: int, work: StepWork[Any], doc_ids_of: Callable[[Sequence[int]], list[str]]
) -> TrainingDivergedError:
    named = doc_ids_of(work.first_passages)
    more = f" and {work.num_passages - len(named)} more" if work.num_passages > len(named) else ""
    return TrainingDivergedError(
        f"step {step}: {error}; passages of the step: {', '.join(named)}{more}. The checkpoint before it is kept: lower "
        f"learning_rate, or look for broken passages, and run again with another output or --overwrite"
    )


def _timed(batches: Iterator[B]) -> Iterator[tuple[B, float]]:
    while True:
        started_s = time.monotonic()
        try:
            batch = next(batches)
        except StopIteration:
            return
        yield batch, time.monotonic() - started_s


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory so far, in bytes: allocated by torch on the GPU, or resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
