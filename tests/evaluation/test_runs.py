import math

import pytest

from readapt_ray.errors import InputError
from readapt_ray.evaluation.runs import Run, load_run, read_run, write_run
from readapt_ray.records import ScoredDoc


def _scored(*rows):
    return [ScoredDoc(*row) for row in rows]


def test_a_run_comes_back_in_the_order_of_trec_eval(tmp_path):
    uri = str(tmp_path / "a.trec")
    write_run(
        uri,
        _scored(("q2", "b", 0.5), ("q1", "c", 0.1), ("q2", "a", 0.5), ("q2", "z", 2.0), ("q1", "d", 1e-30)),
        tag="my model",
    )
    assert (tmp_path / "a.trec").read_text().splitlines() == [
        "q2 Q0 z 1 2.0 my-model",
        "q2 Q0 b 2 0.5 my-model",
        "q2 Q0 a 3 0.5 my-model",
        "q1 Q0 c 1 0.1 my-model",
        "q1 Q0 d 2 1e-30 my-model",
    ]
    assert read_run(uri) == {
        "q2": _scored(("q2", "z", 2.0), ("q2", "b", 0.5), ("q2", "a", 0.5)),
        "q1": _scored(("q1", "c", 0.1), ("q1", "d", 1e-30)),
    }


def test_every_float_survives_the_file(tmp_path):
    scores = [math.pi, 1 / 3, -1e-300, 5e-324, 12345678.9, -0.1]
    uri = str(tmp_path / "a.trec")
    write_run(uri, (ScoredDoc("q", f"d{index}", score) for index, score in enumerate(scores)), tag="t")
    assert sorted(doc.score for doc in read_run(uri)["q"]) == sorted(scores)


@pytest.mark.parametrize(
    "content",
    [
        "q1 Q0 d1 1 2 t\nq1 Q0 d2 2 1 t\n",
        "q1\tQ0\td1\t1\t2\tt\r\nq1\tQ0\td2\t2\t1\tt\r\n",
        "\ufeffq1 Q0 d1 1 2 t\n\n  \nq1   Q0 d2 2 1e0 t",
        "q1 Q0 d2 1 1 t\nq1 Q0 d1 2 2 t\n",
    ],
    ids=["plain", "tabs and CRLF", "BOM, blank lines, no last newline", "wrong ranks"],
)
def test_what_others_write_is_read(tmp_path, content):
    (tmp_path / "a.trec").write_text(content, newline="")
    assert read_run(str(tmp_path / "a.trec")) == {"q1": _scored(("q1", "d1", 2.0), ("q1", "d2", 1.0))}


def test_ids_that_look_like_something_else_stay_as_they_are(tmp_path):
    uri = str(tmp_path / "a.trec")
    rows = _scored(("NA", '"d', 4.0), ("NA", "null", 3.0), ("NA", "007", 2.0), ("NA", "文書", 1.0))
    write_run(uri, rows, tag="t")
    assert read_run(uri) == {"NA": rows}


def test_queries_may_be_interleaved(tmp_path):
    (tmp_path / "a.trec").write_text("q1 Q0 a 1 1 t\nq2 Q0 b 1 5 t\nq1 Q0 c 2 3 t\n")
    run = load_run(str(tmp_path / "a.trec"))
    assert run.query_ids == ["q1", "q2"]
    assert [doc.doc_id for doc in run.top(0)] == ["c", "a"]
    assert run.top(0, 1) == [ScoredDoc("q1", "c", 3.0)]
    assert len(run) == 3
    assert run.depth == 2


def test_a_tie_in_the_wrong_order_is_put_right(tmp_path):
    (tmp_path / "a.trec").write_text("q1 Q0 a 1 1 t\nq1 Q0 b 2 1 t\n")
    assert [doc.doc_id for doc in read_run(str(tmp_path / "a.trec"))["q1"]] == ["b", "a"]


def test_scores_that_are_one_as_float32_are_tied(tmp_path):
    (tmp_path / "a.trec").write_text(
        "q1 Q0 a 1 1.0000000001 t\nq1 Q0 b 2 1 t\nq1 Q0 y 3 -1e200 t\nq1 Q0 z 4 -1e300 t\n"
    )
    found = read_run(str(tmp_path / "a.trec"))["q1"]
    assert found == _scored(("q1", "b", 1.0), ("q1", "a", 1.0000000001), ("q1", "z", -1e300), ("q1", "y", -1e200))


def test_an_empty_file_is_an_empty_run(tmp_path):
    (tmp_path / "a.trec").write_bytes(b"")
    assert read_run(str(tmp_path / "a.trec")) == {}
    assert load_run(str(tmp_path / "a.trec")).depth == 0
    write_run(str(tmp_path / "b.trec"), [], tag="t")
    assert (tmp_path / "b.trec").read_bytes() == b""


GOOD = "q1 Q0 d0 1 9 t\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"q1 Q0 d1 2 nan t", r"a\.trec, line 2: the score of 'd1' for query 'q1' is nan"),
        (b"q1 Q0 d1 2 inf t", r"line 2: .* is inf, not a finite number"),
        (b"q1 Q0 d1 2 high t", r"line 2: the score 'high' is not a number"),
        (b"q1 Q0 d0 2 1 t", r"line 2: passage 'd0' occurs twice for query 'q1' \(first on line 1\)"),
        (b"q1 Q0 d1 2 1", r"line 2: 5 fields; a TREC run has six: query_id Q0 doc_id rank score tag"),
        (b"q1 Q0 d 1 2 1 t", r"line 2: 7 fields"),
        (b"q1 Q0 d\xff 2 1 t", r"line 2: not UTF-8"),
        (b"\x00\x01PAR1", r"line 2: 1 field"),
        (b"q1 Q0 " + b"d" * 10_000_000, r"line 2: 3 fields.{0,200}$"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    (tmp_path / "a.trec").write_bytes(GOOD.encode() + line + b"\n")
    with pytest.raises(InputError, match=message) as raised:
        load_run(str(tmp_path / "a.trec"))
    assert len(str(raised.value)) < 500


def test_no_file_and_a_folder_are_told_apart(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_run(str(tmp_path / "none.trec"))
    with pytest.raises(InputError, match="is a folder"):
        load_run(str(tmp_path))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("q", "d", math.nan), "not a finite number"),
        (("q", "d 1", 1.0), "whitespace"),
        (("", "d", 1.0), "empty"),
        (("q", "d\n", 1.0), "whitespace"),
        (("q", "first", 1.0), "occurs twice"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_and_leaves_no_file(tmp_path, row, message):
    with pytest.raises(InputError, match=message):
        write_run(str(tmp_path / "a.trec"), _scored(("q", "first", 1.0), row), tag="t")
    assert list(tmp_path.iterdir()) == []


def test_a_run_from_records_equals_the_one_from_a_file(tmp_path):
    rows = _scored(("q1", "a", 1.0), ("q1", "b", 2.0), ("q2", "a", 0.0))
    write_run(str(tmp_path / "a.trec"), rows, tag="t")
    of_file, of_records = load_run(str(tmp_path / "a.trec")), Run.of({"q1": rows[:2], "q2": rows[2:]})
    for index in range(2):
        assert of_file.top(index) == of_records.top(index)
    with pytest.raises(InputError, match="mine: passage 'a' occurs twice"):
        Run.of({"q1": [rows[0], rows[0]]}, name="mine")
