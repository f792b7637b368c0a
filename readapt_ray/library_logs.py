"""Keep the log lines of Ray, DeepSpeed and Hugging Face's libraries off the terminal, and write them to files.

`silence` removes their handlers that write to the terminal. Their log lines go to the files of `written_to`, if any.
Output that does not use Python's logging (the C++ parts of Ray) is not changed.
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
"""This library adds its handler whenever it is imported, so a filter catches its records before they reach the handler."""
_FORMAT = "%(asctime)s %(name)s %(levelname)s %(message)s"

_files: list[logging.Handler] = []


class LogFile(logging.FileHandler):
    """A log file that silently drops lines while its disk is full or its folder is missing.

    Python's FileHandler prints a traceback for each such line and raises when it is closed. That would hide the errors of
    the work itself.
    """

    def __init__(self, file: Path, line_format: str) -> None:
        super().__init__(file, encoding="utf-8", delay=True)
        self.setFormatter(logging.Formatter(line_format))

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        with contextlib.suppress(OSError):  # the first record opens the file
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Report an error in a log record. Errors of the file system are ignored."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        """Write buffered lines if the disk has room, and close the file."""
        with contextlib.suppress(OSError):
            super().close()


class _ToFiles(logging.Handler):
    """A log handler that writes each record to all open files."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        for each in _files:
            each.handle(record)


class _Caught(logging.Filter):
    """A log filter that writes each record to all open files and stops it there."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Write a record to the files, and return False so that no other handler gets it."""
        _to_files.handle(record)
        return False


_to_files = _ToFiles(logging.INFO)  # at DEBUG, ray.data would fill the log of a run
_caught = _Caught()


def silence() -> None:
    """Stop libraries from logging to the terminal. Their lines go to the files of `written_to` and `add_file`.

    Only handlers that the libraries already have are removed. It may be called again.
    """
    for name in _LIBRARIES:
        logger = logging.getLogger(name)
        for handler in [each for each in logger.handlers if _writes_to_terminal(each)]:
            logger.removeHandler(handler)
        if name == _LATE:
            logger.addFilter(_caught)
            continue
        logger.propagate = False
        logger.addHandler(_to_files)


@functools.cache  # every change of the filters makes Python show old warnings again
def hush_notebooks() -> None:
    """Suppress messages of tqdm and Ray that ask for ipywidgets in a notebook. Their bars and tables are not shown anyway."""
    warnings.filterwarnings("ignore", message="IProgress not found")
    logging.getLogger("ray.widgets").setLevel(logging.WARNING)


def _writes_to_terminal(handler: logging.Handler) -> bool:
    return isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler)


def add_file(file: Path) -> logging.Handler:
    """Write the libraries' log lines to a file until the process ends, and return the handler.

    Only lines from level INFO on are written, and none before `silence` was called.
    """
    handler = LogFile(file, _FORMAT)
    _files.append(handler)
    return handler


@contextlib.contextmanager
def written_to(file: Path) -> Iterator[None]:
    """Write the libraries' log lines to a file inside the `with` block."""
    handler = add_file(file)
    try:
        yield
    finally:
        _files.remove(handler)
        handler.close()
