import csv
import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from readapt_ray.artifacts import fingerprint
from readapt_ray.errors import CorpusError, InputError
from readapt_ray.records import Qrel, Query
from readapt_ray.sources.columns import ColumnChoice
from readapt_ray.sources.opening import open_source
from readapt_ray.sources.read_options import ReadOptions
from readapt_ray.sources.source import BadRow, Row
from readapt_ray.storage import Location
from tests import object_store
from tests.sources.test_judgements import saved

LINES = '{"_id": "a", "title": "t", "text": "x"}\n{"_id": "b", "text": "y"}\n'


def _open(path, kind="auto", **options):
    return open_source(str(path), kind, ReadOptions(**options))


def _ids_and_texts(path, kind="auto"):
    source = _open(path, kind)
    source.check()
    rows = list(source.rows())
    assert source.fraction_read == 1.0
    return source.format, [(row.doc_id, row.title or "", row.text) for row in rows]


def _table(path, **columns):
    path.parent.mkdir(exist_ok=True, parents=True)
    pq.write_table(pa.table(columns), path)


WANTED = [("a", "t", "x"), ("b", "", "y")]


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("c.jsonl", LINES.encode(), "jsonl"),
        ("c.jsonl", b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n\n").encode(), "jsonl"),
        ("c.JSONL.gz", gzip.compress(LINES.encode(), mtime=0), "jsonl"),
        ("c.ndjson", LINES.replace('"_id"', '"doc_id"').replace('"text"', '"contents"').encode(), "jsonl"),
        ("c.tsv", b"a\tt\tx\nb\t\ty\n", "tsv"),
        ("c.tsv", b"body\tID\ttitle\nx\ta\tt\ny\tb\t", "tsv"),
        (
            "c.tsv.gz",
            gzip.compress(b"id\ttext\ttitle\nother\na\tx\tt\nb\ty\t\n".replace(b"other\n", b""), mtime=0),
            "tsv",
        ),
    ],
)
def test_files_of_lines(tmp_path, name, content, kind):
    (tmp_path / name).write_bytes(content)
    assert _ids_and_texts(tmp_path / name) == (kind, WANTED)
    assert _ids_and_texts(tmp_path) == (kind, WANTED)
    assert _ids_and_texts(f"file://{tmp_path}/{name}") == (kind, WANTED)


def test_two_columns_without_names(tmp_path):
    (tmp_path / "c.tsv").write_text("a\tx\nb\ty z\n")
    assert _ids_and_texts(tmp_path / "c.tsv") == ("tsv", [("a", "", "x"), ("b", "", "y z")])


@pytest.mark.parametrize(
    "as_type", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.binary()]
)
def test_parquet(tmp_path, as_type):
    columns = {name: pa.array(values).cast(as_type) for name, values in (("title", ["t", ""]), ("body", ["x", "y"]))}
    _table(tmp_path / "deep" / "c.parquet", _id=["a", "b"], other=[1, 2], **columns)
    source = _open(tmp_path)
    values = [tuple(v.decode() if isinstance(v, bytes) else v for v in row[1:4]) for row in source.rows()]
    assert values == WANTED


def test_files_of_a_folder_in_order_and_by_name(tmp_path):
    _table(tmp_path / "b.parquet", id=[2], text=["y"])
    _table(tmp_path / "a.parquet", id=[1], text=["x"])
    _table(tmp_path / "_temporary" / "c.parquet", id=[3], text=["z"])
    assert list(_open(tmp_path).rows()) == [Row("a.parquet:1", 1, None, "x"), Row("b.parquet:1", 2, None, "y")]


def test_how_many_files_of_a_folder_are_hidden_is_said(tmp_path, caplog):
    caplog.set_level("INFO", "readapt_ray")
    for name in ("b.jsonl", "_temporary/c.jsonl", ".d.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(LINES)
    (tmp_path / "_README.md").write_text("not a corpus of text")
    assert _ids_and_texts(tmp_path) == ("jsonl", WANTED)
    assert "1 file read; not read: 3 with a part in their path that begins with . or _ (.d.jsonl first)" in caplog.text


def test_a_folder_of_hidden_names_alone_may_be_text(tmp_path):
    (tmp_path / "_posts").mkdir()
    (tmp_path / "_posts" / "a.md").write_text("x")
    assert _ids_and_texts(tmp_path) == ("text", [("_posts/a.md", "a", "x")])


class _Failing(io.RawIOBase):
    """A file of 1000 bytes, none of which can be read."""

    def __init__(self, error):
        self.error = error

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, *_):
        return 1000

    def tell(self):
        return 1000

    def readinto(self, _):
        raise self.error


