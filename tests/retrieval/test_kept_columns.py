"""Columns of a corpus beside its texts, and which passages they let through."""

import datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from readapt_ray.errors import InputError
from readapt_ray.retrieval.kept_columns import Condition, KeptColumns, kept_columns
from readapt_ray.storage import Location

ROWS = {
    "doc_id": ["a", "b", "c", "d"],
    "title": ["", "", "", ""],
    "text": ["w", "x", "y", "z"],
    "lang": ["en", "de", None, "en"],
    "year": pa.array([2019, 2020, 2021, None], pa.int32()),
    "price": [1.5, 2.0, float("nan"), 4.0],
    "public": [True, False, True, None],
    "day": pa.array([datetime.date(2024, 1, day) for day in (1, 2, 3, 4)], pa.date32()),
    "tags": [["x", "y"], [], None, ["y"]],
    "blob": [b"1", b"2", b"3", b"4"],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("columns")
    table = pa.table(ROWS)
    pq.write_table(table.slice(0, 3), folder / "0.parquet")
    pq.write_table(table.slice(3), folder / "1.parquet")
    return [Location(str(folder / f"{number}.parquet")) for number in range(2)]


def test_columns_that_can_be_compared_are_there(files):
    assert list(kept_columns(files)) == ["lang", "year", "price", "public", "day", "tags"]


@pytest.mark.parametrize(
    ("condition", "passing"),
    [
        (Condition("lang", ("en",)), "ad"),
        (Condition("lang", ("de", "fr")), "b"),
        (Condition("lang", bounds=(("gte", "e"),)), "ad"),
        (Condition("year", (2020, 2021)), "bc"),
        (Condition("year", bounds=(("gt", 2019), ("lte", 2020))), "b"),
        (Condition("price", bounds=(("gte", 2),)), "bd"),
        (Condition("public", (True,)), "ac"),
        (Condition("day", bounds=(("gte", "2024-01-03"),)), "cd"),
        (Condition("tags", ("y",)), "ad"),
        (Condition("tags", ("x", "z")), "a"),
    ],
)
def test_which_passages_pass_in_whatever_order(files, monkeypatch, condition, passing):
    monkeypatch.setattr("readapt_ray.retrieval.kept_columns._ROWS_AT_ONCE", 1)
    doc_ids = ["d", "", "b", "nowhere", "a", "c"]
    columns = KeptColumns.read(files, doc_ids)
    found = [doc_id for doc_id, passes in zip(doc_ids, columns.passing((condition,)), strict=True) if passes]
    assert sorted(found) == list(passing)
    np.testing.assert_array_equal(columns.part(2, 3).passing((condition,)), columns.passing((condition,))[2:5])


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (
            Condition("colour", ("red",)),
            "no column 'colour' to filter by; the columns of this corpus are: 'lang', 'year'",
        ),
        (Condition("text", ("w",)), "no column 'text'"),
        (Condition("blob", ("1",)), "no column 'blob'"),
        (Condition("lang", (3,)), "'lang' holds string, and '3' is no such value"),
        (Condition("year", ("2020",)), "'year' holds int32"),
        (Condition("year", (2020.5,)), "'year' holds int32"),
        (Condition("year", (1 << 80,)), "'year' holds int32"),
        (Condition("year", (True,)), "'year' holds int32"),
        (Condition("public", (1,)), "'public' holds bool"),
        (Condition("day", bounds=(("lt", "soon"),)), "'day' holds date32"),
        (Condition("lang", ("\ud800",)), "'lang' holds string"),
        (Condition("tags", ("\ud800",)), "'tags' holds string"),
        (Condition("day", bounds=(("lt", "\ud800"),)), "'day' holds date32"),
    ],
)
def test_what_does_not_fit_the_corpus_is_refused(files, condition, message):
    with pytest.raises(InputError, match=message):
        KeptColumns.read(files, ["a"]).passing((condition,))


@pytest.mark.parametrize(
    ("condition", "passing"),
    [
        (Condition("half", one_of=(0.1, 2)), [True, True, False]),
        (Condition("half", bounds=(("gt", 0.1), ("lt", 3))), [False, True, False]),
        (Condition("halves", bounds=(("gte", 2),)), [False, True, False]),
        (Condition("seen", bounds=(("gte", "2024-01-02"),)), [False, True, False]),
        (Condition("seen", bounds=(("lt", "2024-01-02T00:00:00Z"),)), [True, False, False]),
        (Condition("seen", one_of=("2024-01-02T01:00:00+01:00",)), [False, True, False]),
    ],
)
def test_half_numbers_and_times_with_a_zone(condition, passing):
    days = [datetime.datetime(2024, 1, day, tzinfo=datetime.UTC) for day in (1, 2)]
    columns = KeptColumns(
        pa.table(
            {
                "half": pa.array([np.float16(0.1), np.float16(2), None], pa.float16()),
                "halves": pa.array([[np.float16(1)], [np.float16(1), np.float16(2)], None], pa.list_(pa.float16())),
                "seen": pa.array([*days, None], pa.timestamp("us", "Europe/Berlin")),
            }
        )
    )
    assert columns.passing((condition,)).tolist() == passing


def test_what_was_found_for_one_is_not_given_for_true():
    columns = KeptColumns(pa.table({"year": [1, 2]}))
    assert columns.passing((Condition("year", one_of=(1,)),)).tolist() == [True, False]
    assert columns.passing((Condition("year", bounds=(("gte", 2),)),)).tolist() == [False, True]
    for condition in (Condition("year", one_of=(True,)), Condition("year", bounds=(("gte", True),))):
        with pytest.raises(InputError, match="'True' is no such value"):
            columns.passing((condition,))
