"""Where a source is cut, and what is refused."""

import gzip
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from readapt_ray.errors import CorpusError
from readapt_ray.sources import pieces
from readapt_ray.sources.lines import read_lines
from readapt_ray.sources.opening import open_source
from readapt_ray.sources.read_options import ReadOptions
from readapt_ray.sources.source import BadRow, Span
from readapt_ray.storage import Location


def _planned(path):
    return pieces.plan_pieces(open_source(str(path), "auto", ReadOptions()))


def _read(path):
    planned, _ = _planned(path)
    return [row for piece in planned for _, row in piece.rows("jsonl", ReadOptions(), [])]


def _write_rows(path, num_rows, text="some text"):
    path.parent.mkdir(exist_ok=True)
    lines = "".join(json.dumps({"_id": f"{path.name}{number}", "text": text}) + "\n" for number in range(num_rows))
    (path.write_bytes(gzip.compress(lines.encode())) if path.suffix == ".gz" else path.write_text(lines))


def test_lines_belong_to_the_piece_in_which_they_begin(tmp_path):
    file = tmp_path / "c.txt"
    file.write_bytes(b"one\n\ntwo\n" + b"x" * 50 + b"\nlast")
    whole = list(read_lines(Location(str(file)), "c", max_line_bytes=20))
    size = file.stat().st_size
    for cut in range(1, size):
        found, before = [], 0
        for start, end in ((0, cut), (cut, size)):
            span = Span(start, end)
            for each in read_lines(Location(str(file)), "c", max_line_bytes=20, span=span):
                if isinstance(each, BadRow):
                    found.append(each._replace(place=f"c:{before + int(each.place[2:])}"))
                else:
                    found.append(each._replace(number=before + each.number))
            before += span.num_lines
        assert found == whole, cut
        assert before == 5


def test_small_files_share_a_piece_and_large_ones_are_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "MIN_PIECE_BYTES", 1000)
    for number in range(100):
        _write_rows(tmp_path / f"{number:03d}.jsonl", 1)
    _write_rows(tmp_path / "large.jsonl", 200)
    planned, _ = _planned(tmp_path)
    assert [piece.number for piece in planned] == list(range(len(planned)))
    assert len(planned[0].ranges) > 10
    assert sum(each.label == "large.jsonl" for piece in planned for each in piece.ranges) > 5
    assert len(planned) < 20
    assert len(_read(tmp_path)) == 300


def test_a_compressed_file_is_read_whole_by_one_task_and_that_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(pieces, "MIN_PIECE_BYTES", 100)
    monkeypatch.setattr(pieces, "_MAX_PIECE_BYTES", 1000)
    _write_rows(tmp_path / "c.jsonl.gz", 5000)
    planned, _ = _planned(tmp_path / "c.jsonl.gz")
    assert [len(piece.ranges) for piece in planned] == [1]
    assert "one task reads each of them" in caplog.text
    assert len(_read(tmp_path / "c.jsonl.gz")) == 5000


def test_a_row_group_is_not_cut_and_that_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(pieces, "_MAX_PIECE_BYTES", 1000)
    monkeypatch.setattr(pieces, "MIN_PIECE_BYTES", 1000)
    table = pa.table({"id": [str(number) for number in range(999)], "text": ["text"] * 999})
    pq.write_table(table, tmp_path / "c.parquet", row_group_size=500)
    planned, _ = _planned(tmp_path)
    assert [(each.start, each.end) for piece in planned for each in piece.ranges] == [(0, 1), (1, 2)]
    assert "one row group" in caplog.text


def test_a_file_that_changes_after_it_was_listed_is_refused(tmp_path):
    _write_rows(tmp_path / "a.jsonl", 9)
    source = open_source(str(tmp_path), "auto", ReadOptions())
    source.check()
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("{}\n")
    planned, _ = pieces.plan_pieces(source)
    with pytest.raises(CorpusError, match=r"a\.jsonl changed while it was read"):
        list(planned[0].rows("jsonl", ReadOptions(), []))


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    _write_rows(tmp_path / "a.jsonl", 9)
    rows = _planned(tmp_path)[0][0].rows("jsonl", ReadOptions(), [])
    next(rows)
    _write_rows(tmp_path / "a.jsonl", 8)
    with pytest.raises(CorpusError, match=r"a\.jsonl changed while it was read"):
        list(rows)


def test_a_record_longer_than_a_piece_and_the_bound_is_a_bad_row(tmp_path):
    file = tmp_path / "c.jsonl"
    with file.open("wb") as stream:
        stream.write(b'{"_id": "a", "text": "x"}\n')
        stream.seek(200 << 20, 1)
        stream.write(b'\n{"_id": "b", "text": "x"}\n')
    found = _read(file)
    assert [row.doc_id if not isinstance(row, BadRow) else row.reason for row in found] == ["a", "long_text", "b"]


def test_random_bytes_named_gz_are_refused(tmp_path):
    (tmp_path / "c.jsonl.gz").write_bytes(random.Random(0).randbytes(5000))
    with pytest.raises(CorpusError, match=r"c\.jsonl\.gz cannot be read"):
        _read(tmp_path / "c.jsonl.gz")
