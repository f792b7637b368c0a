"""Count the bad rows that ingest leaves out, and log the first of them."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

from readapt_ray.errors import CorpusError
from readapt_ray.records import Qrel, Query
from readapt_ray.sources.source import BadRow, in_words

logger = logging.getLogger("readapt_ray")

NUM_NAMED = 20

_Record = TypeVar("_Record", Query, Qrel)


class BadRows:
    """Counts bad rows, and skips them or raises an error, as the policy says.

    `reasons` has the number of bad rows per reason, `first` the first 20 of them.
    """

    def __init__(self, policy: Literal["skip", "fail", "gather"]) -> None:
        """Set the policy.

        Args:
            policy: "skip" logs the first 20 rows, "fail" raises an error for the first one. "gather" does neither;
                `reasons` and `first` are then passed on to another process.
        """
        self._policy = policy
        self.reasons: Counter[str] = Counter()
        self.first: list[BadRow] = []

    def add(self, row: BadRow) -> None:
        """Count one bad row. See `add_counted` for what the policy does with it."""
        self.add_counted({row.reason: 1}, [row])

    def add_counted(self, reasons: Mapping[str, int], first: Iterable[BadRow]) -> None:
        """Add bad rows that were counted elsewhere.

        Args:
            reasons: number of rows per reason (a key of `REASONS`).
            first: the first of these rows. They are kept (with "skip" also logged) until 20 are known.

        Raises:
            CorpusError: the policy is "fail", and `first` has a row.
        """
        self.reasons.update(reasons)
        for row in first:
            if self._policy == "fail":
                raise CorpusError(f"bad row at {row.message}; fix it, or leave such rows out with --bad-rows skip")
            if len(self.first) == NUM_NAMED:
                return
            self.first.append(row)
            if self._policy == "skip":
                logger.warning("ingest: left out %s", row.message)

    def good(self, records: Iterable[_Record | BadRow]) -> list[_Record]:
        """Return the good records as a list, and count the bad rows among them.

        Raises:
            CorpusError: the policy is "fail", and there is a bad row.
        """
        found = []
        for record in records:
            if isinstance(record, BadRow):
                self.add(record)
            else:
                found.append(record)
        return found

    def none_left(self, source: str) -> CorpusError:
        """Return (do not raise) the error for a source without a usable passage; `source` names it in the message."""
        reasons = in_words(dict(sorted(self.reasons.items())))
        if not reasons:
            return CorpusError(f"{source!r} holds no rows; give a corpus with at least one passage")
        return CorpusError(
            f"no passages are left of {source!r}: every row is bad ({reasons}); the log names the first of them: fix them, or say "
            f"which columns of a table to read with --columns doc_id=COLUMN,text=COLUMN"
        )

    def summary(self) -> dict[str, Any]:
        """Return the counts and the first bad rows for the manifest, with keys `total`, `by_reason` and `first`."""
        return {
            "total": self.reasons.total(),
            "by_reason": dict(sorted(self.reasons.items())),
            "first": [row.as_json() for row in self.first],
        }
