"""Extract the query from a language model's answer, or say why there is none.

In: an answer, and the passage that it was asked about. Out: a query, or a reason from `REASONS`. Whether the query
finds its passage is tested in `cluster/round_trip.py`.
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
"""Matches a list mark or a label such as `Question 1:`, but not the word `question-answering`."""
_PREAMBLE = re.compile(
    r"(?:(?:sure|certainly|of course|okay|ok)\b[,.!]?\s*)?here(?:'s|’s| is| are)\b[^?:]*:\s*|"
    r"(?:sure|certainly|of course|okay|ok)[,.!]?(?::\s*|$)",
    re.IGNORECASE,
)
"""Matches what a model may say before the query, such as `Sure! Here is a question:`."""
_MARKUP = (
    re.compile(r"(?<![\w*])\*\*(?=\S)(.+?)(?<=\S)\*\*(?![\w*])"),
    re.compile(r"(?<!\w)__(?=\S)([^_]*\s[^_]*)(?<=\S)__(?!\w)"),
    re.compile(r"`([^`]*)`"),
)
"""Match bold and code marks, but not words such as `**options` and `__init__`."""
_QUOTES = "\"'“”„«»‘’"
_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL | re.IGNORECASE)
"""Matches what a reasoning model writes before its answer."""
_OF_PASSAGE = re.compile(
    r"\b(?:this|the|above|given|following|provided)\s+(?:\w+\s+)?(passage|text|paragraph|excerpt|document|article|abstract)\b",
    re.IGNORECASE,
)
_REFUSAL = re.compile(
    r"(?:as an? (?:ai|language model)|i cannot|i can't|i'm sorry|i am sorry|i am unable)\b", re.IGNORECASE
)
"""Matches the beginning of a refusal."""
_WORD = re.compile(r"\w+")
_NO_SPACES = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u4e00-\u9fff]")
"""Matches a character of a script without spaces between words: Thai, Lao, Burmese, Khmer, Japanese, Chinese."""

REASONS = {
    "empty": "empty answers",
    "refusal": "refusals",
    "short": f"under {MIN_WORDS} words",
    "long": f"over {MAX_WORDS} words",
    "copied": "copied from the passage",
    "script": "in another script than the passage",
    "of_passage": "about 'the passage' or 'the text'",
    "repeated": "the same as another query",
    "not_found": "did not find their passage",
}
"""Reasons why an answer gives no query, each with the words that are shown with the count of such answers."""


class Taken(NamedTuple):
    """The query of an answer with an empty reason; or an empty query with a reason."""

    query: str
    reason: str
    """Key of `REASONS` that says why there is no query; empty if there is one."""


def num_words(text: str) -> int:
    """Estimate the number of words of a text: its parts between spaces, plus one per two characters without spaces.

    The latter are characters of scripts that write no spaces between words, such as Chinese or Thai.
    """
    return len(text.split()) + len(_NO_SPACES.findall(text)) // 2


def take_query(answer: str, passage: str) -> Taken:
    """Extract the query from an answer, or return the reason why it is not usable.

    The query is the first line that is not empty, after lines that announce another one by a colon at their end. List
    marks, labels such as `Question:`, phrases such as `Sure! Here is a question:`, bold and code marks, and quotes
    around it are removed. Text between <think> and </think> is ignored, and all text after a <think> without end. An
    answer with several queries gives the first alone.

    All reasons but `repeated` and `not_found` can be returned: these need other answers, or an index.

    Args:
        answer: text that the language model wrote.
        passage: title and text of the passage that it was asked about.
    """
    lines = [line for line in map(_bare, _THOUGHT.sub("", answer).splitlines()) if line]
    while len(lines) > 1 and lines[0].endswith(":"):
        del lines[0]  # it announces the next line
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
    """Return a line without the marks, labels and quotes that a model puts around a query."""
    text = line
    for each in _MARKUP:
        text = each.sub(r"\1", text)
    while match := _LABEL.match(text) or _PREAMBLE.match(text):
        text = text[match.end() :]
    return " ".join(_without_quotes(text.strip()).split())


def _without_quotes(text: str) -> str:
    """Remove quotes around a whole text; quotes around a word at one of its ends stay."""
    inner = text.strip(_QUOTES)
    num_quotes = sum(text.count(each) for each in _QUOTES if each not in "'’")
    is_around = (
        text[:1] in _QUOTES and text[-1:] in _QUOTES and not any(each in inner for each in _QUOTES if each not in "'’")
    )
    is_half = num_quotes == 1 and inner != text
    return inner if is_around or is_half else text


def _speaks_of_passage(query: str, passage: str) -> bool:
    """Return whether a query says `this passage`, `the text` or the like, and the passage does not have that noun."""
    found = _OF_PASSAGE.search(query)
    return found is not None and f" {found[1].lower()} " not in _plain(passage)


def _plain(text: str) -> str:
    """Return the words of a text in lower case, without punctuation."""
    return " ".join(["", *_WORD.findall(text.lower()), ""])


def _shares_script(query: str, passage: str) -> bool:
    """Return whether at least half of the query's letters belong to scripts that the passage uses."""
    asked, there = _scripts(query), _scripts(passage)
    known = {script for script, count in there.items() if count >= _PRESENT_SHARE * there.total()}
    return not asked or sum(count for script, count in asked.items() if script in known) >= _MIN_SHARE * asked.total()


def _scripts(text: str) -> Counter[str]:
    """Count letters by script, which is the first word of their Unicode name, such as LATIN, CYRILLIC or CJK."""
    return Counter(unicodedata.name(letter, "OTHER").split()[0] for letter in text if letter.isalpha())
