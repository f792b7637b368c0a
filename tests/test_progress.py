import logging
import time

import pytest

from readapt_ray.progress import ProgressReporter, duration


def test_durations_read_as_people_say_them() -> None:
    assert [duration(s) for s in (0, 8.14, 9.96, 59, 200, 7500)] == [
        "0.0 s",
        "8.1 s",
        "10 s",
        "59 s",
        "3 min 20 s",
        "2 h 05 min",
    ]


def test_the_line_has_share_rate_eta_and_note() -> None:
    reporter = ProgressReporter("train")
    reporter.update(100, 400, unit="steps")
    reporter._started_s -= 10.0
    reporter.update(200, note="loss 3.1")
    assert reporter.rate() == pytest.approx(10.0, rel=0.01)
    assert reporter.line() == "train: 200 of 400 steps (50%), 10 steps/s, ETA 20 s, loss 3.1"
    reporter._started_s = time.monotonic() - 200
    assert "0.5 steps/s" in reporter.line()


def test_without_a_terminal_a_line_comes_every_few_seconds(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="readapt_ray"), ProgressReporter("embed") as reporter:
        for done in range(1000):
            reporter.update(done, 1000, unit="passages")
        assert caplog.messages == []
        reporter._last_log_s -= 6
        reporter.update(1000)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("embed: 1,000 of 1,000 passages (100%)")
