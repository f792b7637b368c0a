"""Work in a thread beside other work, whose result or error is asked for later."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class InBackground(Generic[T]):
    """Runs a function in a thread that ends with the process."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._made: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._made.append(self._function())
        except BaseException as error:
            self._error = error

    def wait(self) -> None:
        """Wait for its end, whatever it is."""
        self._thread.join()

    def result(self) -> T:
        """Wait for its end, and return what it returned or raise what it raised."""
        self.wait()
        if self._error is not None:
            raise self._error
        return self._made[0]
