"""The main job on three nodes under kills and a full disk, in short; benchmarks/chaos.py runs many seeds."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.chaos import harness

REPOSITORY = Path(__file__).parent.parent


def test_thirty_seeds_hold_every_kind_of_event_and_hit_every_step() -> None:
    events = [event for seed in range(30) for event in harness.drawn(seed, can_fill=True)]
    assert {event.kind for event in events} == set(harness.KINDS)
    assert {event.place for event in events} == set(range(len(harness.STEPS)))
    assert harness.drawn(7, can_fill=True) == harness.drawn(7, can_fill=True)
    assert not any(event.kind == "disk" for seed in range(30) for event in harness.drawn(seed, can_fill=False))


def test_a_step_that_was_taken_again_counts_once_and_a_lost_passage_is_seen(tmp_path: Path) -> None:
    def write(name: str, group: str, first_s: float, steps: dict[int, list[int]], rank: int = 0) -> None:
        lines = [
            {"group": group, "time": first_s + step, "step": step, "rank": rank, "passages": passages}
            for step, passages in steps.items()
        ]
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))

    write("a", "old", 0.0, {0: [1], 1: [3], 2: [5]})
    write("b", "old", 0.0, {0: [2], 1: [4]}, rank=1)
    write("c", "new", 10.0, {1: [3], 2: [5]})
    write("d", "new", 10.0, {1: [4], 2: [6]}, rank=1)
    assert harness.trained_on(tmp_path) == Counter([1, 2, 3, 4, 5, 6])
    (tmp_path / "d").unlink()
    assert harness.trained_on(tmp_path) == Counter([1, 2, 3, 5])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [0, 3])
def test_a_disturbed_run_ends_as_an_undisturbed_one(seed: int, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "benchmarks/chaos.py",
        "--first",
        str(seed),
        "--seeds",
        "1",
        "--work",
        str(tmp_path / "work"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "chaos.json")],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (record,) = json.loads((tmp_path / "chaos.json").read_text())["seeds"].values()
    assert record["events"]
    assert record["same_passages_trained_on"] is not False
    assert record["files_that_differ"] == []
