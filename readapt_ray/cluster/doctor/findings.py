"""Define what a check reports, and run checks side by side, each with a time limit."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from readapt_ray.errors import ReadaptError, first_line


@dataclass(frozen=True)
class Problem:
    """A text that says what is wrong and, after a semicolon, what to do."""

    text: str
    fails: bool = True
    """Whether work will fail by it; otherwise it is slower than it need be."""


@dataclass(frozen=True)
class Finding:
    """The result of a check: its cell in the table, and its problems."""

    shown: str
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True)
class Check:
    """A check that runs on one machine."""

    name: str
    """Column of the table."""
    look: Callable[[], Finding]
    """Returns what it finds; an error that it raises is a problem, too."""
    if_silent: str
    """What to do if it does not come to an end."""


def failed(text: str) -> Finding:
    """Return a finding with one problem."""
    return Finding("fails", (Problem(text),))


def run_checks(checks: Sequence[Check], *, limit_s: float) -> dict[str, Finding]:
    """Run all checks at once, and return what each found, by name.

    A thread that hangs in a system call (a dead mount, a lost network) cannot be ended, so it is left behind.

    Args:
        checks: with different names.
        limit_s: how long to wait for all of them. One that is not done by then is a problem of its own.
    """
    found: dict[str, Finding] = {}

    def run(check: Check) -> None:
        found[check.name] = _finding_of(check)

    threads = {check.name: threading.Thread(target=run, args=(check,), daemon=True) for check in checks}
    for thread in threads.values():
        thread.start()
    deadline_s = time.monotonic() + limit_s
    for thread in threads.values():
        thread.join(max(0.0, deadline_s - time.monotonic()))
    silent = {check.name: failed(f"no answer within {limit_s:g} s; {check.if_silent}") for check in checks}
    return {check.name: found.get(check.name, silent[check.name]) for check in checks}


def _finding_of(check: Check) -> Finding:
    try:
        return check.look()
    except ReadaptError as error:
        return failed(first_line(error))
    except Exception as error:
        return failed(f"{type(error).__name__}: {first_line(error)}; fix this, then run doctor again")
