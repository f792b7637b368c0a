"""One worker of one attempt at a training run, in a process of its own that may kill itself; for test_steps.py."""

import itertools
import json
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401 -- loaded once, in the server that forks the workers
import torch
from transformers import AutoModelForCausalLM

from readapt_ray.storage import Location
from readapt_ray.training import dora, objectives, steps
from readapt_ray.training.blocks import RowGroups, list_row_groups
from readapt_ray.training.checkpoints import DataOrder
from readapt_ray.training.engine import DeepSpeedEngine, Optimization
from readapt_ray.training.language_model import LanguageModelling
from readapt_ray.training.packing import Batch, Block
from readapt_ray.training.shares import BatchSettings, Share
from readapt_ray.training.steps import PartReport, StepReport, StepWork, run_steps
from tests.training.reading import read_shares

OPTIMIZATION = Optimization(
    learning_rate=5e-3,
    weight_decay=0.0,
    warmup_fraction=0.1,
    max_gradient_norm=1.0,
    zero_stage=0,
    seed=3,
    checkpoint_every_s=0,
)


@dataclass(frozen=True)
class Attempt:
    """What every worker of it is told. `kill`: (worker rank, step from 0, where) of a SIGKILL."""

    number: int
    num_workers: int
    kill: tuple[int, int, str] | None = None
    zero_stage: int = 0
    num_epochs: int = 2


def worker(folder: Path, base: Path, attempt: Attempt, rank: int) -> None:
    """Go on with the run in `folder` until it ends, or until it is this worker's time to die."""
    torch.set_num_threads(1)
    steps.CheckpointClock = _EveryFourthStep  # type: ignore[misc, assignment]
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet-{attempt.number}", rank=rank, world_size=attempt.num_workers
    )
    os.environ["LOCAL_RANK"] = str(rank)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).train()
    objectives.prepare(model, "base")
    torch.manual_seed(OPTIMIZATION.seed)
    shape = dora.AdapterShape(method="dora", rank=4, alpha=8.0, dropout=0.1, targets=("q_proj", "up_proj"))
    dora.add_adapters(model, shape)
    row_groups = list_row_groups(Location(str(folder / "blocks")))
    data_order = DataOrder(num_units=row_groups.num_blocks, batch_size=12, num_epochs=attempt.num_epochs, seed=3)
    batch_settings = BatchSettings(pad_id=0, micro_batch_tokens=64)
    numbers = {tuple(each.input_ids): each.passage_numbers[0] for each in _passages(row_groups)}
    objective = _Recorded(
        LanguageModelling(
            model=model,
            data_order=data_order,
            batches=lambda first_step: read_shares(
                row_groups, data_order, batch_settings, first_step, of=(rank, attempt.num_workers)
            ),
            dtype=torch.float32,
        ),
        numbers,
        folder,
        attempt,
    )
    if attempt.kill is not None and attempt.kill[0] == rank and attempt.kill[2] == "writing":
        _die_while_writing(attempt.kill[1])
    run_steps(
        DeepSpeedEngine(model, replace(OPTIMIZATION, zero_stage=attempt.zero_stage)),
        objective,
        OPTIMIZATION,
        checkpoints=Location(str(folder / "checkpoints")),
        reporter=_Reporter(folder),
        flops_per_token=1.0,
        doc_ids_of=lambda numbers: [str(number) for number in numbers],
    )
    state = dora.adapter_state(model)
    if rank == 0:
        torch.save(state, folder / "state.pt")
    torch.distributed.destroy_process_group()


class _Recorded:
    """The objective; what a worker is about to train on is written down before it does."""

    def __init__(
        self, inner: LanguageModelling, numbers: dict[tuple[int, ...], int], folder: Path, attempt: Attempt
    ) -> None:
        self.data_order = inner.data_order
        self.batches = inner.batches
        self._inner = inner
        self._numbers = numbers
        self._folder = folder
        self._attempt = attempt

    def work(self, engine: DeepSpeedEngine, batch: Share, step: int) -> StepWork[Batch]:
        work = self._inner.work(engine, batch, step)
        rank = engine.worker_rank
        passages = [self._numbers[ids] for part, weight in work.parts if weight for ids in _texts(part)]
        row = {"attempt": self._attempt.number, "step": step, "passages": passages}
        with (self._folder / f"history-{self._attempt.number}-{rank}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self._attempt.kill == (rank, step, "training"):
            work = replace(work, loss_of=_die)
        return work


def _passages(row_groups: RowGroups) -> Iterator[Block]:
    for number in range(len(row_groups.group_lengths)):
        for block in row_groups.read(number):
            yield from block.passages()


def _texts(part: Batch) -> Iterator[tuple[int, ...]]:
    """The token ids of each passage of a decoder's micro-batch, without its padding."""
    (positions,), (ids,), ends = part.position_ids, part.input_ids, part.passage_ends.tolist()
    for start, end in itertools.pairwise(ends):
        if positions[end - 1]:  # the positions of padding are 0
            yield tuple(ids[start:end].tolist())


class _EveryFourthStep:
    """A clock that goes by steps; each attempt begins after a checkpoint, so at a multiple of four."""

    def __init__(self, _: float) -> None:
        self._num_steps = 0

    def is_due(self, _: float) -> bool:
        self._num_steps += 1
        return self._num_steps % 4 == 0


def _die(*_: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_while_writing(step: int) -> None:
    """Let half of the bytes of a checkpoint reach the disk, then die."""
    write = Location.write_bytes

    def cut(location: Location, data: bytes) -> None:
        if location.name != f"step-{step:09d}.safetensors":
            write(location, data)
            return
        with location.open_output() as stream:
            stream.write(data[: len(data) // 2])
            stream.flush()
            _die()

    Location.write_bytes = cut  # type: ignore[method-assign]


@dataclass
class _Reporter:
    folder: Path

    def __call__(self, report: StepReport) -> None:
        with (self.folder / "losses.jsonl").open("a") as file:
            file.write(json.dumps({"step": report.step, "loss": report.loss}) + "\n")

    def part(self, report: PartReport) -> None:
        pass

    def flush(self, step: int) -> None:
        pass


def surviving_history(folder: Path) -> Iterator[Sequence[int]]:
    """The passages of every step, of all workers of the attempt that came last to this step."""
    rows = [json.loads(line) for file in folder.glob("history-*.jsonl") for line in file.read_text().splitlines()]
    last = {row["step"]: 0 for row in rows}
    for row in rows:
        last[row["step"]] = max(last[row["step"]], row["attempt"])
    for step in sorted(last):
        yield [
            number for row in rows if (row["step"], row["attempt"]) == (step, last[step]) for number in row["passages"]
        ]
