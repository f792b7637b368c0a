"""Show the work in progress as rows of one live display, on a terminal or in a notebook.

All work of a process shares the display: the stages of a run, the stage at work, and what runs beside it. It begins with the
first row and ends with the last one. Elsewhere there is none, and progress is logged in lines.
"""

import os
import sys
import threading
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

_NOTEBOOK_REFRESH_S = 0.5
_lock = threading.Lock()
_display: "_Display | None" = None


class Row:
    """A row of the live display."""

    def __init__(self, display: "_Display", task: TaskID) -> None:
        self._display = display
        self._task = task

    def update(self, done: int, total: int | None, *, pace: str, note: str) -> None:
        """Show how much is done, at which pace."""
        self._display.progress.update(self._task, completed=done, total=total, pace=pace, note=note)
        self._display.refresh()

    def remove(self) -> None:
        """Remove the row; with the last one the display ends."""
        global _display  # noqa: PLW0603
        with _lock:
            self._display.progress.remove_task(self._task)
            self._display.refresh(is_last=True)
            if not self._display.progress.tasks:
                self._display.end()
                _display = None


def add_row(label: str) -> Row | None:
    """Return a new row; None where nothing can be shown: no terminal and no notebook."""
    global _display  # noqa: PLW0603
    with _lock:
        if _display is None and (is_terminal() or is_notebook()):
            _display = _Display()
        if _display is None:
            return None
        return Row(_display, _display.progress.add_task(label, total=None, pace="", note=""))


def is_terminal() -> bool:
    """Return whether stderr is a terminal that can move its cursor."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def is_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return type(shell).__name__ == "ZMQInteractiveShell"


class _Display:
    """A rich display: drawn by a thread of rich's on a terminal, and by `refresh` in a notebook."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            TaskProgressColumn(),
            TextColumn("{task.fields[pace]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self._is_notebook = not is_terminal()
        self._refreshed_s = 0.0
        self._handle: Any = None
        self.progress = Progress(*columns, console=Console(stderr=True), transient=True, disable=self._is_notebook)
        self.progress.start()

    def refresh(self, *, is_last: bool = False) -> None:
        """Draw the rows into the output of a notebook's cell, twice per second at most."""
        if not self._is_notebook or (not is_last and time.monotonic() - self._refreshed_s < _NOTEBOOK_REFRESH_S):
            return
        self._refreshed_s = time.monotonic()
        from IPython.display import display

        rows = self.progress.make_tasks_table(self.progress.tasks)
        if self._handle is None:
            self._handle = display(rows, display_id=True)
        else:
            self._handle.update(rows)

    def end(self) -> None:
        """Remove the display from the terminal."""
        self.progress.stop()
