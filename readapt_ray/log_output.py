"""Send the package's log lines to the terminal of a command, or to the output of a script or notebook."""

import logging
import sys

from readapt_ray import environment

logger = logging.getLogger("readapt_ray")


class _StderrHandler(logging.Handler):
    """Write to what sys.stderr is at that moment: a live display takes its place, and moves out of the way of each line."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


def write_to_terminal() -> None:
    """Write the log to stderr as lines with the time, from the level of READAPT_LOG_LEVEL on.

    Raises:
        InputError: READAPT_LOG_LEVEL is not a level.
    """
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logger.handlers = [handler]
    logger.setLevel(environment.log_level())
    logger.propagate = False


def show_progress() -> None:
    """Show progress in a script or notebook that set up no logging; a set-up of its own stays as it is.

    Raises:
        InputError: READAPT_LOG_LEVEL is not a level.
    """
    if not logger.hasHandlers():
        level = logger.level
        write_to_terminal()
        if level != logging.NOTSET:
            logger.setLevel(level)


def quiet() -> None:
    """Show warnings only: no progress of the stages that are called from now on."""
    logger.setLevel(logging.WARNING)
