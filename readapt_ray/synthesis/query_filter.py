"""Take the query from what a language model answered, or say why there is none.

In: an answer and the passage that it was asked about. Out: a query, or a reason from `REASONS`. Whether the query finds its
passage is another matter (`cluster/round_trip.py`).
"""

import re
import unicodedata
from collections import Counter
from typing import NamedTuple

MIN_WORDS, MAX_WORDS = 3, 64
_MIN_SHARE = 0.5
_PRESENT_SHARE = 0.05
_LABEL = re.compile(
    r"^\s*(?:[-*•]\s+|#{1,6}\s+|\(?\d{1,2}[.):]\s+|(?:search\s+)?(?:q|question|query|answer)\s*\d*(?:\s*:\s*|\s+-\s+|-\s+))",
    re.IGNORECASE,
)
"""A list mark or `Question 1:`; the hyphen of `question-answering` is none."""
_PREAMBLE = re.compile(
    r"(?:(?:sure|certainly|of course|okay|ok)\b[,.!]?\s*)?here(?:'s|’s| is| are)\b[^?:]*:\s*|"
    r"(?:sure|certainly|of course|okay|ok)[,.!]?(?::\s*|$)",
    re.IGNORECASE,
)
"""What a chatty model says before the query: `Sure! Here is a question:`."""
_MARKUP = (
    re.compile(r"(?<![\w*])\*\*(?=\S)(.+?)(?<=\S)\*\*(?![\w*])"),
    re.compile(r"(?<!\w)__(?=\S)([^_]*\s[^_]*)(?<=\S)__(?!\w)"),
    re.compile(r"`([^`]*)`"),
)
"""Bold and code; `**options` and `__init__` are words."""
_QUOTES = "\"'“”„«»‘’"
_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL | re.IGNORECASE)
"""What a model that reasons writes before its answer."""
_OF_PASSAGE = re.compile(
    r"\b(?:this|the|above|given|following|provided)\s+(?:\w+\s+)?(passage|text|paragraph|excerpt|document|article|abstract)\b",
    re.IGNORECASE,
)
_REFUSAL = re.compile(
    r"(?:as an? (?:ai|language model)|i cannot|i can't|i'm sorry|i am sorry|i am unable)\b", re.IGNORECASE
)
"""How a refusal begins."""
_WORD = re.compile(r"\w+")
_NO_SPACES = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u4e00-\u9fff]")
"""A character of a script without spaces between words: Thai, Lao, Burmese, Khmer, Japanese, Chinese."""

REASONS = {
    "empty": "empty answers",
    "refusal": "refusals",
    "short": f"under {MIN_WORDS} words",
    "long": f"over {MAX_WORDS} words",
    "copied": "copied from the passage",
    "script": "in another script than the passage",
    "of_passage": "about 'the passage' or 'the text'",
    "repeated": "the same query as for another passage",
    "not_found": "did not find their passage",
}
"""Why an answer gives no query, and how a count of such answers is called."""


class Taken(NamedTuple):
    """The query of an answer; empty with a reason if there is none."""

    query: str
    reason: str


def num_words(text: str) -> int:
    """Count the words of a text; scripts without spaces, such as Chinese or Thai, count two characters as a word."""
    return len(text.split()) + len(_NO_SPACES.findall(text)) // 2


def take_query(answer: str, passage: str) -> Taken:
    """Return the query that an answer holds.

    The first line that is not empty and announces no other is taken, without list marks, labels such as `Question:`, bold
    marks and quotes around it; what is between <think> and </think> is no part of the answer.

    Args:
        answer: what the language model wrote.
        passage: title and text that it was asked about.
    """
    lines = [line for line in map(_bare, _THOUGHT.sub("", answer).splitlines()) if line]
    while len(lines) > 1 and lines[0].endswith(":"):
        del lines[0]  # announces what follows
    if not lines:
        return Taken("", "empty")
    query = lines[0]
    length = num_words(query)
    if _REFUSAL.match(query):
        reason = "refusal"
    elif length < MIN_WORDS:
        reason = "short"
    elif length > MAX_WORDS:
        reason = "long"
    elif _plain(query) in _plain(passage):
        reason = "copied"
    elif not _shares_script(query, passage):
        reason = "script"
    elif _speaks_of_passage(query, passage):
        reason = "of_passage"
    else:
        return Taken(query, "")
    return Taken("", reason)


def _bare(line: str) -> str:
    """Return a line without what a model puts around a query."""
    text = line
    for each in _MARKUP:
        text = each.sub(r"\1", text)
    while match := _LABEL.match(text) or _PREAMBLE.match(text):
        text = text[match.end() :]
    return " ".join(_without_quotes(text.strip()).split())


def _without_quotes(text: str) -> str:
    """Return a text without the quotes around the whole of it; those of a word at one end stay."""
    inner = text.strip(_QUOTES)
    num_quotes = sum(text.count(each) for each in _QUOTES if each not in "'’")
    is_around = (
        text[:1] in _QUOTES and text[-1:] in _QUOTES and not any(each in inner for each in _QUOTES if each not in "'’")
    )
    is_half = num_quotes == 1 and inner != text
    return inner if is_around or is_half else text


def _speaks_of_passage(query: str, passage: str) -> bool:
    """Return whether a query says `this passage` or `the text`, and the passage itself does not speak of such a thing."""
    found = _OF_PASSAGE.search(query)
    return found is not None and f" {found[1].lower()} " not in _plain(passage)


def _plain(text: str) -> str:
    """Return the words of a text in lower case, without punctuation."""
    return " ".join(["", *_WORD.findall(text.lower()), ""])


def _shares_script(query: str, passage: str) -> bool:
    """Return whether at least half of the query's letters are of scripts that the passage has."""
    asked, there = _scripts(query), _scripts(passage)
    known = {script for script, count in there.items() if count >= _PRESENT_SHARE * there.total()}
    return not asked or sum(count for script, count in asked.items() if script in known) >= _MIN_SHARE * asked.total()


def _scripts(text: str) -> Counter[str]:
    """Count letters by script, the first word of their Unicode name: LATIN, CYRILLIC, CJK, HANGUL, ARABIC."""
    return Counter(unicodedata.name(letter, "OTHER").split()[0] for letter in text if letter.isalpha())
