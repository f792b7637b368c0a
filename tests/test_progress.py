import contextlib
import fcntl
import io
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from readapt_ray import live_display, log_output, progress
from readapt_ray.progress import ProgressReporter, duration


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets seconds go by in the eyes of the reporter."""
    clock = SimpleNamespace(now_s=1000.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now_s))

    def wait(seconds: float) -> None:
        clock.now_s += seconds

    return wait


def shown() -> list[Any]:
    """The rows of the live display."""
    assert live_display._display.progress is not None
    return list(live_display._display.progress.tasks)


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
        (task,) = shown()
        assert task.fields["pace"] == ""
        wait(30)
        reporter.update(100)
        wait(10)
        reporter.update(300)
        assert task.fields["pace"] == "20 passages/s, ETA 35 s"
    assert live_display._display.progress is None


def test_a_run_and_its_stages_share_one_display(
    wait: Callable[[float], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    caplog.set_level(logging.INFO, logger="readapt_ray")
    with ProgressReporter("run", is_outline=True) as outline:
        outline.update(0, 9, unit="stages", note="0 of 9 stages done")
        with ProgressReporter("merge") as merge, ProgressReporter("embed") as embed:
            merge.update(1, 4, unit="shards")
            thread = threading.Thread(target=embed.update, args=(2, 8))  # what runs beside it has a row, too
            thread.start()
            thread.join()
            rows = [(each.description, each.completed, each.total) for each in shown()]
            assert rows == [("run", 0, 9), ("merge", 1, 4), ("embed", 2, 8)]
        wait(60)
        outline.update(1, 9)
        assert [(each.description, each.completed, each.fields["pace"]) for each in shown()] == [("run", 1, "")]
    assert live_display._display.progress is None
    assert caplog.messages == []


def test_nothing_is_shown_when_quiet_or_on_a_terminal_that_cannot_move_its_cursor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "dumb")
    with ProgressReporter("embed") as reporter:
        assert reporter._row is None
    monkeypatch.setenv("TERM", "xterm")
    log_output.quiet()
    with ProgressReporter("embed") as reporter:
        assert reporter._row is None


def test_a_notebook_shows_rows_in_the_output_of_its_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []

    class ZMQInteractiveShell:
        """What IPython calls the shell of a notebook's kernel."""

    def display(rows: Any, display_id: bool) -> Any:
        drawn.append(rows)
        return SimpleNamespace(update=drawn.append)

    module = SimpleNamespace(get_ipython=ZMQInteractiveShell, display=SimpleNamespace(display=display))
    monkeypatch.setitem(sys.modules, "IPython", module)
    monkeypatch.setitem(sys.modules, "IPython.display", module.display)
    with ProgressReporter("embed") as reporter:
        reporter.update(3, 10, unit="passages")
    assert len(drawn) == 2, "the row, and its removal"
    printed = io.StringIO()
    Console(width=100, file=printed).print(drawn[0])
    assert "embed" in printed.getvalue()
    assert "30%" in printed.getvalue()


def test_log_lines_stand_whole_above_the_rows_on_a_real_terminal(tmp_path: Path) -> None:
    code = (
        "import logging, time; from readapt_ray import log_output; from readapt_ray.progress import ProgressReporter\n"
        "log_output.write_to_terminal(); log = logging.getLogger('readapt_ray')\n"
        "with ProgressReporter('run', is_outline=True) as run, ProgressReporter('embed') as stage:\n"
        "    run.update(2, 9); stage.update(5, 10, unit='passages'); time.sleep(0.3)\n"
        "    log.info('a line of the log'); time.sleep(0.3)\n"
        "log.info('the last line')\n"
    )
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    environment = {**os.environ, "TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-c", code], stdin=slave, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    output = b""
    with contextlib.suppress(OSError):  # the other end of a terminal is closed
        while chunk := os.read(master, 65536):
            output += chunk
    os.close(master)
    assert process.wait() == 0
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output.decode())
    lines = [line.strip() for line in re.split(r"[\r\n]+", plain)]
    assert any(line.startswith("run") and "22%" in line for line in lines)
    assert any(line.startswith("embed") and "50%" in line for line in lines)
    assert any(re.fullmatch(r"\d\d:\d\d:\d\d a line of the log", line) for line in lines)
    assert lines[-2].endswith("the last line") or lines[-1].endswith("the last line")


def test_one_is_not_several() -> None:
    assert [progress.amount(*each) for each in ((1, "passages"), (2, "queries"), (1, "queries"), (1, "MB"))] == [
        "1 passage",
        "2 queries",
        "1 query",
        "1 MB",
    ]
    reporter = ProgressReporter("embed")
    reporter.update(1, 1, unit="passages")
    assert reporter.line() == "embed: 1 of 1 passage (100%)"
