"""The driver of steps under real SIGKILLs: every passage bears loss once an epoch in the history that survives."""

import functools
import json
import multiprocessing
import signal
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from readapt_ray.training import packing, steps
from tests import factories
from tests.training import attempt as attempts
from tests.training.attempt import Attempt

NUM_PASSAGES = 150
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.training.attempt"])


def run(folder: Path, base: Path, attempt: Attempt) -> list[int | None]:
    """The workers' exit codes."""
    workers = [
        CONTEXT.Process(target=attempts.worker, args=(folder, base, attempt, rank))
        for rank in range(attempt.num_workers)
    ]
    for each in workers:
        each.start()
    for each in workers:
        each.join(timeout=600)
    return [each.exitcode for each in workers]


def test_checkpoints_come_by_the_clock_and_not_by_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 50.0
    monkeypatch.setattr(steps.time, "monotonic", lambda: now_s)
    clock = steps.CheckpointClock(300.0)
    due = []
    for step in range(1, 11):
        now_s += 100.0 if step != 7 else 250.0
        due.append(clock.is_due())
    assert [step for step, is_due in enumerate(due, 1) if is_due] == [3, 6, 8]
    every_step = steps.CheckpointClock(0.0)
    assert all(every_step.is_due() for _ in range(3))


@pytest.mark.parametrize(("is_partitioned", "copies"), [(False, [0]), (True, [0, 1, 2])])
def test_only_the_writer_copies_its_state_unless_workers_hold_parts_of_it(
    is_partitioned: bool, copies: list[int]
) -> None:
    copied, written = [], []
    for rank in range(3):
        engine: Any = SimpleNamespace(
            worker_rank=rank, is_partitioned=is_partitioned, state=lambda rank=rank: copied.append(rank) or {}
        )
        reporter: Any = SimpleNamespace(flush=lambda step: written.append(("lines", step)))
        writer: Any = SimpleNamespace(save=lambda step, state: written.append(("state", step)))
        steps._save(engine, 7, reporter, writer)
    assert copied == copies
    assert written == [("lines", 7), ("state", 7)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return factories.tiny_decoder(tmp_path_factory.mktemp("base"))


def new_run(folder: Path) -> Path:
    """A folder with the blocks of numbered passages."""
    (folder / "blocks").mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 20, (NUM_PASSAGES,), generator=generator).tolist()
    rows = [
        (number, torch.randint(3, 300, (length,), generator=generator).tolist())
        for number, length in enumerate(lengths)
    ]
    blocks = list(packing.pack(rows, mode="packed", block_tokens=24))
    pq.write_table(packing.blocks_to_table(blocks, 0), folder / "blocks" / "part-00000.parquet", row_group_size=8)
    return folder


