"""Turn rows into clean passages, and count kinds of rows and values that do not fit.

Values of kept columns are converted to the types in which they are stored. A value that does not fit becomes null and is
counted.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, TypeVar

import pyarrow as pa

from readapt_ray.records import Passage
from readapt_ray.sources.cleaning import checked, kinds_of, shown
from readapt_ray.sources.columns import kept_value
from readapt_ray.sources.source import BadRow, Row

logger = logging.getLogger("readapt_ray")

Place = TypeVar("Place")


class RowChecks(Generic[Place]):
    """Turns rows into clean passages with their kept columns, and keeps the counts for the manifest.

    `num_changed_ids` counts the ids that cleaning changed, `kinds` the passages by `kinds_of`.
    """

    def __init__(self, kept: pa.Schema, *, max_text_bytes: int) -> None:
        self.num_changed_ids = 0
        self.kinds: Counter[str] = Counter()
        self.unfit: dict[str, tuple[int, Place, str]] = {}
        """Per kept column: the number of values that do not fit its type, the place of the first, and that value."""
        self._kept, self._max_text_bytes = kept, max_text_bytes

    def passage(self, row: Row | BadRow, place: Place) -> Passage | BadRow:
        """Convert a row to a passage, or return a bad row with the reason. A given bad row is returned unchanged.

        Bad rows are not counted here. `place` identifies the row in `unfit`, in any form that the caller likes.
        """
        if isinstance(row, BadRow):
            return row
        passage = checked(row, max_text_bytes=self._max_text_bytes)
        if isinstance(passage, BadRow):
            return passage
        self.num_changed_ids += isinstance(row.doc_id, str) and row.doc_id != passage.doc_id
        self.kinds.update(kinds_of(row, passage))
        return passage._replace(columns=self._columns(row, place)) if row.kept else passage

    def _columns(self, row: Row, place: Place) -> dict[str, Any]:
        found = {}
        for field, raw in zip(self._kept, row.kept, strict=True):
            try:
                found[field.name] = kept_value(raw, field.type)
            except ValueError:
                found[field.name] = None
                count, first, value = self.unfit.get(field.name, (0, place, shown(raw)))
                self.unfit[field.name] = (count + 1, first, value)
        return found


def merged(
    unfit: Iterable[tuple[int, Mapping[str, tuple[int, int, str]]]],
) -> dict[str, tuple[int, tuple[int, int], str]]:
    """Sum the values that did not fit over all tasks, by column. A place becomes (piece, line).

    Args:
        unfit: number and `RowChecks.unfit` of each piece, in the order of the pieces.
    """
    total: dict[str, tuple[int, tuple[int, int], str]] = {}
    for piece, found in unfit:
        for name, (count, line, value) in found.items():
            before, first, shown_value = total.get(name, (0, (piece, line), value))
            total[name] = (before + count, first, shown_value)
    return total


def log_unfit(
    unfit: Mapping[str, tuple[int, Place, str]], kept: pa.Schema, place_of: Callable[[Place], str]
) -> dict[str, dict[str, Any]]:
    """Log the values that did not fit their columns, and return number and first of them by column, for the manifest.

    Args:
        unfit: the values, as `RowChecks.unfit` has them.
        kept: schema of the kept columns.
        place_of: converts a place to text.
    """
    details = {}
    for name, (count, place, value) in unfit.items():
        details[name] = {"count": count, "first": f"{place_of(place)}: {value}"}
        logger.warning(
            "ingest: %d values of the kept column %r are null, because they are not of type %s, first %s; --keep %s:string keeps any",
            *(count, name, kept.field(name).type, details[name]["first"], name),
        )
    return details
