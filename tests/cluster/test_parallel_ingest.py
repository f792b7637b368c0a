"""Ingest in many tasks gives what one process gives: rows, bad rows, duplicates and counts."""

import csv
import functools
import gzip
import json
import os
import random
import signal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from readapt_ray.cluster import connection, parallel_ingest
from readapt_ray.errors import CorpusError, StorageError
from readapt_ray.sources import piece_files, pieces
from readapt_ray.stages.ingest import IngestConfig, ingest
from readapt_ray.storage import Location
from tests import small_disk

KINDS = ("jsonl", "tsv", "parquet", "gz", "csv", "json", "arrow", "quoted.tsv", "utf16.tsv")
KEPT = ("year:int64", "url")
NEVER = 1 << 60


def _ingested(source, output, *, min_bytes, **options):
    """Counts, details and rows of an ingest that starts tasks where the source has at least so many bytes."""
    config = {"source": str(source), "output": str(output), "max_text_bytes": 400, "rows_per_file": 7}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("readapt_ray.stages.ingest.MIN_PARALLEL_BYTES", min_bytes)
        manifest = ingest(IngestConfig.parse(config | options)).manifest
    rows = [row for file in sorted((output / "passages").glob("part-*")) for row in pq.read_table(file).to_pylist()]
    assert manifest.details.pop("num_pieces", 1) >= 1
    return manifest.counts, manifest.details, rows


_one = functools.partial(_ingested, min_bytes=NEVER)
_many = functools.partial(_ingested, min_bytes=0)


@pytest.fixture
def many_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "MIN_PIECE_BYTES", 2000)
    monkeypatch.setattr(parallel_ingest, "_PARTITION_BYTES", 8000)


@pytest.fixture
def no_ray(monkeypatch):
    """Tasks run in this process and end in any order."""

    def tasks(self, function, items):
        items = list(items)
        random.Random(len(items)).shuffle(items)
        for item in items:
            yield function(*item, job=self._job)

    monkeypatch.setattr(parallel_ingest.ParallelIngest, "_tasks", tasks)
    monkeypatch.setattr(parallel_ingest.ParallelIngest, "_place", lambda self: None)


def _rows(num_rows=400, draw=None):
    draw = draw or random.Random(0)
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
        elif kind == 3:
            row |= {"title": f"alone {number}", "text": ""}
        yield row | {"year": ["2020", "x", ""][min(2, draw.randrange(9))], "url": f"u{number % 5}"}


def _write_file(path, kind, rows, draw):
    """Write rows with what files have: a BOM, either line end, blank and bad lines, no line end after the last."""
    if kind in ("parquet", "arrow"):
        table = pa.Table.from_pylist([row | {"text": str(row["text"])} for row in rows])
        if kind == "parquet":
            pq.write_table(table, path, row_group_size=draw.randrange(1, 12))
        else:
            with pa.ipc.new_stream(str(path), table.schema) as writer:
                writer.write_table(table, max_chunksize=draw.randrange(1, 12))
        return
    if kind == "json":
        path.write_text(json.dumps([*rows, 7, {}], indent=draw.choice([None, 1])))
        return
    if kind in ("csv", "quoted.tsv"):
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter="," if kind == "csv" else "\t", quoting=draw.choice([0, 1]))
            writer.writerow(rows[0])
            quoted = (row | ({"text": f'a "b"\n{row["text"]}, c'} if row["text"] else {}) for row in rows)
            writer.writerows(row.values() for row in quoted)
            writer.writerow(["one field"])
            file.write('"open\n')
        return
    if kind in ("tsv", "utf16.tsv"):
        lines = ["\t".join(map(str, row.values())).encode() for row in rows]
        lines.insert(draw.randrange(len(lines) + 1), b"one field")
        lines.insert(draw.randrange(len(lines) + 1), b'q1\t"ti ""t"""\t"quoted text"\t2020\tu1')
        lines.insert(draw.randrange(len(lines) + 1), b'q2\t"\t"open quote\t2020\tu1')
        lines.insert(0, b"\t".join(name.encode() for name in rows[0]))
        first = 1
    else:
        lines = [json.dumps(row, ensure_ascii=draw.random() < 0.5).encode() for row in rows]
        lines[3:3] = [b"{not json", b"[1]"]
        first = 0
    lines.insert(draw.randrange(first, len(lines) + 1), b'"\xff"')
    lines.insert(draw.randrange(first, len(lines) + 1), b"x" * draw.randrange(3000, 5000))
    blank = [b"", b" "] * draw.randrange(3)
    lines[draw.randrange(first, len(lines)) : 0] = blank
    end = draw.choice([b"\n", b"\r\n"])
    content = draw.choice([b"", b"\xef\xbb\xbf"]) + end * draw.randrange(90) + end.join(lines) + draw.choice([b"", end])
    if kind == "utf16.tsv":
        content = content.replace(b'"\xff"', b"").decode("utf-8-sig").encode("utf-16")
    path.write_bytes(gzip.compress(content) if kind == "gz" else content)


