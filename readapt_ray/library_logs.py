"""Keep what Ray, DeepSpeed and Hugging Face's libraries log off the terminal, and write it to files.

`silence` takes their handlers that write to the terminal away; what they log goes to the files of `written_to`, if any. What
they print without Python's logging (C++ parts of Ray) is not changed.
"""

import contextlib
import functools
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

_LIBRARIES = (
    "ray", "ray.data", "ray.train", "ray.serve", "ray.tune", "transformers", "accelerate", "bitsandbytes", "DeepSpeed",
    "pypdf",
)  # fmt: skip
_LATE = "DeepSpeed"
"""Adds its handler when it is imported, whatever is there: its records are caught before they reach it."""
_FORMAT = "%(asctime)s %(name)s %(levelname)s %(message)s"

_files: list[logging.Handler] = []


class LogFile(logging.FileHandler):
    """A log file whose lines are lost while its disk is full or its folder is gone.

    logging's own prints a traceback for each such line, and raises when it is closed, which hides what the work itself says.
    """

    def __init__(self, file: Path, line_format: str) -> None:
        super().__init__(file, encoding="utf-8", delay=True)
        self.setFormatter(logging.Formatter(line_format))

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        with contextlib.suppress(OSError):  # the first one opens the file
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Say that a record cannot be written, unless the file cannot."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        """Write what is left, if there is room, and close the file."""
        with contextlib.suppress(OSError):
            super().close()


class _ToFiles(logging.Handler):
    """Hand each record to all open files."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        for each in _files:
            each.handle(record)


class _Caught(logging.Filter):
    """Hand each record to all open files, and to nothing else."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Write a record, and drop it."""
        _to_files.handle(record)
        return False


_to_files = _ToFiles(logging.INFO)  # ray.data would fill the log of a run with what it does in each second
_caught = _Caught()


def silence() -> None:
    """Take the libraries off the terminal; what they log goes to the files of `written_to`."""
    for name in _LIBRARIES:
        logger = logging.getLogger(name)
        for handler in [each for each in logger.handlers if _writes_to_terminal(each)]:
            logger.removeHandler(handler)
        if name == _LATE:
            logger.addFilter(_caught)
            continue
        logger.propagate = False
        logger.addHandler(_to_files)


@functools.cache  # each change of the filters makes Python repeat warnings that it has shown
def hush_notebooks() -> None:
    """Keep tqdm and Ray from asking for ipywidgets in a notebook: they are imported for bars and tables that are not shown."""
    warnings.filterwarnings("ignore", message="IProgress not found")
    logging.getLogger("ray.widgets").setLevel(logging.WARNING)


def _writes_to_terminal(handler: logging.Handler) -> bool:
    return isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler)


def add_file(file: Path) -> logging.Handler:
    """Write what the libraries log to a file, too, until the process ends."""
    handler = LogFile(file, _FORMAT)
    _files.append(handler)
    return handler


@contextlib.contextmanager
def written_to(file: Path) -> Iterator[None]:
    """Write what the libraries log to a file, too, inside the block."""
    handler = add_file(file)
    try:
        yield
    finally:
        _files.remove(handler)
        handler.close()
