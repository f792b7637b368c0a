"""Collect the errors of several checks of a run, so that one message lists all of them."""

import contextlib
from collections.abc import Iterator

from readapt_ray.errors import UNREADABLE, InputError, ReadaptError, unreadable


class Problems:
    """A list of errors that were found in the options or inputs of a run."""

    def __init__(self) -> None:
        self._found: list[ReadaptError] = []
        self.left_out: set[str] = set()
        """Names of the run's options that are wrong or missing. In its config they have their default, or are empty."""

    @contextlib.contextmanager
    def collecting(self, *left_out: str) -> Iterator[None]:
        """Record a ReadaptError or an unreadable path that the `with` block raises, and continue after the block.

        Other errors are not caught. Errors with the same message are recorded once.

        Args:
            left_out: names of options that cannot be used if the block fails.
        """
        try:
            yield
        except UNREADABLE as error:
            self._record(unreadable(error))
            self.left_out.update(left_out)
        except ReadaptError as error:
            self._record(error)
            self.left_out.update(left_out)

    def _record(self, error: ReadaptError) -> None:
        if str(error) not in map(str, self._found):
            self._found.append(error)

    def __bool__(self) -> bool:
        """Return whether any error was recorded."""
        return bool(self._found)

    def raise_them(self) -> None:
        """Raise the recorded errors; do nothing if there are none.

        Raises:
            InputError: a single message that lists all errors. If there is only one, that error itself is raised.
        """
        if len(self._found) == 1:
            raise self._found[0]
        if self._found:
            lines = "".join(f"\n  - {error}" for error in self._found)
            raise InputError(f"{len(self._found)} things are wrong, and nothing was started:{lines}")
