"""Write the package's log lines to stderr, for commands, scripts and notebooks."""

import logging
import sys

from readapt_ray import environment

logger = logging.getLogger("readapt_ray")


class _StderrHandler(logging.Handler):
    """A handler that looks up sys.stderr for each line, because a live display replaces it to print lines above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


def write_to_terminal() -> None:
    """Write the package's log lines to stderr, with the time, from level READAPT_LOG_LEVEL on.

    It replaces the handlers of the package's logger and stops propagation to the root logger. It may be called again.

    Raises:
        InputError: READAPT_LOG_LEVEL is not a log level.
    """
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logger.handlers = [handler]
    logger.setLevel(environment.log_level())
    logger.propagate = False


def show_progress() -> None:
    """Show progress in a script or notebook. Does nothing if the script has configured logging itself.

    Raises:
        InputError: READAPT_LOG_LEVEL is not a log level.
    """
    if not logger.hasHandlers():
        level = logger.level
        write_to_terminal()
        if level != logging.NOTSET:
            logger.setLevel(level)


def quiet() -> None:
    """Log only warnings and errors from now on: stages show no progress."""
    logger.setLevel(logging.WARNING)
