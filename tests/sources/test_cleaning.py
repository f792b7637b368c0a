import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from readapt_ray.records import Passage
from readapt_ray.sources.cleaning import checked, clean_id, clean_text
from readapt_ray.sources.source import MISSING, Row

in_any_time = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


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


@in_any_time
@given(st.text())
def test_cleaning_twice_changes_nothing(text):
    assert clean_text(clean_text(text)) == clean_text(text)


def test_printable_text_takes_a_shorter_way_to_the_same():
    printable = [chr(code) for code in range(0x110000) if chr(code).isprintable()]
    assert len(printable) > 100_000
    for start in range(0, len(printable), 8):
        text = " ".join(printable[start : start + 8]) + "e\u0301 "
        assert clean_text(text) == clean_text(f"\0{text}")  # with a control character it goes the longer way


def test_cleaning_is_linear_in_a_long_run_of_white_space():
    started_s = time.process_time()  # other work on the machine does not count
    assert clean_text(" " * 5_000_000 + "a" + " \t" * 2_000_000 + "b") == "a b"
    assert time.process_time() - started_s < 20


def _row(doc_id="a", title="", text="x"):
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
        (_row(doc_id=" \t"), "missing_id"),
        (_row(doc_id=1.5), "id_not_string"),
        (_row(doc_id=True), "id_not_string"),
        (_row(title={"a": 1}), "title_not_string"),
        (_row(text="half a pair \ud83d"), "not_utf8"),
    ],
)
def test_a_bad_row_has_its_reason(row, reason):
    found = checked(row, max_text_bytes=100)
    assert (found.place, found.reason) == ("f:1", reason)


def test_a_good_row_keeps_its_id_and_may_lack_a_title():
    assert checked(_row(doc_id=7, title=None), max_text_bytes=100) == Passage("7", "", "x")
    assert checked(_row(doc_id="d%207", title=" a\nb "), max_text_bytes=100) == Passage("d%207", "a b", "x")
    assert checked(_row(text="x" * 98, title="t"), max_text_bytes=100) == Passage("a", "t", "x" * 98)


def test_an_id_has_no_white_space():
    ids = [" doc 12\n", "a\u00a0b", "a\tb", "plain", "\u00e9"]
    assert [clean_id(each) for each in ids] == ["doc%2012", "a%C2%A0b", "a%09b", "plain", "\u00e9"]
    assert checked(_row(doc_id=" doc 12"), max_text_bytes=100) == Passage("doc%2012", "", "x")


@in_any_time
@given(st.text())
def test_any_id_is_one_field_of_a_trec_file(text):
    found = clean_id(text)
    assert found.split() == ([found] if text.strip() else [])
    assert clean_id(found) == found


def test_a_title_alone_is_a_passage():
    assert checked(_row(title="a title", text=" \n"), max_text_bytes=100) == Passage("a", "a title", "")
