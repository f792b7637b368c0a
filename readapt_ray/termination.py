"""SIGTERM, which Slurm, Kubernetes and `timeout` send, ends a command as Ctrl-C does.

Ray puts handlers of its own in place when it starts, one of which prints a C++ stack; `take_back` puts ours in again.
"""

import signal
import threading
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM came: whoever cleans up after Ctrl-C cleans up after it, too."""


_is_ours = threading.Event()


def end_as_ctrl_c_does() -> None:
    """Let SIGTERM raise `Terminated` in the main thread, from now on in this process."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _end)
        _is_ours.set()


def take_back() -> None:
    """Put our handler in again, if this process had it; only the main thread can."""
    if _is_ours.is_set():
        end_as_ctrl_c_does()


def is_told(stop: BaseException) -> bool:
    """Whether SIGTERM ended the work: by our handler, or by Ray's, which exits with the number of the signal."""
    return isinstance(stop, Terminated) or (isinstance(stop, SystemExit) and stop.code == signal.SIGTERM)


def _end(_: int, __: FrameType | None) -> None:
    raise Terminated
