"""Show progress as rows of one live display, on a terminal or in a notebook.

All work of a process shares the display: a row for the whole run, one for the current stage, and one per background
task. The display starts with the first row and ends when the last row is removed. Without a terminal or notebook there
is no display, and progress is logged in lines.
"""

import os
import sys
import threading
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

_NOTEBOOK_REFRESH_S = 0.5


class Row:
    """A row of the live display: one piece of work with its progress."""

    def __init__(self, display: "_Display", task: TaskID) -> None:
        self._display = display
        self._task = task

    def update(self, done: int, total: int | None, *, pace: str, note: str) -> None:
        """Show progress in the row.

        Args:
            done: units that are done.
            total: units in all; None if unknown.
            pace: rate and ETA as text.
            note: text at the end of the row.
        """
        self._display.update(self._task, completed=done, total=total, pace=pace, note=note)

    def remove(self) -> None:
        """Remove the row. The display ends when no row is left."""
        self._display.remove(self._task)


def add_row(label: str) -> Row | None:
    """Add a row to the live display and return it; None if there is neither a terminal nor a notebook."""
    if _display.progress is None and not is_terminal() and not is_notebook():
        return None
    return Row(_display, _display.add(label))


def is_terminal() -> bool:
    """Return whether stderr is a terminal that can move its cursor."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def is_notebook() -> bool:
    """Return whether this process is the kernel of a Jupyter notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return type(shell).__name__ == "ZMQInteractiveShell"


class _Display:
    """The live display. On a terminal a thread of the library `rich` draws it; in a notebook `_draw` does."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.progress: Progress | None = None
        """None while there is no row."""
        self._handle: Any = None
        self._refreshed_s = 0.0

    def add(self, label: str) -> TaskID:
        """Add a row. The first row starts the display."""
        with self._lock:
            if self.progress is None:
                self.progress = _started()
                self._handle, self._refreshed_s = None, 0.0
            return self.progress.add_task(label, total=None, pace="", note="")

    def update(self, task: TaskID, **values: Any) -> None:
        """Change fields of a row."""
        with self._lock:
            if self.progress is not None:
                self.progress.update(task, **values)
                self._draw(self.progress)

    def remove(self, task: TaskID) -> None:
        """Remove a row. The display ends with the last one."""
        with self._lock:
            if self.progress is not None:
                self.progress.remove_task(task)
                self._draw(self.progress, is_last=True)
                if not self.progress.tasks:
                    self.progress.stop()
                    self.progress = None

    def _draw(self, progress: Progress, *, is_last: bool = False) -> None:
        """Draw the rows into the output of a notebook's cell, at most twice per second."""
        if not progress.disable or (not is_last and time.monotonic() - self._refreshed_s < _NOTEBOOK_REFRESH_S):
            return
        self._refreshed_s = time.monotonic()
        from IPython.display import display

        rows = progress.make_tasks_table(progress.tasks)
        if self._handle is None:
            self._handle = display(rows, display_id=True)
        else:
            self._handle.update(rows)


def _started() -> Progress:
    """Start a `rich` display. In a notebook it is disabled, because rich's thread cannot draw there."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        TaskProgressColumn(),
        TextColumn("{task.fields[pace]}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    progress = Progress(*columns, console=Console(stderr=True), transient=True, disable=not is_terminal())
    progress.start()
    return progress


_display = _Display()
