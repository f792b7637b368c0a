"""Pass step metrics, warnings and errors from training workers to the driver."""

import logging
from typing import Any

MEASURED = (
    "loss",
    "learning_rate",
    "gradient_norm",
    "tokens_per_s",
    "mfu",
    "padding_share",
    "seconds",
    "data_wait_s",
    "peak_memory_bytes",
)
"""Values of a step that are sent to Ray's metrics and to the trackers."""


class RunMonitor:
    """An actor that passes step metrics, warnings and errors from the workers to the driver.

    It also sets Ray's metrics (for Prometheus, `ray_readapt_train_loss` and so on), and remembers the placement group
    of the workers. Nothing is stored: if it crashes, it starts empty.

    Args:
        stage: name of the stage, for Ray's metrics.
    """

    def __init__(self, stage: str) -> None:
        from ray.util.metrics import Gauge

        self._rows: list[dict[str, Any]] = []
        self._part: dict[str, Any] | None = None
        self._error: Exception | None = None
        self._warnings: list[str] = []
        self._num_taken = 0
        self._held: Any = None
        self._kept_step = 0
        self._gauges = {
            name: Gauge(f"readapt_{stage}_{name}", description=f"{name} of the last step of readapt {stage}")
            for name in ("step", *MEASURED)
        }

    def post(self, rows: list[dict[str, Any]]) -> None:
        """Add step metrics of worker 0, one row per step; set Ray's metrics to the last row."""
        self._rows.extend(rows)
        for name, gauge in self._gauges.items():
            if rows and rows[-1][name] is not None:
                gauge.set(float(rows[-1][name]))

    def take(self) -> list[dict[str, Any]]:
        """Return the rows that were posted since the last call, and forget them; empty if there are none."""
        rows, self._rows = self._rows, []
        return rows

    def post_part(self, part: dict[str, Any]) -> None:
        """Store the latest report from inside a step of worker 0, in place of the report before."""
        self._part = part

    def take_part(self) -> dict[str, Any] | None:
        """Return the latest report from inside a step; None if none came since the last call."""
        part, self._part = self._part, None
        return part

    def warn(self, text: str) -> None:
        """Add a warning of a worker, unless the same text was added before."""
        if text not in self._warnings:
            self._warnings.append(text)

    def take_warnings(self) -> list[str]:
        """Return the warnings that were added since the last call, oldest first."""
        taken, self._num_taken = self._warnings[self._num_taken :], len(self._warnings)
        return taken

    def fail(self, error: Exception) -> None:
        """Record an error that a restart would not fix; only the first is kept."""
        self._error = self._error or error

    def error(self) -> Exception | None:
        """Return the error that ends the run; None if there is none."""
        return self._error

    def keep(self, step: int) -> None:
        """Note that a checkpoint of this step is about to be written."""
        self._kept_step = max(self._kept_step, step)

    def kept_step(self) -> int:
        """Return the highest step that `keep` was called with; 0 before the first. Its checkpoint may be incomplete."""
        return self._kept_step

    def hold(self, placement_group: Any) -> None:
        """Remember the placement group of the workers that are starting."""
        self._held = placement_group

    def held(self) -> Any:
        """Return the placement group of the last start; None before the first."""
        return self._held


class WarningPoster(logging.Handler):
    """A log handler that posts a worker's warnings to the monitor; without it they appear only in Ray's log files."""

    def __init__(self, monitor: Any) -> None:
        super().__init__(logging.WARNING)
        self._monitor = monitor

    def emit(self, record: logging.LogRecord) -> None:
        """Post the message of a warning or error to the monitor, without its traceback; do not wait."""
        self._monitor.warn.remote(record.getMessage())
