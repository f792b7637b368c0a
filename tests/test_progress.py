import logging
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from readapt_ray import progress
from readapt_ray.progress import ProgressReporter, duration


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets seconds go by in the eyes of the reporter."""
    clock = SimpleNamespace(now_s=1000.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now_s))

    def wait(seconds: float) -> None:
        clock.now_s += seconds

    return wait


def test_durations_read_as_people_say_them() -> None:
    assert [duration(s) for s in (0, 8.14, 9.96, 59, 200, 7500)] == [
        "0.0 s",
        "8.1 s",
        "10 s",
        "59 s",
        "3 min 20 s",
        "2 h 05 min",
    ]


def test_the_line_has_share_rate_eta_and_note(wait: Callable[[float], None]) -> None:
    reporter = ProgressReporter("train")
    reporter.update(0, 400, unit="steps")
    wait(1)
    reporter.update(100)
    wait(10)
    reporter.update(200, note="loss 3.1")
    assert reporter.rate() == pytest.approx(10.0)
    assert reporter.line() == "train: 200 of 400 steps (50%), 10 steps/s, ETA 20 s, loss 3.1"
    wait(190)
    assert "0.5 steps/s" in reporter.line()


@pytest.mark.parametrize("done_before", [0, 60])
def test_neither_workers_that_start_nor_what_an_earlier_process_did_is_in_the_rate(
    wait: Callable[[float], None], done_before: int
) -> None:
    reporter = ProgressReporter("embed")
    reporter.update(done_before, 300, unit="passages")
    wait(28)
    reporter.update(done_before + 40)
    wait(1)
    assert reporter.line() == f"embed: {done_before + 40} of 300 passages ({(done_before + 40) / 3:.0f}%)"
    wait(1)
    reporter.update(done_before + 80)
    assert reporter.rate() == pytest.approx(20.0)


def test_work_that_begins_anew_is_rated_anew(wait: Callable[[float], None]) -> None:
    reporter = ProgressReporter("merge")
    for done, total, unit in ((0, 10, "M weights"), (5, 10, "M weights"), (0, 100, "MB"), (50, 100, "MB")):
        reporter.update(done, total, unit=unit)
        wait(4)
    assert reporter.rate() == 0
    reporter.update(90)
    assert reporter.rate() == pytest.approx(10.0)
    reporter.update(80)  # what was under way when a worker died
    wait(4)
    assert reporter.rate() == 0


def test_without_a_terminal_the_first_line_comes_at_once_and_then_one_every_few_seconds(
    wait: Callable[[float], None], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="readapt_ray"), ProgressReporter("embed") as reporter:
        for done in range(1000):
            reporter.update(done, 1000, unit="passages")
        assert caplog.messages == ["embed: 0 of 1,000 passages (0%)"]
        wait(6)
        reporter.update(1000)
    assert caplog.messages[1:] == ["embed: 1,000 of 1,000 passages (100%), 166 passages/s, ETA 0.0 s"]


def test_a_terminal_shows_rate_and_eta_beside_the_bar(
    wait: Callable[[float], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with ProgressReporter("embed") as reporter:
        reporter.update(0, 1000, unit="passages")
        assert reporter._bar is not None
        assert reporter._bar.tasks[0].fields["pace"] == ""
        wait(30)
        reporter.update(100)
        wait(10)
        reporter.update(300)
        assert reporter._bar.tasks[0].fields["pace"] == "20 passages/s, ETA 35 s"
