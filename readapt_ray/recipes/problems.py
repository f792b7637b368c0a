"""Gather what is wrong with a run from several checks, so that one message lists all of it."""

import contextlib
from collections.abc import Iterator

from readapt_ray.errors import UNREADABLE, InputError, ReadaptError, unreadable


class Problems:
    """What is wrong with a run."""

    def __init__(self) -> None:
        self._found: list[ReadaptError] = []
        self.left_out: set[str] = set()
        """Options of the run that are wrong or missing: they have their defaults, or nothing, in its config."""

    @contextlib.contextmanager
    def noted(self, *left_out: str) -> Iterator[None]:
        """Note what a check raises, and continue.

        Args:
            left_out: the options that are then not known.
        """
        try:
            yield
        except UNREADABLE as error:
            self._note(unreadable(error))
            self.left_out.update(left_out)
        except ReadaptError as error:
            self._note(error)
            self.left_out.update(left_out)

    def _note(self, error: ReadaptError) -> None:
        if str(error) not in map(str, self._found):
            self._found.append(error)

    def __bool__(self) -> bool:
        """Return whether anything is wrong."""
        return bool(self._found)

    def raise_them(self) -> None:
        """Raise what was noted.

        Raises:
            InputError: that one error, or one that lists all.
        """
        if len(self._found) == 1:
            raise self._found[0]
        if self._found:
            lines = "".join(f"\n  - {error}" for error in self._found)
            raise InputError(f"{len(self._found)} things are wrong, and nothing was started:{lines}")
