"""End a command on SIGTERM (sent by Slurm, Kubernetes and `timeout`) as on Ctrl-C: with one line, and in time.

Ray and Python make this difficult:

- Ray installs its own signal handlers when it starts, and one prints a C++ stack. `take_back` installs ours again.
- Python drops a KeyboardInterrupt that is raised in `__del__` or in a weak reference's callback, so the command would
  continue. Then we send the signal again.
- If a signal ends one of Ray's waits, Ray raises KeyboardInterrupt whichever signal it was. So we remember the signal.
- `timeout` and Slurm signal the whole process group, which also ends Ray's processes. Code that asks them to clean up
  then waits, until Ray's C++ code ends this process after 60 s. Slurm and Kubernetes kill it after 30 s. So cleanup has a
  time limit, and after the signal the output of C++ code is discarded.
- Python runs signal handlers only in the main thread, which may be inside C++ code. So a thread receives the signal too.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

_AGAIN_S = 0.05
_CLEANUP_S = 20.0
"""Maximum time of the cleanup after a signal."""
_WITHOUT_RAY_S = 0.5
"""Remaining time for cleanup once Ray's processes, which it would ask, have ended."""
_SAME_S = 1.0
"""A second signal within this time counts as the same one: `timeout` signals the process and then its group."""
_POLL_S = 0.05


class Terminated(KeyboardInterrupt):
    """SIGTERM was received. It is a KeyboardInterrupt, so that cleanup after Ctrl-C runs."""


@dataclass
class _Stop:
    """State of the signal handling in this process."""

    is_ours: bool = False
    """Whether our handlers are in place."""
    is_sigterm: bool = False
    first_s: float | None = None
    """When the first signal was received (monotonic clock). None: not yet."""
    give_up: Callable[[], None] | None = None
    is_ray_gone: Callable[[], bool] | None = None
    has_own_stderr: bool = False
    """Whether sys.stderr uses another file descriptor than C++ code does."""
    is_limited: bool = False
    """Whether the time limit of cleanup has started."""
    pipe: int | None = None
    """File descriptor to which Python writes the number of each signal it receives."""
    is_dropping: bool = False
    """Whether the hook for a dropped interrupt is running. A signal that arrives meanwhile would be dropped too."""


_stop = _Stop()


def handle_sigterm(give_up: Callable[[], None] | None = None, *, is_ray_gone: Callable[[], bool] | None = None) -> None:
    """Raise `Terminated` in the main thread on SIGTERM, from now on in this process, and never lose a SIGTERM or Ctrl-C.

    Does nothing outside the main thread. If called again, earlier signals are forgotten.

    Args:
        give_up: ends the process. It is called in a thread if the process still runs 20 s after a signal, and on a second
            signal. If omitted, cleanup has no time limit.
        is_ray_gone: returns whether the Ray processes of this process have ended. Then the limit is cut to 0.5 s.
    """
    if threading.current_thread() is threading.main_thread():
        _stop.is_sigterm, _stop.first_s, _stop.is_limited = False, None, False
        _stop.give_up, _stop.is_ray_gone = give_up, is_ray_gone
        _keep_stderr()
        _install()


def take_back() -> None:
    """Install our signal handlers again if this process had them. Does nothing outside the main thread."""
    if _stop.is_ours and threading.current_thread() is threading.main_thread():
        _install()


def is_from_sigterm(stop: BaseException) -> bool:
    """Return whether SIGTERM ended the work, judged by the exception that ended it.

    True for our `Terminated`, for a SystemExit with the signal's number as exit code (Ray's handler), and for any other
    exception but SystemExit once SIGTERM has been received.
    """
    if isinstance(stop, SystemExit):
        return stop.code == signal.SIGTERM
    return isinstance(stop, Terminated) or has_sigterm()


def has_sigterm() -> bool:
    """Return whether SIGTERM was received since the last `handle_sigterm`."""
    return _stop.is_sigterm


