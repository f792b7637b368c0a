"""Report progress of long work: a live row with rate and ETA on a terminal or in a notebook, else a log line every 5 s."""

import logging
import time
from types import TracebackType
from typing import Self

from readapt_ray import live_display
from readapt_ray.live_display import Row

logger = logging.getLogger("readapt_ray")

_LOG_INTERVAL_S = 5.0
_MIN_RATED_S = 2.0
"""Seconds before a rate is shown. An earlier rate would mostly show how many workers finished at the same time."""


class ProgressReporter:
    """Show the progress of a piece of work. Use it as a context manager; call `update` as often as you like.

    The rate counts from the first unit that finished in this process. So it does not include units of an earlier process
    or the time to start workers. It is shown from two seconds after that unit on.
    """

    def __init__(self, label: str, *, is_outline: bool = False) -> None:
        """Make a reporter.

        Args:
            label: name of the work, such as a stage.
            is_outline: True for work that consists of stages with their own reporters: shows no rate and no log lines.
        """
        self.label = label
        self.done = 0
        self.total: int | None = None
        self.unit = ""
        self.note = ""
        self._is_outline = is_outline
        self._rated_from: tuple[int, float] | None = None
        self._last_log_s: float | None = None
        self._row: Row | None = None

    def __enter__(self) -> Self:
        if logger.level <= logging.INFO:
            self._row = live_display.add_row(self.label)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._row is not None:
            self._row.remove()

    def update(self, done: int, total: int | None = None, *, unit: str = "", note: str = "") -> None:
        """Report that `done` of `total` units are done in all. `note` is shown beside them, such as a loss.

        A total or unit that is left out stays as before. A note does not.
        """
        now_s = time.monotonic()
        if self._last_log_s is None or done < self.done or (unit and unit != self.unit):
            self._rated_from = None
        elif self._rated_from is None and done > self.done:
            self._rated_from = done, now_s
        self.done, self.total, self.unit, self.note = done, total or self.total, unit or self.unit, note
        if self._last_log_s is None or now_s - self._last_log_s >= _LOG_INTERVAL_S:
            self._last_log_s = now_s
            if self._row is None and not self._is_outline:
                logger.info("%s", self.line())
        if self._row is not None:
            self._row.update(done, self.total, pace=", ".join(self._pace()), note=note)

    def rate(self) -> float:
        """Return the rate in units per second; 0 if it is not known yet."""
        if self._rated_from is None:
            return 0.0
        first, since_s = self._rated_from
        seconds = time.monotonic() - since_s
        return (self.done - first) / seconds if seconds >= _MIN_RATED_S else 0.0

    def line(self) -> str:
        """Return the progress as one line of text, such as "embed: 3 of 10 shards (30%)"."""
        text = f"{self.label}: {self.done:,}"
        if self.total:
            text += f" of {amount(self.total, self.unit)} ({100 * self.done / self.total:.0f}%)"
        else:
            text = f"{self.label}: {amount(self.done, self.unit)}"
        return ", ".join([text, *self._pace(), *([self.note] if self.note else [])])

    def _pace(self) -> list[str]:
        """Return rate and ETA as texts, as far as they are known."""
        rate = self.rate()
        if rate <= 0 or self._is_outline:
            return []
        pace = [f"{figure(rate)} {self.unit}/s"]
        return [*pace, f"ETA {duration((self.total - self.done) / rate)}"] if self.total else pace


def amount(count: int, unit: str) -> str:
    """Return a count with its unit: "300 passages", "1 passage", "1 query". `unit` is given in the plural."""
    if count == 1:
        unit = f"{unit[:-3]}y" if unit.endswith("ies") else unit.removesuffix("es" if unit.endswith("ches") else "s")
    return f"{count:,} {unit}"


def size_text(num_bytes: float) -> str:
    """Return a size as text with three significant digits: "87 bytes", "1.2 KB", "350 MB", "14.2 GB"."""
    for unit in ("bytes", "KB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.3g} GB"


def figure(rate: float) -> str:
    """Return a rate as text: two significant digits below 10, a whole number above."""
    return f"{rate:,.0f}" if rate >= 9.95 else f"{rate:.2g}"


def duration(seconds: float) -> str:
    """Return a duration as text: "8.1 s", "3 min 20 s", "2 h 05 min"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
