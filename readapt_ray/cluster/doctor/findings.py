"""Define checks and their findings, and run checks in parallel with a time limit."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from readapt_ray.errors import ReadaptError, first_line


@dataclass(frozen=True)
class Problem:
    """A problem that a check found."""

    text: str
    """The problem and, after a semicolon, the advice."""
    fails: bool = True
    """Whether the problem makes a run fail; if False, the run is only slower."""


@dataclass(frozen=True)
class Finding:
    """The result of a check."""

    shown: str
    """Text of its cell in the table."""
    problems: tuple[Problem, ...] = ()
    """Empty if all is well."""


@dataclass(frozen=True)
class Check:
    """A check that runs on one machine."""

    name: str
    """Column of the table."""
    look: Callable[[], Finding]
    """Runs the check; an error that it raises becomes a problem."""
    advice_on_timeout: str
    """Advice for the user if the check does not end in time."""


def failed(text: str) -> Finding:
    """Return a finding with one problem that makes a run fail; its cell in the table is "fails".

    Args:
        text: what is wrong and, after a semicolon, what to do.
    """
    return Finding("fails", (Problem(text),))


def run_checks(checks: Sequence[Check], *, limit_s: float) -> dict[str, Finding]:
    """Run all checks in parallel threads; return the finding of each by its name.

    A check that raises has a problem as its finding. A thread that hangs in a system call (a dead mount, a lost
    network) cannot be stopped, so it is left running.

    Args:
        checks: checks with different names.
        limit_s: seconds to wait for all of them. A check that is not done by then becomes a problem.
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
    silent = {check.name: failed(f"no answer within {limit_s:g} s; {check.advice_on_timeout}") for check in checks}
    return {check.name: found.get(check.name, silent[check.name]) for check in checks}


def _finding_of(check: Check) -> Finding:
    try:
        return check.look()
    except ReadaptError as error:
        return failed(first_line(error))
    except Exception as error:
        return failed(f"{type(error).__name__}: {first_line(error)}; fix this, then run doctor again")