_SLOW = "When reading information: AWS Error SLOW_DOWN during GetObject operation: Please reduce your request rate."


@pytest.mark.parametrize("error", [OSError(_SLOW), OSError(5, "Input/output error"), TimeoutError(110, "timed out")])
@pytest.mark.parametrize("name", ["a.jsonl", "a.tsv", "a.txt", "a.jsonl.gz", "a.parquet"])
def test_what_may_pass_is_not_called_bad_input(tmp_path, monkeypatch, name, error):
    (tmp_path / name).write_text(LINES)
    source = _open(tmp_path / name)
    monkeypatch.setattr("readapt_ray.storage.Location.open_input", lambda _: _Failing(error))
    with pytest.raises(OSError, match=error.args[-1]):
        list(source.rows())


def test_what_may_pass_is_not_called_bad_input_in_the_middle_of_parquet(tmp_path, monkeypatch):
    _table(tmp_path / "a.parquet", id=["a"], text=["x"])

    def failing(*_, **__):
        yield from ()
        raise pa.ArrowException("google::cloud::Status(UNAVAILABLE: try again)")

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", failing)
    with pytest.raises(pa.ArrowException, match="UNAVAILABLE"):
        list(_open(tmp_path / "a.parquet").rows())


def test_a_folder_in_a_store_is_known_by_one_listing(tmp_path):
    with object_store.running() as store:
        for number in range(30):
            store.client.put_object(Bucket=object_store.BUCKET, Key=f"c/{number:02}.txt", Body=b"x")
        whole = Location(f"s3://{object_store.BUCKET}/c").content_fingerprint()
        source = _open(f"s3://{object_store.BUCKET}/c")
        asked = []
        store.busy = lambda method, path: bool(asked.append((method, path)))
        found = source.fingerprint()
        assert found == fingerprint({name: [each] for name, each in whole.items()})
        assert len(asked) < 5
        assert [row.doc_id for row in source.rows()] == [f"{number:02}.txt" for number in range(30)]
        store.client.put_object(Bucket=object_store.BUCKET, Key="c/07.txt", Body=b"xy")
        assert _open(f"s3://{object_store.BUCKET}/c").fingerprint() != found


def test_beir_folder_with_labels(tmp_path):
    (tmp_path / "qrels").mkdir()
    (tmp_path / "corpus.jsonl.gz").write_bytes(gzip.compress(LINES.encode(), mtime=0))
    (tmp_path / "queries.jsonl").write_text('{"_id": "q", "text": "ask"}')
    (tmp_path / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\nq\ta\t1\n")
    assert _ids_and_texts(tmp_path) == ("beir", WANTED)
    source = _open(tmp_path, "beir")
    assert list(source.queries()) == [Query("q", "ask")]
    assert {split: list(qrels) for split, qrels in source.qrels().items()} == {"dev": [Qrel("q", "a", 1)]}
    before = source.fingerprint()
    (tmp_path / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\nq\ta\t2\n")
    assert _open(tmp_path).fingerprint() != before


@pytest.mark.parametrize("layout", ["csv", "tsv", "json", "parquet", "saved", "qrels at the top"])
def test_corpora_with_labels_in_other_formats(tmp_path, layout):
    corpus = [{"docid": "d1", "contents": "one"}, {"docid": "d2", "contents": "two"}]
    queries = [{"topic": "q1", "question": "which is first?"}]
    splits = {"dev": [{"topic": "q1", "docid": "d2", "grade": 0}], "test": [{"topic": "q1", "docid": "d1", "grade": 1}]}
    if layout == "saved":
        saved(tmp_path, corpus=corpus, queries=queries)
        saved(tmp_path / "qrels", **splits)
    elif layout == "qrels at the top":
        for name, rows in {
            "corpus": corpus,
            "queries": queries,
            "qrels-dev": splits["dev"],
            "qrels": splits["test"],
        }.items():
            _write_rows(tmp_path / f"{name}.csv", rows)
        (tmp_path / "statistics.csv").write_text("a,b\n1,2\n")
    else:
        (tmp_path / "qrels").mkdir()
        for name, rows in {
            "corpus": corpus,
            "queries": queries,
            **{f"qrels/{each}": rows for each, rows in splits.items()},
        }.items():
            _write_rows(tmp_path / f"{name}.{layout}", rows)
    options = ReadOptions(columns=ColumnChoice.parse(["query_id=topic", "relevance=grade"], []))
    source = open_source(str(tmp_path), "auto", options)
    source.check()
    assert source.format == "beir" and source.has_qrels
    assert [(row.doc_id, row.text) for row in source.rows()] == [("d1", "one"), ("d2", "two")]
    assert list(source.queries()) == [Query("q1", "which is first?")]
    assert {split: list(qrels) for split, qrels in source.qrels().items()} == {
        "dev": [Qrel("q1", "d2", 0)],
        "test": [Qrel("q1", "d1", 1)],
    }


def _write_rows(file, rows):
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows))
    else:
        with file.open("w", newline="") as out:
            writer = csv.DictWriter(out, rows[0], delimiter={".csv": ",", ".tsv": "\t"}[file.suffix])
            writer.writeheader()
            writer.writerows(rows)