def _write(folder, kind, draw=None, sizes=(300, 100)):
    """Write rows into files of these sizes, of which two have the same name."""
    draw = draw or random.Random(0)
    rows = list(_rows(sum(sizes), draw))
    suffix = {"gz": "jsonl.gz", "quoted.tsv": "tsv", "utf16.tsv": "tsv"}.get(kind, kind)
    for number, size in enumerate(sizes):
        path = folder / ("x" if number == 1 else ".") / f"{max(number - 1, 0)}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_file(path, kind, rows[:size], draw)
        rows = rows[size:]
    return folder


@pytest.mark.parametrize("seed", range(36))
def test_any_cut_gives_what_one_process_gives(tmp_path, no_ray, monkeypatch, seed):
    draw = random.Random(seed)
    kind = KINDS[seed % len(KINDS)]
    sizes = [draw.randrange(5, 120) for _ in range(draw.randrange(1, 5))]
    source = _write(tmp_path / "source", kind, draw, sizes)
    if kind in ("jsonl", "tsv"):
        (source / f"05.{kind}").write_bytes(b"")
    monkeypatch.setattr(pieces, "MIN_PIECE_BYTES", draw.choice([150, 700, 3000, 100_000]))
    monkeypatch.setattr(parallel_ingest, "_PARTITION_BYTES", draw.choice([300, 3000, 100_000]))
    monkeypatch.setattr(piece_files, "_CHUNK_ROWS", draw.choice([1, 3, 1000]))
    options = {"deduplicate": draw.choice(["exact", "none"]), "rows_per_file": draw.choice([3, 1000]), "keep": KEPT}
    one = _one(source, tmp_path / "one", **options)
    assert _many(source, tmp_path / "many", **options) == one
    assert [file.name for file in (tmp_path / "many").iterdir() if file.is_dir()] == ["passages"]


@pytest.mark.parametrize("kind", ["jsonl", "tsv", "parquet", "gz", "csv"])
def test_many_tasks_give_what_one_gives(tmp_path, ray_session, many_pieces, kind):
    source = _write(tmp_path / "source", kind)
    one = _one(source, tmp_path / "one", keep=KEPT)
    assert _many(source, tmp_path / "many", keep=KEPT) == one
    assert one[1]["kinds"]["title_only"] > 5
    assert one[1]["unfit_values"]["year"]["count"] > 5
    assert {row["url"] for row in one[2]} == {f"u{number}" for number in range(5)}
    assert one[1]["bad_rows"]["by_reason"]["duplicate_id"] > 5
    assert one[1]["duplicates"]["dropped"] > 5


def test_policy_fail_names_the_same_row(tmp_path, no_ray, many_pieces):
    source = _write(tmp_path / "source", "jsonl")
    told = []
    for name, way in (("one", _one), ("many", _many)):
        with pytest.raises(CorpusError) as raised:
            way(source, tmp_path / name, bad_rows="fail")
        told.append(str(raised.value))
    assert told[0] == told[1]


def test_a_small_source_is_read_without_ray(tmp_path, monkeypatch):
    monkeypatch.setattr(connection, "connect", lambda: pytest.fail("Ray was started"))
    for number in range(10):
        _write(tmp_path / "source" / str(number), "jsonl", random.Random(number))
    _ingested(tmp_path / "source", tmp_path / "out", min_bytes=64 << 20)


@pytest.mark.usefixtures("no_ray", "many_pieces")
@pytest.mark.parametrize("name", ["read_piece", "repeated_ids", "repeated_contents", "take_out_repeats"])
def test_stopped_in_any_round_it_goes_on(tmp_path, monkeypatch, name):
    source = _write(tmp_path / "source", "tsv")
    whole = _many(source, tmp_path / "whole")
    _stop_at(monkeypatch, piece_files, name, 3)
    with pytest.raises(KeyboardInterrupt):
        _many(source, tmp_path / "out")
    assert _many(source, tmp_path / "out") == whole


@pytest.mark.parametrize("call", [1, 2, 3, 9])
def test_stopped_while_the_exchange_is_removed_it_goes_on(tmp_path, no_ray, many_pieces, monkeypatch, call):
    source = _write(tmp_path / "source", "tsv")
    whole = _many(source, tmp_path / "whole")
    with monkeypatch.context() as patched:
        patched.setattr(parallel_ingest.artifact_files, "clear", _clears_then_stops(call))
        with pytest.raises(KeyboardInterrupt):
            _many(source, tmp_path / "out")
    assert _many(source, tmp_path / "out") == whole


def _clears_then_stops(num_files):
    """Remove so many files of the exchange, in any order as an object store does, and stop."""

    def clear(location, patterns):
        if "exchange/summary.json" in patterns:
            return
        files = (location / "exchange").files()
        random.Random(num_files).shuffle(files)
        for file in [each for each in files if each.name != "summary.json"][: num_files * 5]:
            file.delete()
        raise KeyboardInterrupt

    return clear


