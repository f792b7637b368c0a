"""End a command on SIGTERM, which Slurm, Kubernetes and `timeout` send, as on Ctrl-C: with one line, and in time.

Ray puts handlers of its own in place when it starts, one of which prints a C++ stack; `take_back` puts ours in again.
Python drops a KeyboardInterrupt that is raised while an object is deleted, in `__del__` or in a weak reference's callback,
and the command would continue: the signal is sent again. Ray raises a plain KeyboardInterrupt where a signal ends its waiting,
whichever signal that was: what was received is noted.

A signal to a whole process group, which is what `timeout` and Slurm send, ends Ray's processes too. What asks them to
clean up then waits until Ray's C++ code ends this process after 60 s; Slurm and Kubernetes kill it after 30. So cleanup
has a limit, and after the signal what C++ prints is dropped. A thread learns of the signal at once: Python runs handlers
in the main thread alone, which may be inside C++ code.
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
"""Cleanup after a signal may take so long."""
_VAIN_S = 0.5
"""What is left of that once those are gone who are asked to clean up."""
_SAME_S = 1.0
"""A second signal within this time is the same one: `timeout` sends it to the process, and to its group."""
_POLL_S = 0.05


class Terminated(KeyboardInterrupt):
    """SIGTERM was received. It is a KeyboardInterrupt, so that cleanup after Ctrl-C runs."""


@dataclass
class _Stop:
    """What is known of the signal that ends this process."""

    is_ours: bool = False
    """Whether our handlers are in place."""
    is_sigterm: bool = False
    first_s: float | None = None
    """When the signal was received."""
    give_up: Callable[[], None] | None = None
    is_vain: Callable[[], bool] | None = None
    has_own_stderr: bool = False
    """Whether sys.stderr has another file descriptor than C++ code."""
    is_limited: bool = False
    """Whether cleanup has its limit by now."""
    pipe: int | None = None
    """Where Python writes the number of each signal as it comes."""


_stop = _Stop()


def end_as_ctrl_c_does(give_up: Callable[[], None] | None = None, *, is_vain: Callable[[], bool] | None = None) -> None:
    """Let SIGTERM raise `Terminated` in the main thread, from now on in this process; drop neither it nor a Ctrl-C.

    Args:
        give_up: ends the process; called in a thread if it still runs 20 s after a signal, and on a second signal. If omitted,
            cleanup has no limit.
        is_vain: returns whether those are gone who are asked to clean up, which shortens the limit.
    """
    if threading.current_thread() is threading.main_thread():
        _stop.is_sigterm, _stop.first_s, _stop.is_limited = False, None, False
        _stop.give_up, _stop.is_vain = give_up, is_vain
        _keep_stderr()
        _install()


def take_back() -> None:
    """Install our handlers again if this process had them; only the main thread can."""
    if _stop.is_ours and threading.current_thread() is threading.main_thread():
        _install()


def is_told(stop: BaseException) -> bool:
    """Return whether SIGTERM ended the work: by our handler, or by Ray's, which exits with the number of the signal."""
    if isinstance(stop, SystemExit):
        return stop.code == signal.SIGTERM
    return isinstance(stop, Terminated) or has_sigterm()


def has_sigterm() -> bool:
    """Return whether SIGTERM was received."""
    return _stop.is_sigterm


def _install() -> None:
    signal.signal(signal.SIGTERM, _end)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background jobs ignore it
        signal.signal(signal.SIGINT, _interrupt)
    sys.unraisablehook = _send_again
    if _stop.pipe is None:
        heard, _stop.pipe = os.pipe()
        os.set_blocking(_stop.pipe, False)
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # a signal to a child is none to us
        threading.Thread(target=_hear, args=(heard,), daemon=True).start()
    signal.set_wakeup_fd(_stop.pipe, warn_on_full_buffer=False)
    _stop.is_ours = True


def _hear(pipe: int) -> None:
    """Limit cleanup as soon as a signal comes, whatever the main thread is doing."""
    while numbers := os.read(pipe, 64):
        if {signal.SIGTERM, signal.SIGINT} & set(numbers):
            _stop.is_sigterm |= signal.SIGTERM in numbers
            _limit()


def _keep_stderr() -> None:
    """Give sys.stderr a file descriptor of its own, so that what C++ code prints can be dropped after a signal."""
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
    """Note the signal, and limit what cleanup takes from now on; return False if cleanup is not to be disturbed."""
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
    """Drop what C++ code prints from now on, and limit what cleanup takes."""
    if _stop.is_limited:
        return
    _stop.is_limited = True
    if _stop.has_own_stderr:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    if _stop.give_up is not None:
        threading.Thread(target=_limit_cleanup, args=(_stop.give_up, _stop.is_vain), daemon=True).start()


def _limit_cleanup(give_up: Callable[[], None], is_vain: Callable[[], bool] | None) -> None:
    deadline_s = time.monotonic() + _CLEANUP_S
    while time.monotonic() < deadline_s:
        time.sleep(_POLL_S)
        if _stop.give_up is not give_up:  # another command began in this process
            return
        if is_vain is not None and is_vain():
            deadline_s, is_vain = min(deadline_s, time.monotonic() + _VAIN_S), None
    give_up()


def _send_again(dropped: "UnraisableHookArgs") -> None:
    """Send the signal of an interrupt that Python dropped again, when the main thread has left the deletion."""
    stop = dropped.exc_value
    is_rays = isinstance(stop, SystemExit) and is_told(stop)
    if not (isinstance(stop, KeyboardInterrupt) or is_rays):
        sys.__unraisablehook__(dropped)
        return
    _stop.first_s = None
    number = signal.SIGTERM if is_rays or isinstance(stop, Terminated) else signal.SIGINT
    again = threading.Timer(_AGAIN_S, os.kill, (os.getpid(), number))
    again.daemon = True
    again.start()
