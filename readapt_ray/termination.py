"""End a command on SIGTERM, which Slurm, Kubernetes and `timeout` send, as on Ctrl-C.

Ray puts handlers of its own in place when it starts, one of which prints a C++ stack; `take_back` puts ours in again.
Python drops a KeyboardInterrupt that is raised while an object is deleted, in `__del__` or in a weak reference's callback,
and the command would continue: the signal is sent again. Ray raises a plain KeyboardInterrupt where a signal ends its waiting,
whichever signal that was: what was received is noted.
"""

import os
import signal
import sys
import threading
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

_AGAIN_S = 0.05


class Terminated(KeyboardInterrupt):
    """SIGTERM was received. It is a KeyboardInterrupt, so that cleanup after Ctrl-C runs."""


_is_ours = threading.Event()
_is_received = threading.Event()


def end_as_ctrl_c_does() -> None:
    """Let SIGTERM raise `Terminated` in the main thread, from now on in this process; drop neither it nor a Ctrl-C."""
    if threading.current_thread() is threading.main_thread():
        _is_received.clear()
        signal.signal(signal.SIGTERM, _end)
        sys.unraisablehook = _send_again
        _is_ours.set()


def take_back() -> None:
    """Install our handler again if this process had it; only the main thread can."""
    if _is_ours.is_set():
        end_as_ctrl_c_does()


def is_told(stop: BaseException) -> bool:
    """Return whether SIGTERM ended the work: by our handler, or by Ray's, which exits with the number of the signal."""
    if isinstance(stop, SystemExit):
        return stop.code == signal.SIGTERM
    return isinstance(stop, Terminated) or _is_received.is_set()


def _end(_: int, __: FrameType | None) -> None:
    _is_received.set()
    raise Terminated


def _send_again(dropped: "UnraisableHookArgs") -> None:
    """Send the signal of an interrupt that Python dropped again, when the main thread has left the deletion."""
    if not isinstance(dropped.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(dropped)
        return
    number = signal.SIGTERM if isinstance(dropped.exc_value, Terminated) else signal.SIGINT
    again = threading.Timer(_AGAIN_S, os.kill, (os.getpid(), number))
    again.daemon = True
    again.start()
