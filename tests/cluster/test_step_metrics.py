"""What the terminal is told of training steps."""

import logging
from pathlib import Path
from typing import Any

import pytest

from readapt_ray.artifacts import Workspace
from readapt_ray.cluster import run_monitor, step_metrics
from readapt_ray.cluster.step_metrics import note
from readapt_ray.progress import ProgressReporter
from readapt_ray.storage import Location


def row(**changes: Any) -> dict[str, Any]:
    values = {
        "loss": 3.0,
        "learning_rate": 2e-4,
        "gradient_norm": 1.5,
        "tokens_per_s": 100.0,
        "mfu": None,
        "padding_share": 0.25,
        "seconds": 1.0,
        "data_wait_s": 0.0,
        "peak_memory_bytes": 2_000_000_000,
    }
    return values | changes


def test_speeds_are_means_over_the_latest_steps_and_the_rest_is_of_the_last() -> None:
    rows = [row(tokens_per_s=1500.0, loss=4.0), row(tokens_per_s=40.0, seconds=19.0, data_wait_s=5.0)]
    assert note(rows) == (
        "loss 3.000, lr 2.0e-04, gradient 1.5, 113 tokens/s, padding 25%, waited 25%, 2.0 GB"
    )  # (1,500 * 1 + 40 * 19) tokens in 20 seconds


def test_mfu_is_a_mean_too_where_it_is_known() -> None:
    assert "100 tokens/s, MFU 35%," in note([row(mfu=0.5), row(mfu=0.3, seconds=3.0)])


def test_joining_removes_the_kept_lines_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "metrics"
    folder.mkdir()
    (folder / "step-000000001-000000001.jsonl").write_text('{"step": 1}\n')
    (folder / "notes.jsonl").write_text("precious")
    (folder / "deep").mkdir()
    assert step_metrics.last_written_step(Location(str(tmp_path))) == 1
    assert step_metrics.join(Location(str(tmp_path))) == [{"step": 1}]
    assert sorted(path.name for path in folder.iterdir()) == ["deep", "notes.jsonl"]


def part(**changes: Any) -> dict[str, Any]:
    values = {"step": 0, "num_steps": 500, "done": 2, "num_parts": 16, "part_s": 10.0, "num_tokens": 64_000}
    return values | {"peak_memory_bytes": 14_000_000_000, "checkpoint_every_s": 300.0} | changes


def test_a_long_step_tells_once_what_the_run_takes_and_then_how_far_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="readapt_ray")
    workspace = Workspace(Location(str(tmp_path)), "", ProgressReporter("train"))
    inside = step_metrics._InsideSteps(workspace)
    inside.show(part())
    assert caplog.messages == [
        "train: a step takes about 2 min 40 s (16 micro-batches, 400 tokens/s), and the 500 steps about 22 h 13 min; 14.0 GB of "
        "memory in worker 0 so far",
        "train: 0 of 500 steps (0%), in step 1: 2 of 16 micro-batches",
    ]
    inside.show(part(step=3, done=5))
    assert workspace.reporter.line() == "train: 3 of 500 steps (1%), in step 4: 5 of 16 micro-batches"
    assert sum("takes about" in each for each in caplog.messages) == 1


def test_short_steps_are_not_shown_from_inside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="readapt_ray")
    workspace = Workspace(Location(str(tmp_path)), "", ProgressReporter("train"))
    step_metrics._InsideSteps(workspace).show(part(part_s=0.1))
    assert caplog.messages == []


def test_a_first_step_of_one_micro_batch_tells_what_it_takes_that_it_is_at_work_and_what_an_interruption_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="readapt_ray")
    now_s = 1000.0
    monkeypatch.setattr(step_metrics.time, "monotonic", lambda: now_s)
    workspace = Workspace(Location(str(tmp_path)), "", ProgressReporter("train"))
    inside = step_metrics._InsideSteps(workspace)
    inside.show(None)
    inside.show(part(done=0, num_parts=1, part_s=0.0))
    now_s += 9
    inside.show(None)
    assert caplog.messages == []
    now_s += 33
    inside.show(None)
    assert workspace.reporter.line().endswith("in step 1: 0 of 1 micro-batch, at work for 42 s")
    assert not any("takes about" in each for each in caplog.messages)
    inside.show(part(done=0, num_parts=1, part_s=400.0))
    (told,) = (each for each in caplog.messages if "takes about" in each)
    assert told.startswith(
        "train: a step takes about 6 min 40 s (1 micro-batch, 160 tokens/s), and the 500 steps about 55 h"
    )
    assert told.endswith(
        "; checkpoints come between steps, so an interruption loses up to 6 min 40 s: a smaller batch_size loses less"
    )
    now_s += 60
    inside.show(None)
    assert workspace.reporter.line().endswith("at work for 1 min 42 s")
    inside.end()
    before = len(caplog.messages)
    now_s += 60
    inside.show(None)
    assert len(caplog.messages) == before


def test_a_warning_of_workers_reaches_the_drivers_log_once(
    ray_session: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import ray

    monitor = ray.remote(num_cpus=0)(run_monitor.RunMonitor).remote("train")
    in_worker = logging.Logger("readapt_ray")
    in_worker.addHandler(run_monitor.WarningPoster(monitor))
    workspace = Workspace(Location(str(tmp_path)), "", ProgressReporter("train"))
    with caplog.at_level(logging.INFO, "readapt_ray"), step_metrics.showing_metrics(monitor, workspace, ()):
        for _ in range(2):  # two workers
            in_worker.warning("layers are not compiled: %s", "no compiler")
        in_worker.info("not for the terminal")
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert told == ["train: layers are not compiled: no compiler"]
    assert "not for the terminal" not in caplog.text
