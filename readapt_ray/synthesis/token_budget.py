"""Limit the tokens of requests that several threads send at the same time."""

import threading


class TokenBudget:
    """A number of tokens that requests may use. Each request reserves what it may take, and is then settled.

    So the requests that are under way count too, and the limit is not exceeded, but for estimates that were too low.
    """

    def __init__(self, limit: int | None, *, spent: int = 0) -> None:
        """Start to count.

        Args:
            limit: most tokens to use; None for no limit.
            spent: tokens that were used before.
        """
        self.spent = spent
        """Tokens of all settled requests, and those of before."""
        self.is_exhausted = False
        """Whether a request was left out because the budget had no room for it."""
        self._limit = limit
        self._reserved = 0
        self._settled = threading.Condition()

    def reserve(self, expected: int) -> bool:
        """Reserve tokens for a request; return False if the budget has no room for it.

        It waits while requests that are under way may leave room, since most use less than they reserved.
        """
        with self._settled:
            while self._limit is not None and self.spent + self._reserved + expected > self._limit:
                if not self._reserved:
                    self.is_exhausted = True
                    return False
                self._settled.wait()
            self._reserved += expected
            return True

    def settle(self, expected: int, used: int) -> None:
        """Replace the reservation of a request by the tokens that it used; 0 if it failed."""
        with self._settled:
            self._reserved -= expected
            self.spent += used
            self._settled.notify_all()
