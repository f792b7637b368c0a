"""Which column of a table holds the id, the title and the text."""

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from readapt_ray.errors import CorpusError

ID_NAMES: Final = ("doc_id", "_id", "id")
TITLE_NAMES: Final = ("title",)
TEXT_NAMES: Final = ("text", "contents", "body")
QUERY_ID_NAMES: Final = ("query_id", "_id", "id", "qid", "query-id")
QUERY_TEXT_NAMES: Final = ("text", "query", "contents", "body")


class Columns(NamedTuple):
    """The names of the columns of a passage; `title` is None where there is none."""

    doc_id: str
    title: str | None
    text: str


def first_of(wanted: Sequence[str], found: Iterable[str]) -> str | None:
    """The first of the wanted names that was found."""
    present = set(found)
    return next((name for name in wanted if name in present), None)


def passage_columns(found: Sequence[str], label: str) -> Columns:
    """The columns of a passage.

    Raises:
        CorpusError: no id or no text; it names the columns found and those wanted.
    """
    doc_id, text = first_of(ID_NAMES, found), first_of(TEXT_NAMES, found)
    missing = [
        f"no {what} column ({' or '.join(names)})"
        for what, names, column in (("text", TEXT_NAMES, text), ("id", ID_NAMES, doc_id))
        if column is None
    ]
    if doc_id is None or text is None:
        have = ", ".join(map(str, found)) or "none"
        raise CorpusError(f"{label} has {' and '.join(missing)}; its columns are {have}: rename what holds it")
    return Columns(doc_id, first_of(TITLE_NAMES, found), text)
