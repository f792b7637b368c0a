"""Ingest in many tasks gives what one process gives: rows, bad rows, duplicates and counts."""

import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from readapt_ray.cluster import parallel_ingest
from readapt_ray.errors import CorpusError
from readapt_ray.sources import pieces
from readapt_ray.sources.lines import read_lines
from readapt_ray.sources.opening import open_source
from readapt_ray.sources.source import BadRow, Limits, Span
from readapt_ray.stages.ingest import IngestConfig, ingest
from readapt_ray.storage import Location


def _ingested(source, output, **options):
    config = {"source": str(source), "output": str(output), "max_text_bytes": 400, "rows_per_file": 7}
    manifest = ingest(IngestConfig.parse(config | options)).manifest
    rows = [row for file in sorted((output / "passages").glob("part-*")) for row in pq.read_table(file).to_pylist()]
    return manifest.counts, manifest.details, rows


@pytest.fixture
def many_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "MIN_PIECE_BYTES", 700)
    monkeypatch.setattr(parallel_ingest, "_PARTITION_BYTES", 3000)


def _rows(num_rows=400):
    draw = random.Random(0)
    for number in range(num_rows):
        kind = draw.randrange(12)
        row = {"_id": f"d{number}", "title": f"t{number % 3}", "text": f"text é {number} " * draw.randrange(1, 6)}
        if kind == 0:
            row["text"] = f"again {draw.randrange(9)}"
            row["title"] = ""
        elif kind == 1:
            row["_id"] = f"d{draw.randrange(number + 1)}"
        elif kind == 2:
            row["text"] = [None, "", "x" * 500, 7][draw.randrange(4)]
        yield row


def _write(folder, kind):
    folder.mkdir()
    for name, chosen in (("a", slice(0, 300)), ("b", slice(300, None))):
        rows = list(_rows())[chosen]
        if kind == "jsonl":
            lines = [json.dumps(row).encode() for row in rows]
            lines[5:5] = [b"", b"{not json", b'"\xff"', b"[1]"]
            (folder / f"{name}.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
        elif kind == "tsv":
            lines = [f"{row['_id']}\t{row['title']}\t{row['text']}" for row in rows]
            lines[9] = "one field"
            (folder / f"{name}.tsv").write_text("\r\n".join(["id\ttitle\ttext", *lines, "", ""]))
        else:
            table = pa.Table.from_pylist([row | {"text": str(row["text"])} for row in rows])
            pq.write_table(table, folder / f"{name}.parquet", row_group_size=11)
    return folder


@pytest.mark.parametrize("deduplicate", ["exact", "none"])
@pytest.mark.parametrize("kind", ["jsonl", "tsv", "parquet"])
def test_many_tasks_give_what_one_gives(tmp_path, ray_session, request, kind, deduplicate):
    source = _write(tmp_path / "source", kind)
    one = _ingested(source, tmp_path / "one", deduplicate=deduplicate)
    request.getfixturevalue("many_pieces")
    planned, _ = pieces.plan_pieces(open_source(str(source), "auto", Limits()))
    assert len(planned) > 10
    many = _ingested(source, tmp_path / "many", deduplicate=deduplicate)
    assert many == one
    assert one[1]["bad_rows"]["by_reason"]["duplicate_id"] > 5
    assert (one[1]["duplicates"]["dropped"] > 5) == (deduplicate == "exact")
    assert not (tmp_path / "many" / "exchange").exists()
    assert len(list((tmp_path / "many" / "passages").iterdir())) > 10


def test_policy_fail_names_the_same_row(tmp_path, ray_session, request):
    source = _write(tmp_path / "source", "jsonl")
    told = []
    for name in ("one", "many"):
        with pytest.raises(CorpusError) as raised:
            _ingested(source, tmp_path / name, bad_rows="fail")
        told.append(str(raised.value))
        request.getfixturevalue("many_pieces")
    assert told[0] == told[1]


@pytest.mark.parametrize("round_", ["repeated_ids", "repeated_contents", "take_out_repeats"])
def test_stopped_in_any_round_it_goes_on(tmp_path, ray_session, many_pieces, monkeypatch, round_):
    source = _write(tmp_path / "source", "tsv")
    whole = _ingested(source, tmp_path / "whole")
    calls = []

    def failing(*args, **options):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **options)

    real = getattr(parallel_ingest.piece_files, round_)
    with monkeypatch.context() as patched:
        patched.setattr(parallel_ingest.ParallelIngest, "_tasks", _in_this_process)
        patched.setattr(parallel_ingest.piece_files, round_, failing)
        with pytest.raises(KeyboardInterrupt):
            _ingested(source, tmp_path / "out")
    assert _ingested(source, tmp_path / "out") == whole


def _in_this_process(self, function, items):
    for item in items:
        yield function(*item, job=self._job)


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


def test_a_file_that_changes_after_planning_is_refused(tmp_path, many_pieces):
    source = _write(tmp_path / "source", "jsonl")
    planned, _ = pieces.plan_pieces(open_source(str(source), "auto", Limits()))
    with (source / "a.jsonl").open("a") as file:
        file.write("{}\n")
    with pytest.raises(CorpusError, match=r"a\.jsonl changed while it was read"):
        list(planned[0].rows("jsonl", Limits(), Span(planned[0].start, planned[0].end)))


def test_a_large_compressed_file_is_one_piece_and_said(tmp_path, many_pieces, caplog):
    import gzip

    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(random.Random(0).randbytes(5000)))
    with caplog.at_level("WARNING"):
        planned, _ = pieces.plan_pieces(open_source(str(tmp_path / "c.jsonl.gz"), "jsonl", Limits()))
    assert len(planned) == 1
    assert "one task reads all" in caplog.text
