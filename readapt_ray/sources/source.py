"""Define `Source`, the base class of all readers of corpora.

A source yields raw rows one at a time, each with its place (file and line). Input that cannot be a row is yielded as a
`BadRow`. Cleaning, the policy for bad rows and deduplication happen elsewhere.
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
"""The value of a field that a row does not have. This differs from null."""


class Unreadable(NamedTuple):
    """The value of a field that Python cannot hold, such as a date after the year 9999. `text` says what it is."""

    text: str

    def __repr__(self) -> str:
        return self.text


class Row(NamedTuple):
    """A raw, unchecked passage from a source. `place` is file and line."""

    place: str
    doc_id: object
    title: object
    text: object
    kept: tuple[object, ...] = ()
    """Values of the kept columns, in the order of `Source.kept`."""


class BadRow(NamedTuple):
    """A row that cannot become a record: its place, the reason (a key of `REASONS`), and the value if that helps."""

    place: str
    reason: str
    value: str = ""

    @property
    def message(self) -> str:
        """Place, reason and value as text for a message."""
        return f"{self.place}: {REASONS[self.reason]}{f': {self.value}' if self.value else ''}"

    def as_json(self) -> dict[str, str]:
        """Return the fields that are not empty, for the manifest."""
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
    "bad_relevance": "its relevance is not a whole number",
    "conflicting_judgement": "an earlier row judges the same passage otherwise",
    "not_pdf": "it cannot be read as PDF",
    "not_python": "it does not parse as Python",
}
"""Every reason why a row can be bad, with the text for messages."""


def in_words(by_reason: Mapping[str, int]) -> str:
    """Return counts of bad rows per reason (a key of `REASONS`) as text: "it has no id: 2"; "" if there are none."""
    return "; ".join(f"{REASONS[reason]}: {count:,}" for reason, count in by_reason.items())


@dataclass
class Span:
    """A part of a file: a range of bytes of a text file, or of row groups of Parquet.

    A reader sets `num_lines` when it reaches the end of the part.
    """

    start: int
    end: int
    num_lines: int = 0


class Source(ABC):
    """A corpus that can be read: passages, and queries and judgements if it has any."""

    format: str
    """Name of the format on the command line."""
    title_tells_apart: ClassVar[bool] = True
    """Whether two passages with the same text but different titles are different passages."""
    labels_from_passages: ClassVar[bool] = False
    """Whether queries are made from the passages. Then a query is dropped together with its passage."""
    has_qrels: bool = False
    """Whether the source has judgements."""
    fraction_read: float = 0.0
    """Fraction of the source that `rows` has read, from 0 to 1; 0 if unknown."""
    kept: pa.Schema = pa.schema([])
    """The kept columns, with the types in which they are stored. Known after `check`."""

    @abstractmethod
    def check(self) -> None:
        """Check that the source can be read, by opening it and reading a little.

        Raises:
            CorpusError: the source is empty, has no text or id column, or does not have its format.
        """

    @abstractmethod
    def rows(self) -> Iterator[Row | BadRow]:
        """Yield every row, always in the same order, with bounded memory.

        Raises:
            CorpusError: a file is damaged or cut short.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hash that changes when the source changes; ingest keeps its output only while it is the same.

        Local files are read in full. Of files in an object store, size and modification time stand for the content; of
        a published collection, its name does.
        """

    def description(self) -> dict[str, Any]:
        """Return a description for the manifest: files and columns that are read, and those that are not; else {}."""
        return {}

    def queries(self) -> Iterator[Query | BadRow]:
        """Yield the queries of the source; none by default."""
        yield from ()

    def qrels(self) -> dict[str, Iterator[Qrel | BadRow]]:
        """Return the judgements by split ("test"), as iterators that can be read once; empty by default."""
        return {}