def test_a_release_that_cuts_otherwise_begins_anew(tmp_path, no_ray, many_pieces, monkeypatch):
    source = _write(tmp_path / "source", "jsonl")
    whole = _many(source, tmp_path / "whole")
    for name in ("repeated_contents", "take_out_repeats"):
        with monkeypatch.context() as patched:
            _stop_at(patched, piece_files, name, 2)
            with pytest.raises(KeyboardInterrupt):
                _many(source, tmp_path / name)
        with monkeypatch.context() as patched:
            patched.setattr(pieces, "MIN_PIECE_BYTES", 3300)
            assert _many(source, tmp_path / name) == whole


def _stop_at(patched, module, name, call):
    """Raise at one of the calls of a function."""
    calls = []
    real = getattr(module, name)

    def stops(*args, **options):
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*args, **options)

    patched.setattr(module, name, stops)


@pytest.mark.usefixtures("ray_session", "many_pieces")
@pytest.mark.parametrize(
    ("name", "num_files"),
    [("read_piece", 0), ("read_piece", 2), ("repeated_ids", 0), ("repeated_contents", 0), ("take_out_repeats", 0)],
)
def test_a_worker_that_is_killed_in_the_middle_changes_nothing(tmp_path, monkeypatch, name, num_files):
    source = _write(tmp_path / "source", "jsonl")
    one = _one(source, tmp_path / "one")
    mark = tmp_path / "killed"
    real = getattr(piece_files, name)

    def killed_while_it_writes(*args, **options):
        written = []
        publish = Location._publish

        def publishes_or_dies(self, temporary):
            if len(written) == num_files and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            written.append(temporary)
            publish(self, temporary)

        Location._publish = publishes_or_dies
        try:
            return real(*args, **options)
        finally:
            Location._publish = publish

    monkeypatch.setattr(piece_files, name, killed_while_it_writes)
    assert _many(source, tmp_path / "many") == one
    assert mark.exists()
    assert not list((tmp_path / "many").rglob(".tmp-*"))


@pytest.mark.usefixtures("ray_session", "many_pieces")
@pytest.mark.parametrize("name", ["read_piece", "repeated_ids", "repeated_contents", "take_out_repeats"])
def test_a_disk_that_fills_is_named_and_it_goes_on_when_there_is_room(tmp_path, monkeypatch, name):
    source = _write(tmp_path / "source", "jsonl")
    one = _one(source, tmp_path / "one")
    with small_disk.mounted(tmp_path / "disk", 16 << 20) as is_there:
        if not is_there:
            pytest.skip("mounting is not permitted")
        disk, mark, real = tmp_path / "disk", tmp_path / "filled", getattr(piece_files, name)

        def fills(*args, **options):
            if not mark.exists():
                mark.touch()
                small_disk.fill(disk)
            return real(*args, **options)

        with monkeypatch.context() as patched:
            patched.setattr(piece_files, name, fills)
            with pytest.raises(StorageError, match="no space is left on its disk; free some"):
                _many(source, disk / "out")
        for file in (disk / "out" / "passages").glob("part-*"):
            pq.read_table(file)
        small_disk.free(disk)
        assert _many(source, disk / "out") == one
        assert not list((disk / "out").rglob(".tmp-*"))


@pytest.mark.parametrize("seed", range(8))
def test_after_an_earlier_corpus_the_rows_are_the_same_and_files_are_shared(tmp_path, no_ray, many_pieces, seed):
    """Files that hold no duplicates are shared; those from which duplicates were taken out are written again."""
    draw, kind = random.Random(seed), ("jsonl", "parquet", "tsv", "gz")[seed % 4]
    rows = list(_rows(400, draw))
    for folder, present in (("before", rows), ("now", [*rows[:50], *rows[55:]])):
        (tmp_path / folder).mkdir()
        _write_file(tmp_path / folder / f"0.{'jsonl.gz' if kind == 'gz' else kind}", kind, present, random.Random(seed))
    options = {"deduplicate": draw.choice(["exact", "none"]), "keep": KEPT, "rows_per_file": 40}
    _many(tmp_path / "before", tmp_path / "earlier", **options)
    alone = _many(tmp_path / "now", tmp_path / "alone", **options)
    after = _many(tmp_path / "now", tmp_path / "after", previous=str(tmp_path / "earlier"), **options)
    assert after == alone
    earlier, files = (
        {file.stat().st_ino for file in (tmp_path / folder / "passages").iterdir()} for folder in ("earlier", "after")
    )
    shared = len(files & earlier)
    assert shared >= (len(files) - 3 if options["deduplicate"] == "none" else 0)
    assert all(file.stat().st_nlink == 1 for file in (tmp_path / "alone/passages").iterdir())