def test_beir_folder_of_passages_alone(tmp_path):
    (tmp_path / "corpus.jsonl").write_text(LINES)
    source = _open(tmp_path)
    assert (source.has_qrels, list(source.queries()), source.qrels()) == (False, [], {})


def test_a_row_that_is_not_utf8_is_bad_and_its_neighbours_are_not(tmp_path):
    (tmp_path / "c.jsonl").write_bytes(
        LINES.encode() + b'{"_id": "c", "text": "\xff"}\n[1]\nnonsense\n{"_id": "d", "text": "z"}'
    )
    rows = list(_open(tmp_path / "c.jsonl").rows())
    assert rows[2:] == [
        BadRow("c.jsonl:3", "not_utf8"),
        BadRow("c.jsonl:4", "not_json_object"),
        BadRow("c.jsonl:5", "not_json", "Expecting value, column 1"),
        Row("c.jsonl:6", "d", None, "z"),
    ]
    text = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"\xff\xfex")]
    )
    _table(tmp_path / "c.parquet", id=["a", "b"], text=text)
    assert list(_open(tmp_path / "c.parquet").rows()) == [
        BadRow("c.parquet:1", "not_utf8"),
        Row("c.parquet:2", "b", None, "x"),
    ]


def test_a_line_over_the_bound_is_never_held_whole(tmp_path):
    (tmp_path / "c.tsv").write_bytes(b"a\tx\nb\t" + b"y" * (3 << 20) + b"\nc\tz\n")
    assert list(_open(tmp_path / "c.tsv", max_text_bytes=1000).rows()) == [
        Row("c.tsv:1", "a", None, "x"),
        BadRow("c.tsv:2", "long_text"),
        Row("c.tsv:3", "c", None, "z"),
    ]


def test_ten_megabytes_in_a_parquet_cell_are_read_like_any_other(tmp_path):
    _table(tmp_path / "c.parquet", id=["a", "b"], text=["x" * 10_000_000, "y"])
    rows = list(_open(tmp_path / "c.parquet").rows())
    assert [len(row.text) for row in rows if isinstance(row, Row)] == [10_000_000, 1]


def test_parquet_cut_in_its_pages_is_named_with_the_row(tmp_path):
    file = tmp_path / "c.parquet"
    pq.write_table(pa.table({"id": [str(n) for n in range(5000)], "text": ["x"] * 5000}), file, row_group_size=1000)
    data = bytearray(file.read_bytes())
    at = len(data) // 2
    data[at : at + 2000] = bytes(2000)
    file.write_bytes(data)
    source = _open(file)
    source.check()
    with pytest.raises(CorpusError, match=r"c.parquet cannot be read after row \d+"):
        list(source.rows())


