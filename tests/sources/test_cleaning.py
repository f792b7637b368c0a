import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from readapt_ray.records import Passage
from readapt_ray.sources.cleaning import checked, clean_text
from readapt_ray.sources.source import MISSING, BadRow, Row


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  a \t b  ", "a b"),
        ("a \r\n \n\n b\rc", "a\nb\nc"),
        ("a\u2028b\x85c\x0bd", "a\nb\nc\nd"),
        ("e\u0301", "\u00e9"),
        ("a\x00b\x07c\ufeff", "abc"),
        ("a\u00a0b", "a b"),
        ("\u0645\u06cc\u200c\u062e", "\u0645\u06cc\u200c\u062e"),
        ("\x1f\n", ""),
    ],
)
def test_clean_text(raw, clean):
    assert clean_text(raw) == clean


@given(st.text())
def test_cleaning_twice_changes_nothing(text):
    assert clean_text(clean_text(text)) == clean_text(text)


def test_cleaning_is_linear_in_a_long_run_of_white_space():
    started = time.monotonic()
    assert clean_text(" " * 5_000_000 + "a" + " \t" * 2_000_000 + "b") == "a b"
    assert time.monotonic() - started < 10


def _row(doc_id="a", title="t", text="x"):
    return Row("f:1", doc_id, title, text)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (_row(text=MISSING), "missing_text"),
        (_row(text=None), "null_text"),
        (_row(text=5), "text_not_string"),
        (_row(text=["a"]), "text_not_string"),
        (_row(text=" \n\x00"), "empty_text"),
        (_row(text="x" * 100), "long_text"),
        (_row(text="\u00e9" * 50), "long_text"),
        (_row(title="x" * 100), "long_text"),
        (_row(doc_id=MISSING), "missing_id"),
        (_row(doc_id=None), "missing_id"),
        (_row(doc_id=""), "missing_id"),
        (_row(doc_id=1.5), "id_not_string"),
        (_row(doc_id=True), "id_not_string"),
        (_row(title={"a": 1}), "title_not_string"),
        (_row(text="half a pair \ud83d"), "not_utf8"),
    ],
)
def test_a_bad_row_has_its_reason(row, reason):
    assert checked(row, max_text_bytes=100) == BadRow("f:1", reason)


def test_a_good_row_keeps_its_id_and_may_lack_a_title():
    assert checked(_row(doc_id=7, title=None), max_text_bytes=100) == Passage("7", "", "x")
    assert checked(_row(doc_id=" 7 ", title=" a\nb "), max_text_bytes=100) == Passage(" 7 ", "a b", "x")
    assert checked(_row(text="x" * 98), max_text_bytes=100) == Passage("a", "t", "x" * 98)
