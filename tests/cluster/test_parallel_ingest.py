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
from readapt_ray.sources import near_pieces, piece_files, pieces
from readapt_ray.sources.known_pieces import read_pieces
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
        patched.setattr("readapt_ray.stages.ingest.MIN_NEAR_BYTES", min_bytes)
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
    monkeypatch.setattr(parallel_ingest, "_NEAR_PARTITION_BYTES", 30_000)


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


def _write_labelled(folder, layout, draw, num_rows=150):
    """Write passages with queries and judgements: some of duplicates, of bad rows, of nothing, and bad ones."""
    rows = [row | {"text": str(row["text"])} for row in _rows(num_rows, draw)]
    queries = [
        {"_id": f"q{number % 37}", "text": ["ask", "", f"what {number}"][draw.randrange(3)]} for number in range(40)
    ]
    judged = [
        (f"q{draw.randrange(45)}", f"d{draw.randrange(num_rows + 9)}", draw.choice(["0", "1", "2", "x"]))
        for _ in range(200)
    ]
    if layout == "beir":
        (folder / "qrels").mkdir(parents=True)
        (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
        for split in ("test", "dev"):
            lines = ["query-id\tcorpus-id\tscore", *("\t".join(row) for row in judged)]
            (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines))
            judged = judged[:60]
        return folder
    names = {"parts": ("corpus", "queries", "data/test-00000-of-00001.parquet")}
    corpus, asked, qrels = names.get(layout, ("passages", "queries", "qrels/test.parquet"))
    for name, table in (
        (f"{corpus}/a.parquet", rows[: num_rows // 2]),
        (f"{corpus}/b.parquet", rows[num_rows // 2 :]),
        (f"{asked}/a.parquet", queries),
        (qrels, [dict(zip(("query_id", "doc_id", "relevance"), row, strict=True)) for row in judged]),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(table), folder / name, row_group_size=10)
    return folder


def _labels(output):
    files = sorted([*(output / "queries").glob("*"), *(output / "qrels").glob("*")])
    return {file.name: pq.read_table(file).to_pylist() for file in files}


@pytest.mark.parametrize("seed", range(6))
def test_passages_with_labels_are_cut_like_others(tmp_path, no_ray, monkeypatch, seed):
    draw = random.Random(seed)
    source = _write_labelled(tmp_path / "source", ("beir", "parts", "ingested")[seed % 3], draw)
    monkeypatch.setattr(pieces, "MIN_PIECE_BYTES", draw.choice([2000, 5000]))
    monkeypatch.setattr(parallel_ingest, "_PARTITION_BYTES", draw.choice([3000, 100_000]))
    monkeypatch.setattr(piece_files, "_CHUNK_ROWS", draw.choice([20, 1000]))
    options = {"deduplicate": draw.choice(["exact", "auto"]), "keep": KEPT}
    one = _one(source, tmp_path / "one", **options)
    assert _many(source, tmp_path / "many", **options) == one
    assert _labels(tmp_path / "many") == _labels(tmp_path / "one")
    assert one[1]["labels"]["qrels_of_unknown_passages"] > 3
    assert one[1]["labels"].get("qrels_moved_to_kept_duplicates", 1) >= 1


def test_a_worker_killed_while_it_writes_judgements_changes_nothing(tmp_path, ray_session, many_pieces, monkeypatch):
    source = _write_labelled(tmp_path / "source", "beir", random.Random(0))
    one = _one(source, tmp_path / "one", deduplicate="exact")
    mark = _killed_in(monkeypatch, parallel_ingest, "_write_labels", 1, tmp_path)
    assert _many(source, tmp_path / "many", deduplicate="exact") == one
    assert mark.exists()
    assert _labels(tmp_path / "many") == _labels(tmp_path / "one")


def _write_alike(file, draw, num_rows=300):
    """Write passages of which many are like others: copies with a changed word, copies of those, and one large family."""
    texts = [" ".join(f"w{draw.randrange(500)}" for _ in range(draw.randrange(4, 60))) for _ in range(20)]
    boilerplate = [f"b{number}" for number in range(60)]
    rows = []
    for number in range(num_rows):
        kind = draw.randrange(10)
        if kind < 6:
            words = draw.choice(texts).split(" ")
            words[draw.randrange(len(words))] = f"w{draw.randrange(500)}"
            texts.append(" ".join(words))
        elif kind < 9:
            texts.append(" ".join([*boilerplate, f"page {number}"][draw.randrange(3) :]))
        else:
            texts.append(draw.choice(texts))
        doc_id = f"d{number}" if draw.randrange(20) else f"d{draw.randrange(number + 1)}"
        rows.append(
            {"_id": doc_id, "title": draw.choice(["", "a title"]), "text": draw.choice([texts[-1], texts[-1].upper()])}
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("seed", range(16))
def test_near_duplicates_of_any_cut_are_those_of_one_process(tmp_path, no_ray, monkeypatch, seed):
    draw = random.Random(seed)
    _write_alike(tmp_path / "source" / "corpus.jsonl", draw)
    judged = "".join(f"q{number}\td{number * 3}\t1\n" for number in range(50))
    (tmp_path / "source" / "qrels").mkdir()
    (tmp_path / "source" / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judged}")
    monkeypatch.setattr(pieces, "MIN_PIECE_BYTES", draw.choice([3000, 10_000, 1_000_000]))
    monkeypatch.setattr(parallel_ingest, "_NEAR_PARTITION_BYTES", draw.choice([10_000, 30_000, 1_000_000]))
    monkeypatch.setattr(near_pieces, "_CHUNK_ROWS", draw.choice([10, 1000]))
    small = draw.choice([1, 3, 16])
    monkeypatch.setattr(near_pieces, "_SMALL_BUCKET", small)
    monkeypatch.setattr(near_pieces, "_MAX_SIMILAR", 1 if small == 1 else draw.choice([1, 3, 8]))
    monkeypatch.setattr(near_pieces, "_BLOCK", draw.choice([2, 256]))
    options = {"deduplicate": "near", "near_threshold": draw.choice([0.4, 0.6, 0.8, 0.9]), "rows_per_file": 1000}
    rounds = []
    decide = near_pieces.near_decide
    monkeypatch.setattr(near_pieces, "near_decide", lambda number, job: rounds.append(number) or decide(number, job))
    one = _one(tmp_path / "source", tmp_path / "one", **options)
    assert _many(tmp_path / "source", tmp_path / "many", **options) == one
    assert _labels(tmp_path / "many") == _labels(tmp_path / "one")
    assert one[1]["duplicates"]["dropped"] > 50
    assert one[1]["labels"]["qrels_moved_to_kept_duplicates"] > 5
    assert small > 1 or len(rounds) > 1
    assert [file.name for file in (tmp_path / "many").iterdir() if file.is_dir()] == ["passages", "qrels"]


def test_policy_fail_names_the_same_judgement(tmp_path, no_ray, many_pieces):
    folder = _write_labelled(tmp_path / "source", "beir", random.Random(0))
    rows = [{"_id": f"d{number}", "text": f"text {number}"} for number in range(9)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(CorpusError, match=r"bad row at queries.jsonl:\d+: its text is empty") as one:
        _one(folder, tmp_path / "one", bad_rows="fail")
    with pytest.raises(CorpusError) as many:
        _many(folder, tmp_path / "many", bad_rows="fail")
    assert str(many.value) == str(one.value)


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


def _killed_in(monkeypatch, module, name, num_files, folder):
    """Kill the first worker that runs a function before it gives its next file, after so many, its name."""
    mark = folder / "killed"
    real = getattr(module, name)

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

    monkeypatch.setattr(module, name, killed_while_it_writes)
    return mark


@pytest.mark.usefixtures("ray_session", "many_pieces")
@pytest.mark.parametrize(
    ("name", "num_files"),
    [("near_buckets", 0), ("near_buckets", 1), ("near_send", 1), ("near_compare", 0), ("near_decide", 3)],
)
def test_a_worker_killed_while_near_duplicates_are_sought_changes_nothing(tmp_path, monkeypatch, name, num_files):
    _write_alike(tmp_path / "source.jsonl", random.Random(0))
    one = _one(tmp_path / "source.jsonl", tmp_path / "one", deduplicate="near")
    mark = _killed_in(monkeypatch, near_pieces, name, num_files, tmp_path)
    assert _many(tmp_path / "source.jsonl", tmp_path / "many", deduplicate="near") == one
    assert mark.exists()


@pytest.mark.usefixtures("ray_session", "many_pieces")
@pytest.mark.parametrize(
    ("name", "num_files"),
    [("read_piece", 0), ("read_piece", 2), ("repeated_ids", 0), ("repeated_contents", 0), ("take_out_repeats", 0)],
)
def test_a_worker_that_is_killed_in_the_middle_changes_nothing(tmp_path, monkeypatch, name, num_files):
    source = _write(tmp_path / "source", "jsonl")
    one = _one(source, tmp_path / "one")
    mark = _killed_in(monkeypatch, piece_files, name, num_files, tmp_path)
    assert _many(source, tmp_path / "many") == one
    assert mark.exists()
    assert not list((tmp_path / "many").rglob(".tmp-*"))


@pytest.mark.usefixtures("ray_session", "many_pieces")
@pytest.mark.parametrize(
    "name",
    [*("read_piece", "repeated_ids", "repeated_contents", "take_out_repeats"), *("near_send", "near_decide")],
)
def test_a_disk_that_fills_is_named_and_it_goes_on_when_there_is_room(tmp_path, monkeypatch, name):
    module = near_pieces if name.startswith("near") else piece_files
    options = {"deduplicate": "near" if module is near_pieces else "exact"}
    source = _write(tmp_path / "source", "jsonl")
    one = _one(source, tmp_path / "one", **options)
    with small_disk.mounted(tmp_path / "disk", 16 << 20) as is_there:
        if not is_there:
            pytest.skip("mounting is not permitted")
        disk, mark, real = tmp_path / "disk", tmp_path / "filled", getattr(module, name)

        def fills(*args, **options):
            if not mark.exists():
                mark.touch()
                small_disk.fill(disk)
            return real(*args, **options)

        with monkeypatch.context() as patched:
            patched.setattr(module, name, fills)
            with pytest.raises(StorageError, match="no space is left on its disk; free some"):
                _many(source, disk / "out", **options)
        for file in (disk / "out" / "passages").glob("part-*"):
            pq.read_table(file)
        small_disk.free(disk)
        assert _many(source, disk / "out", **options) == one
        assert not list((disk / "out").rglob(".tmp-*"))


@pytest.mark.parametrize("seed", range(8))
def test_files_that_did_not_change_are_not_read_and_the_rows_are_those_of_a_fresh_run(
    tmp_path, no_ray, many_pieces, monkeypatch, seed
):
    """Files are changed, removed, added, and given rows that repeat others, before and after them."""
    draw, is_json = random.Random(seed), seed % 2
    by_changes = seed < 6
    monkeypatch.setattr(parallel_ingest, "MAX_CHANGED_BYTES", 1 << 30 if by_changes else 0)
    options = {"deduplicate": draw.choice(["exact", "none"]), "keep": KEPT, "rows_per_file": 9}
    files = {number: _clean_rows(f"{number}-", 30) for number in range(40)}
    files[33][5] |= {"text": 7}
    source = tmp_path / "source"
    source.mkdir()

    def write(number):
        name = source / f"{number:02d}.{'jsonl' if is_json else 'parquet'}"
        if is_json:
            name.write_text("".join(f"{json.dumps(row)}\n" for row in files[number]))
        else:
            pq.write_table(pa.Table.from_pylist([row | {"text": str(row["text"])} for row in files[number]]), name)

    for number in files:
        write(number)
    _many(source, tmp_path / "earlier", **options)
    files[12] = files[12][3:]
    files[20] += [files[3][0], files[25][1] | {"_id": "same text, other id"}]
    files |= {40: _clean_rows("40-", 30), 41: _clean_rows("41-", 30)}
    for number in (12, 20, 40, 41):
        write(number)
    next(source.glob("16.*")).unlink()
    alone = _many(source, tmp_path / "alone", **options)
    read, read_piece = [], piece_files._read_piece
    monkeypatch.setattr(
        piece_files, "_read_piece", lambda piece, job: read.append(piece.ranges) or read_piece(piece, job)
    )
    digests: list[int] = []
    add = piece_files._Digests.add
    monkeypatch.setattr(
        piece_files._Digests, "add", lambda self, *row, **at: digests.append(1) or add(self, *row, **at)
    )
    assert _many(source, tmp_path / "after", previous=str(tmp_path / "earlier"), **options) == alone
    num_all = alone[0]["num_passages"]
    assert len(digests) < num_all / 2 if by_changes else len(digests) >= num_all, (
        "those of changed passages, and their repeats"
    )
    names = {each.label.partition(".")[0] for ranges in read for each in ranges}
    assert {"12", "20", "40", "41"} <= names and len(names) < 20
    read.clear()
    assert _many(source, tmp_path / "again", previous=str(tmp_path / "after"), **options) == alone
    again = {each.label.partition(".")[0] for ranges in read for each in ranges}
    assert len(again) < 20 and not {"00", "39", "41"} & again
    read.clear()
    _many(source, tmp_path / "other", previous=str(tmp_path / "after"), **options | {"keep": KEPT[:1]})
    assert len({each.label for ranges in read for each in ranges}) == len(files) - 1, "other options read all again"


def _clean_rows(prefix, num_rows):
    return [
        {"_id": f"{prefix}{number}", "title": "ti é", "text": f"{prefix} text é {number}", "year": "2020", "url": "u"}
        for number in range(num_rows)
    ]


def test_a_piece_whose_earlier_files_are_damaged_is_read_from_the_source(tmp_path, no_ray, many_pieces, caplog):
    source = tmp_path / "source"
    source.mkdir()
    for name, rows in (("0", _clean_rows("", 300)), ("1", _clean_rows("later", 30))):
        (source / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    _many(source, tmp_path / "earlier", rows_per_file=5)
    note = tmp_path / "earlier/passages.pieces.json"
    whole = note.read_text()
    for cut_short in ("", whole[:50], "[]", "{}"):
        note.write_text(cut_short)
        assert not read_pieces(Location(str(tmp_path / "earlier"))).pieces
    note.write_text(whole)
    damaged = sorted((tmp_path / "earlier/passages").glob("part-000001*"))[1]
    content = damaged.read_bytes()
    damaged.write_bytes(content[:4] + bytes(200) + content[204:])  # its footer is whole
    with (source / "1.jsonl").open("a") as file:
        file.write(json.dumps(_clean_rows("new", 1)[0]) + "\n")
    alone = _many(source, tmp_path / "alone", rows_per_file=5)
    assert _many(source, tmp_path / "after", previous=str(tmp_path / "earlier"), rows_per_file=5) == alone
    assert "so the source is read" in caplog.text


@pytest.mark.parametrize("seed", range(8))
def test_after_an_earlier_corpus_the_rows_are_the_same_and_files_are_shared(tmp_path, no_ray, many_pieces, seed):
    """Files that hold no duplicates are shared; those from which duplicates were taken out are written again."""
    draw, kind = random.Random(seed), ("jsonl", "parquet", "tsv", "gz")[seed % 4]
    rows = list({row["_id"]: row for row in _rows(400, draw)}.values())  # a repeated id is dropped in any mode
    for folder, present in (("before", rows), ("now", [*rows[:50], *rows[55:]])):
        (tmp_path / folder).mkdir()
        _write_file(tmp_path / folder / f"0.{'jsonl.gz' if kind == 'gz' else kind}", kind, present, random.Random(seed))
    options = {"deduplicate": draw.choice(["exact", "none"]), "keep": KEPT, "rows_per_file": 5}
    _many(tmp_path / "before", tmp_path / "earlier", **options)
    alone = _many(tmp_path / "now", tmp_path / "alone", **options)
    after = _many(tmp_path / "now", tmp_path / "after", previous=str(tmp_path / "earlier"), **options)
    assert after == alone
    earlier, files = (
        {file.stat().st_ino for file in (tmp_path / folder / "passages").iterdir()} for folder in ("earlier", "after")
    )
    shared = len(files & earlier)
    # At the beginning of each range of bytes parts have other rows, until one begins where an earlier part did.
    assert shared >= (0.4 * len(files) if options["deduplicate"] == "none" else 0)
    assert all(file.stat().st_nlink == 1 for file in (tmp_path / "alone/passages").iterdir())
