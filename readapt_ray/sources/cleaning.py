"""Clean a raw row into a passage, or find the reason why it is bad.

One core cleans about 150,000 passages of 80 words per second.
"""

import re
import unicodedata
import urllib.parse
import uuid
from collections.abc import Iterator

from readapt_ray.records import Passage
from readapt_ray.sources.columns import is_absent, number_text
from readapt_ray.sources.source import MISSING, BadRow, Row

_CONTROL = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ufeff]")
_SPACES = re.compile(r"\s{2,}|[^\S ]")
_NEWLINE = re.compile("[\n\r\x0b\x0c\x85\u2028\u2029]")
_WHITE_SPACE = re.compile(r"\s")
_SHOWN_CHARS = 60
_SURROGATE = re.compile("[\ud800-\udfff]")


def clean_text(text: str) -> str:
    """Normalise a text: Unicode NFC, no control characters, no white space at the ends.

    A run of white space (tabs count) becomes one newline if it contains a line break, else one space.
    """
    if text.isprintable() and "  " not in text:  # no control characters, and only single spaces
        return unicodedata.normalize("NFC", text).strip()
    text = unicodedata.normalize("NFC", _CONTROL.sub("", text))
    return _SPACES.sub(lambda run: "\n" if _NEWLINE.search(run[0]) else " ", text).strip()


def clean_id(value: str) -> str:
    """Return an id without white space, which TREC formats do not allow: removed at the ends, encoded inside (%20)."""
    return encoded_white_space(value.strip())


def encoded_white_space(text: str) -> str:
    """Encode white space in a text as in a URL: a space becomes %20. All other characters stay as they are."""
    if text.isprintable() and " " not in text:
        return text
    return _WHITE_SPACE.sub(lambda found: urllib.parse.quote(found[0]), text)


def checked(row: Row, *, max_text_bytes: int) -> Passage | BadRow:
    """Convert a row to a clean passage, without its kept columns; a bad row with the reason if that is not possible.

    Ids are cleaned by `clean_id`. A whole number as id and a number as title become text; a number as text is refused.
    NaN and null count as missing. A title without text is enough, and so is a text without title.

    Args:
        row: the raw row.
        max_text_bytes: the row is bad if title and text together have this many UTF-8 bytes or more.
    """
    title, doc_id = title_text(row.title), id_text(row.doc_id)
    text = "" if title and not isinstance(row.text, str) and is_absent(row.text) else row.text
    value = ""
    if not isinstance(text, str):
        reason, value = text_fault(text), "" if is_absent(text) else shown(text)
    elif not doc_id:
        reason, value = ("missing_id", "") if doc_id == "" else ("id_not_string", shown(row.doc_id))
    elif title is None:
        reason, value = "title_not_string", shown(row.title)
    elif not (is_unicode(text) and is_unicode(title) and is_unicode(doc_id)):
        reason = "not_utf8"
    elif num_bytes(title) + num_bytes(text) >= max_text_bytes:
        reason = "long_text"
    else:
        passage = Passage(doc_id, clean_text(title).replace("\n", " "), clean_text(text))
        if passage.text or passage.title:
            return passage
        reason = "empty_text"
    return BadRow(row.place, reason, value)


def id_text(value: object) -> str | None:
    """Return a clean id from text, a UUID or a whole number (also as float): "7" for 7.0.

    "" if the value is missing, null or blank; None if it cannot be an id, such as 7.5.
    """
    if isinstance(value, str):
        return clean_id(value)
    if is_absent(value):
        return ""
    digits = str(value) if isinstance(value, uuid.UUID) else number_text(value)
    return None if digits is None or "." in digits or "E" in digits.upper() else digits


def title_text(value: object) -> str | None:
    """Return a title from text (unchanged) or a number. "" if missing, null or NaN; None if it cannot be a title."""
    return value if isinstance(value, str) else "" if is_absent(value) else number_text(value)


def kinds_of(row: Row, passage: Passage) -> Iterator[str]:
    """Yield the kinds to count a passage under in the manifest.

    Always one of "title_and_text", "title_only" and "text_only"; also "number_as_title" and "float_as_id" if they
    apply.
    """
    yield "title_and_text" if passage.title and passage.text else "title_only" if passage.title else "text_only"
    if not isinstance(row.title, str) and passage.title:
        yield "number_as_title"
    if isinstance(row.doc_id, float):
        yield "float_as_id"


def shown(value: object) -> str:
    """Return a value as Python writes it (`repr`) for a message, cut to 60 characters."""
    return repr(value)[:_SHOWN_CHARS]


def num_bytes(text: str) -> int:
    """Return the length of a text in UTF-8 bytes."""
    return len(text) if text.isascii() else len(text.encode("utf-8"))


def text_fault(text: object) -> str:
    """Return why a value that is not a string cannot be a text: "missing_text", "null_text" or "text_not_string"."""
    return "missing_text" if text is MISSING else "null_text" if is_absent(text) else "text_not_string"


def is_unicode(text: str) -> bool:
    """Return whether a string can be written as UTF-8. A lone surrogate, which JSON may contain, cannot."""
    return text.isascii() or not _SURROGATE.search(text)