def _install() -> None:
    signal.signal(signal.SIGTERM, _end)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # background jobs of a shell ignore SIGINT
        signal.signal(signal.SIGINT, _interrupt)
    sys.unraisablehook = _send_again
    if _stop.pipe is None:
        heard, _stop.pipe = os.pipe()
        os.set_blocking(_stop.pipe, False)
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # ignore signals to a forked child
        threading.Thread(target=_hear, args=(heard,), daemon=True).start()
    signal.set_wakeup_fd(_stop.pipe, warn_on_full_buffer=False)
    _stop.is_ours = True


def _hear(pipe: int) -> None:
    """Start the time limit of cleanup as soon as a signal arrives, whatever the main thread is doing."""
    while numbers := os.read(pipe, 64):
        if {signal.SIGTERM, signal.SIGINT} & set(numbers):
            _stop.is_sigterm |= signal.SIGTERM in numbers
            _limit()


def _keep_stderr() -> None:
    """Give sys.stderr another file descriptor, so that the output of C++ code can be discarded after a signal."""
    stderr = sys.__stderr__
    if not _stop.has_own_stderr and stderr is not None and stderr is sys.stderr and stderr.fileno() == 2:
        sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, encoding=stderr.encoding, errors=stderr.errors)
        _stop.has_own_stderr = True


def _end(_: int, __: FrameType | None) -> None:
    _stop.is_sigterm = True
    if _is_to_raise():
        raise Terminated


def _interrupt(_: int, __: FrameType | None) -> None:
    if _is_to_raise():
        raise KeyboardInterrupt


def _is_to_raise() -> bool:
    """Record the signal and start the time limit of cleanup. Return False if running cleanup must not be interrupted."""
    now_s = time.monotonic()
    if _stop.first_s is not None:
        if now_s - _stop.first_s < _SAME_S:
            return False
        if _stop.give_up is not None:
            threading.Thread(target=_stop.give_up, daemon=True).start()
        return _stop.give_up is None
    _stop.first_s = now_s
    _limit()
    return True


def _limit() -> None:
    """Discard the output of C++ code from now on, and start the time limit of cleanup."""
    if _stop.is_limited:
        return
    _stop.is_limited = True
    if _stop.has_own_stderr:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    if _stop.give_up is not None:
        threading.Thread(target=_limit_cleanup, args=(_stop.give_up, _stop.is_ray_gone), daemon=True).start()


def _limit_cleanup(give_up: Callable[[], None], is_ray_gone: Callable[[], bool] | None) -> None:
    deadline_s = time.monotonic() + _CLEANUP_S
    while time.monotonic() < deadline_s:
        time.sleep(_POLL_S)
        if _stop.give_up is not give_up:  # another command began in this process
            return
        if is_ray_gone is not None and is_ray_gone():
            deadline_s, is_ray_gone = min(deadline_s, time.monotonic() + _WITHOUT_RAY_S), None
    give_up()


def _send_again(dropped: "UnraisableHookArgs") -> None:
    """If Python dropped an interrupt, send its signal again after 50 ms, when the main thread has left this function."""
    stop = dropped.exc_value
    is_rays = isinstance(stop, SystemExit) and is_from_sigterm(stop)
    if not (isinstance(stop, KeyboardInterrupt) or is_rays):
        sys.__unraisablehook__(dropped)
        return
    _stop.first_s = None
    number = signal.SIGTERM if is_rays or isinstance(stop, Terminated) else signal.SIGINT
    _stop.is_dropping = True
    try:
        threading.Thread(target=_send_once_dropped, args=(number,), daemon=True).start()
    finally:
        _stop.is_dropping = False


def _send_once_dropped(number: int) -> None:
    """Send a signal to this process. On a busy machine the main thread may need longer than 50 ms to get ready for it."""
    time.sleep(_AGAIN_S)
    while _stop.is_dropping:
        time.sleep(_AGAIN_S)
    os.kill(os.getpid(), number)