def test_a_catalog_name_is_its_ir_datasets_collection(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert open_source("NFCorpus", "auto", ReadOptions())._name == "beir/nfcorpus/test"
    (tmp_path / "nfcorpus").mkdir()
    (tmp_path / "nfcorpus" / "a.txt").write_text("a folder comes first")
    assert open_source("nfcorpus", "auto", ReadOptions()).format == "text"


@pytest.mark.parametrize(
    ("files", "kind", "message"),
    [
        ({}, "auto", "is an empty folder"),
        ({"a.xyz": b"1"}, "auto", "the format of .* cannot be told"),
        ({"a.jsonl": LINES.encode(), "b.md": b"x"}, "auto", r"several formats \(jsonl, text\)"),
        ({"a.jsonl": LINES.encode()}, "tsv", "holds no rows: 0 tsv files"),
        ({"a.jsonl": LINES.encode()}, "beir", "it has no corpus.jsonl"),
        ({"a.jsonl": LINES.encode()}, "xml", "no format 'xml'; the formats are auto, beir"),
        ({"a.jsonl": LINES.encode()}, "python-docs", "write python-docs:NAME"),
        ({"a.jsonl": b""}, "auto", "holds no rows: 1 jsonl file, all empty"),
        ({"a.jsonl": b"[1, 2]\n"}, "auto", "none of its first 1 lines is a JSON object"),
        (
            {"corpus.jsonl": b'{"_id": "a", "abstract": "x"}'},
            "auto",
            r"no text column \(text or contents .*\); its columns are _id, abstract: say which one it is with --columns text=COLUMN",
        ),
        (
            {"a.jsonl": b'{"text": "x", "k": 1}'},
            "auto",
            r"no id column \(doc_id or _id or id .*\); its columns are text, k: .* --columns doc_id=COLUMN",
        ),
        ({"a.tsv": b"id\tname\na\tb\n"}, "auto", "a.tsv has no text column"),
        ({"a.tsv": b"just text\n"}, "auto", "has 1 column and no header line"),
        ({"a.tsv": b"\n"}, "auto", "all empty"),
        ({"a.parquet": b"PAR1"}, "auto", "cannot be read as Parquet"),
        (
            {"a.jsonl.gz": gzip.compress(LINES.encode() * 9, mtime=0)[:-20]},
            "auto",
            "a.jsonl.gz cannot be read .*cut short",
        ),
        ({"a.jsonl.gz": b"not gzip"}, "auto", "a.jsonl.gz cannot be read"),
    ],
)
def test_what_cannot_be_a_corpus_is_refused_at_the_door(tmp_path, files, kind, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        _open(tmp_path, kind).check()


def test_parquet_without_text_or_rows_is_refused(tmp_path):
    _table(tmp_path / "a" / "a.parquet", id=[1], abstract=["x"])
    with pytest.raises(CorpusError, match=r"no text column .* its columns are id, abstract"):
        _open(tmp_path / "a").check()
    _table(tmp_path / "b" / "a.parquet", id=pa.array([], pa.string()), text=pa.array([], pa.string()))
    with pytest.raises(CorpusError, match="1 parquet file, all empty"):
        _open(tmp_path / "b").check()


def test_a_missing_place_is_refused(tmp_path):
    with pytest.raises(CorpusError, match=r"no corpus at .*nosuch.*name of the catalog \(msmarco"):
        _open(tmp_path / "nosuch")


def test_a_name_and_another_format_are_refused():
    with pytest.raises(InputError, match="is of the format 'python-docs', not 'beir'"):
        open_source("python-docs:stdlib", "beir", ReadOptions())


def test_a_file_cut_short_behind_its_beginning_is_named_with_the_line(tmp_path):
    lines = "".join(f'{{"_id": "{number}", "text": "text {number * 7919}"}}\n' for number in range(50_000))
    data = gzip.compress(lines.encode(), mtime=0)
    (tmp_path / "a.jsonl.gz").write_bytes(data[: len(data) // 2])
    source = _open(tmp_path / "a.jsonl.gz")
    source.check()
    with pytest.raises(CorpusError, match=r"a.jsonl.gz cannot be read after line \d+"):
        list(source.rows())
    cut = source.fingerprint()
    (tmp_path / "a.jsonl.gz").write_bytes(data)
    assert source.fingerprint() != cut  # of the bytes as they lie there, so that a cut file is known as another
