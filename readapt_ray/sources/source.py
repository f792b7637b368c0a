"""What a source of passages is, whatever it is read from.

A source yields raw rows, each with its place (file and line), one at a time; what cannot be a row
at all it yields as a `BadRow`. Cleaning, the bad-row policy and duplicates are not its business.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, NamedTuple

import pyarrow as pa

from readapt_ray.records import Qrel, Query


class _Missing:
    def __repr__(self) -> str:
        return "MISSING"


MISSING: Final = _Missing()
"""The value of a field that a row does not have, which is not the same as null."""


class Row(NamedTuple):
    """A passage as its source gives it: nothing is checked yet. `place` is file and line."""

    place: str
    doc_id: object
    title: object
    text: object
    kept: tuple[object, ...] = ()
    """Values of the columns that are carried along."""


class BadRow(NamedTuple):
    """What cannot become a record: its place, why (a key of `REASONS`), and the value where that helps."""

    place: str
    reason: str
    value: str = ""

    @property
    def told(self) -> str:
        """Its place and reason in words."""
        return f"{self.place}: {REASONS[self.reason]}{f': {self.value}' if self.value else ''}"

    def as_json(self) -> dict[str, str]:
        """Return its fields for a manifest."""
        return {name: text for name, text in self._asdict().items() if text}


REASONS: Final[dict[str, str]] = {
    "missing_text": "it has no text field",
    "null_text": "its text is null",
    "text_not_string": "its text is not a string",
    "empty_text": "its text is empty",
    "long_text": "its title and text have more bytes than --max-text-bytes",
    "missing_id": "it has no id",
    "id_not_string": "its id is neither a string nor a whole number",
    "title_not_string": "its title is neither a string nor a number",
    "duplicate_id": "an earlier row has its id",
    "not_utf8": "it is not UTF-8",
    "not_json": "it is not JSON",
    "not_json_object": "it is not a JSON object",
    "wrong_columns": "it has another number of columns than the first line",
    "bad_quotes": "its quotes are not valid CSV",
    "bad_relevance": "its relevance is not a whole number",
    "conflicting_judgement": "an earlier row judges the same passage otherwise",
    "not_pdf": "it cannot be read as PDF",
    "not_python": "it does not parse as Python",
}
"""Every reason for which a row is bad, in words."""


def in_words(by_reason: Mapping[str, int]) -> str:
    """Return how many rows are bad for which reason: "it has no id: 2"."""
    return "; ".join(f"{REASONS[reason]}: {count:,}" for reason, count in by_reason.items())


@dataclass
class Span:
    """A part of a file: bytes of a text, row groups of Parquet. Who reads it to its end sets `num_lines`."""

    start: int
    end: int
    num_lines: int = 0


class Source(ABC):
    """Passages, and queries and judgements where there are some, from one place."""

    format: str
    """Its name on the command line."""
    title_tells_apart: ClassVar[bool] = True
    """Whether passages of one text and two titles are two passages."""
    labels_from_passages: ClassVar[bool] = False
    """Whether queries are made from the passages: one loses its sense where its passage was dropped."""
    has_qrels: bool = False
    """Whether it comes with judgements, which point at ids."""
    fraction_read: float = 0.0
    """How much of it `rows` has read, from 0 to 1; 0 where that is not known."""
    kept: pa.Schema = pa.schema([])
    """The columns that are carried along, with the types in which they are stored; known after `check`."""

    @abstractmethod
    def check(self) -> None:
        """Look whether it can be read at all: opens it, reads a little.

        Raises:
            CorpusError: it is empty, has no text or id column, or is not of its format.
        """

    @abstractmethod
    def rows(self) -> Iterator[Row | BadRow]:
        """Return every row, always in the same order, with bounded memory.

        Raises:
            CorpusError: a file is cut short.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Hash all that it holds."""

    def description(self) -> dict[str, Any]:
        """Return what the manifest says of it: files and columns that are read, and those that are not."""
        return {}

    def queries(self) -> Iterator[Query | BadRow]:
        """Return its queries."""
        yield from ()

    def qrels(self) -> dict[str, Iterator[Qrel | BadRow]]:
        """Return its judgements by split."""
        return {}
