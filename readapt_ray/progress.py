"""Progress of long work: a bar with rate and ETA on a terminal, a log line every few seconds elsewhere."""

import logging
import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

logger = logging.getLogger("readapt_ray")

_LOG_INTERVAL_S = 5.0


class ProgressReporter:
    """Shows how far a piece of work is. Use as a context manager; call `update` as often as you like."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.done = 0
        self.total: int | None = None
        self.unit = ""
        self.note = ""
        self._started_s = time.monotonic()
        self._first_done: int | None = None
        self._last_log_s = self._started_s
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=28),
                TaskProgressColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(self.label, total=None, rate="", note="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, total: int | None = None, *, unit: str = "", note: str = "") -> None:
        """Say that `done` of `total` units are done; `note` is shown beside them (a loss, a count)."""
        self.done, self.total, self.unit, self.note = done, total or self.total, unit or self.unit, note
        now_s = time.monotonic()
        if self._first_done is None:
            self._first_done, self._started_s = done, now_s
        if self._bar is not None:
            rate = f"{figure(self.rate())} {self.unit}/s" if done > self._first_done else ""
            self._bar.update(self._task, completed=done, total=self.total, rate=rate, note=note)
        elif now_s - self._last_log_s >= _LOG_INTERVAL_S:
            self._last_log_s = now_s
            logger.info("%s", self.line())

    def rate(self) -> float:
        """Units a second since the first update; work that an earlier process did does not count."""
        return (self.done - (self._first_done or 0)) / max(time.monotonic() - self._started_s, 1e-9)

    def line(self) -> str:
        """The state as one line of text."""
        rate = self.rate()
        text = f"{self.label}: {self.done:,}"
        if self.total:
            text += f" of {self.total:,} {self.unit} ({100 * self.done / self.total:.0f}%)"
        else:
            text += f" {self.unit}"
        if rate > 0:
            text += f", {figure(rate)} {self.unit}/s"
            if self.total:
                text += f", ETA {duration((self.total - self.done) / rate)}"
        return f"{text}, {self.note}" if self.note else text


def figure(rate: float) -> str:
    """A rate in two figures below ten, whole above."""
    return f"{rate:,.0f}" if rate >= 9.95 else f"{rate:.2g}"


def duration(seconds: float) -> str:
    """Seconds as people say them: 8.1 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