@pytest.fixture(scope="module")
def calm(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of two workers."""
    folder = new_run(tmp_path_factory.mktemp("calm") / "run")
    assert run(folder, base, Attempt(0, 2)) == [0, 0]
    return folder


def largest_difference(one: Path, other: Path) -> float:
    ours, theirs = torch.load(one / "state.pt"), torch.load(other / "state.pt")
    assert ours.keys() == theirs.keys()
    assert max(float(value.abs().max()) for name, value in ours.items() if "lora_B" in name) > 0.01
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def losses(folder: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in map(json.loads, (folder / "losses.jsonl").read_text().splitlines())}


def assert_each_passage_bore_loss_twice(folder: Path) -> None:
    """Once in each of two epochs."""
    steps = list(attempts.surviving_history(folder))
    half = len(steps) // 2
    for epoch in (steps[:half], steps[half:]):
        assert Counter(number for step in epoch for number in step) == Counter(range(NUM_PASSAGES))


@pytest.mark.parametrize(
    "zero_stage", [0, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_killed_workers_and_a_write_cut_short_change_nothing(
    base: Path, tmp_path: Path, calm: Path, zero_stage: int
) -> None:
    """Worker 1 dies in a step, then worker 0 in the midst of a checkpoint, then each in the second epoch."""
    if zero_stage:
        calm = new_run(tmp_path / "calm")
        assert run(calm, base, Attempt(0, 2, zero_stage=zero_stage)) == [0, 0]
    hit = new_run(tmp_path / "hit")
    kills = [(1, 5, "training"), (0, 8, "writing"), (0, 9, "training"), (1, 13, "training")]
    for number, kill in enumerate(kills):
        codes = run(hit, base, Attempt(number, 2, kill, zero_stage=zero_stage))
        assert codes[kill[0]] == -signal.SIGKILL, codes
        assert codes[1 - kill[0]] != 0, "the other worker cannot have ended well"
    assert run(hit, base, Attempt(9, 2, zero_stage=zero_stage)) == [0, 0]
    assert_each_passage_bore_loss_twice(hit)
    assert largest_difference(calm, hit) == 0
    assert losses(calm) == losses(hit)


def test_partitioned_parameters_go_on_from_a_checkpoint(base: Path, tmp_path: Path) -> None:
    """The same at ZeRO 3 in short: what the slow cases above do with more kills."""
    calm, hit = new_run(tmp_path / "calm"), new_run(tmp_path / "hit")
    assert run(calm, base, Attempt(0, 1, zero_stage=3, num_epochs=1)) == [0]
    assert run(hit, base, Attempt(0, 1, (0, 5, "training"), zero_stage=3, num_epochs=1)) == [-signal.SIGKILL]
    assert run(hit, base, Attempt(1, 1, zero_stage=3, num_epochs=1)) == [0]
    assert largest_difference(calm, hit) == 0


def test_every_attempt_may_have_another_number_of_workers(base: Path, tmp_path: Path, calm: Path) -> None:
    hit = new_run(tmp_path / "hit")
    for number, (num_workers, kill) in enumerate([(3, (2, 5, "training")), (1, (0, 11, "training"))]):
        assert -signal.SIGKILL in run(hit, base, Attempt(number, num_workers, kill))
    assert run(hit, base, Attempt(9, 2)) == [0, 0]
    assert_each_passage_bore_loss_twice(hit)
    assert losses(hit).keys() == losses(calm).keys()
    # Dropout differs by worker, so the adapters are near and not equal.
    assert 0 < largest_difference(calm, hit) < 0.05


@pytest.mark.parametrize(
    ("seconds", "is_first", "reports"),
    [
        ((60.0, 2.0, 4.0, 3.0), False, [(0, 0.0), (1, 60.0), (2, 2.0), (3, 3.0)]),
        ((60.0, 2.0), True, [(0, 0.0), (0, 180.0), (1, 60.0)]),
        ((60.0,), True, [(0, 0.0), (0, 180.0)]),
    ],
)
def test_worker_0_reports_from_inside_a_step_from_the_loss_of_the_first_micro_batch_on(
    monkeypatch: pytest.MonkeyPatch, seconds: tuple[float, ...], is_first: bool, reports: list[tuple[int, float]]
) -> None:
    now_s = [0.0]
    monkeypatch.setattr(steps, "time", SimpleNamespace(monotonic=lambda: now_s[0]))
    told: list[Any] = []
    reporter: Any = SimpleNamespace(part=told.append)

    def loss_of(part: float) -> Any:
        now_s[0] += part
        return torch.zeros(())

    work: Any = SimpleNamespace(parts=[(each, 1.0) for each in seconds], loss_of=loss_of)
    report = functools.partial(
        steps.PartReport, step=7, num_steps=20, num_parts=len(seconds), num_tokens=900, checkpoint_every_s=300.0
    )
    for worker_rank in (1, 0):
        engine: Any = SimpleNamespace(worker_rank=worker_rank, device=torch.device("cpu"))
        watched = steps._with_reports(work, engine, reporter, report, is_first=is_first)
        for part, _ in work.parts:
            watched(part)
    assert [(each.done, each.part_s) for each in told] == reports
    assert told[0].peak_memory_bytes > 0


def test_a_checkpoint_comes_before_a_step_that_would_make_it_late(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr(steps.time, "monotonic", lambda: now_s)
    clock = steps.CheckpointClock(300.0)
    due = []
    for step_s in (100.0, 100.0, 100.0, 200.0, 200.0, 20.0, 20.0):
        now_s += step_s
        due.append(clock.is_due(step_s))
    assert due == [False, True, False, True, True, False, False], "never over 300 s of work since the last"
