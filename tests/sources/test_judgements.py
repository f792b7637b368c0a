import csv
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import feather

from readapt_ray.errors import CorpusError
from readapt_ray.records import Qrel, Query
from readapt_ray.sources.judgements import keep_judged, read_doc_ids, read_qrels, read_queries
from tests.data import collection

QUERIES = [Query("q1", "one thing"), Query("q2", "another")]
QRELS = [Qrel("q1", "d1", 2), Qrel("q1", "d2", 0), Qrel("q2", "d1", -1)]


def _table(path, **columns):
    pq.write_table(pa.table(columns), path)


def _queries_files(folder):
    (folder / "a.jsonl").write_text(
        '{"_id": "q1", "text": "one  thing", "metadata": {}}\n\n{"_id": "q2", "text": "another"}\n'
    )
    (folder / "b.jsonl.gz").write_bytes(gzip.compress((folder / "a.jsonl").read_bytes(), mtime=0))
    (folder / "c.tsv").write_text("q1\tone thing\nq2\tanother")
    (folder / "d.tsv").write_text("query_id\ttext\nq1\tone thing\r\nq2\tanother\n")
    _table(folder / "e.parquet", query_id=["q1", "q2"], text=["one thing", "another"])
    _table(folder / "f.parquet", text=pa.array(["one thing", "another"]).dictionary_encode(), id=["q1", "q2"])
    return sorted(folder.iterdir())


QUERY_ROWS = [{"qid": "q1", "question": "one thing"}, {"qid": "q2", "question": "another"}]
QREL_ROWS = [{"qid": qrel.query_id, "docid": qrel.doc_id, "label": qrel.relevance} for qrel in QRELS]


def _tables(folder, rows, names):
    """The same rows in every format of tables."""
    rows = [dict(zip(names, row.values(), strict=True)) for row in rows]
    quoted = {each: {"quoting": csv.QUOTE_ALL} for each in ("csv", "tsv")}
    for suffix, delimiter in (("csv", ","), ("tsv", "\t"), ("bars.csv", "|")):
        with (folder / f"a.{suffix}").open("w", newline="") as file:
            writer = csv.DictWriter(file, names, delimiter=delimiter, **quoted.get(suffix, {}))
            writer.writeheader()
            writer.writerows(rows)
    (folder / "a.json").write_text(json.dumps(rows, indent=1))
    (folder / "a.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-16")
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, folder / "a.parquet")
    feather.write_feather(table, folder / "a.feather")
    with pa.ipc.new_stream(str(folder / "a.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    return sorted(folder.iterdir())


@pytest.mark.parametrize(
    ("names", "columns"), [(("qid", "question"), ()), (("Key", "words"), ("query_id=key", "query=words"))]
)
def test_queries_of_every_table(tmp_path, names, columns):
    for file in _tables(tmp_path, QUERY_ROWS, names):
        assert read_queries(str(file), columns) == QUERIES, file.name


@pytest.mark.parametrize(
    ("names", "columns"),
    [
        (("qid", "docid", "label"), ()),
        (("Query ID", "doc-id", "Relevance"), ()),
        (("topic", "paper", "grade"), ("query_id=topic", "doc_id=paper", "relevance=grade", "query=text")),
    ],
)
def test_qrels_of_every_table(tmp_path, names, columns):
    for file in _tables(tmp_path, QREL_ROWS, names):
        assert read_qrels(str(file), columns) == QRELS, file.name


@pytest.mark.parametrize("suffix", ["txt", "qrels", "trec", "tsv"])
@pytest.mark.parametrize("between", ["\t", " "])
def test_the_header_of_a_trec_file_is_known_by_the_columns_that_are_given(tmp_path, suffix, between):
    columns = ("query_id=topic", "doc_id=paper", "relevance=grade")
    rows = [["paper", "topic", "grade"], *([each.doc_id, each.query_id, str(each.relevance)] for each in QRELS)]
    file = tmp_path / f"judged.{suffix}"
    file.write_text("".join(f"{between.join(row)}\n" for row in rows))
    assert read_qrels(str(file), columns) == QRELS


def test_a_column_that_one_file_lacks_is_told(tmp_path, caplog):
    (tmp_path / "q.csv").write_text("id,words\nq1,one thing\nq2,another\n")
    with caplog.at_level("INFO"):
        assert read_queries(str(tmp_path / "q.csv"), ("query_id=topic", "query=words")) == QUERIES
    assert "q.csv has no column topic: query_id is read from id" in caplog.text
    with pytest.raises(
        CorpusError, match=r"q.csv has no column terms; its columns are id, words: .* --columns query=COLUMN"
    ):
        read_queries(str(tmp_path / "q.csv"), ("query=terms",))


def test_a_quoted_line_break_is_of_its_query(tmp_path):
    (tmp_path / "q.csv").write_text('id,text\nq1,"one\nthing"\nq2,another\n')
    assert read_queries(str(tmp_path / "q.csv")) == QUERIES
    (tmp_path / "q.tsv").write_text('id\ttext\nq1\t"one ""thing"""\nq2\tsay "hi\n')
    assert [query.text for query in read_queries(str(tmp_path / "q.tsv"))] == ['one "thing"', 'say "hi']


def saved(folder, **splits):
    """Tables as `datasets` saves a DatasetDict; of one table without a name a data set."""
    for split, rows in splits.items():
        part = folder / split
        part.mkdir(parents=True)
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_stream(str(part / "data-00000-of-00001.arrow"), table.schema) as writer:
            writer.write_table(table)
        (part / "cache-1f2e.arrow").write_bytes(b"cached by datasets")
        (part / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
        (part / "dataset_info.json").write_text("{}")
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))


def test_what_datasets_saves(tmp_path):
    saved(tmp_path / "queries", train=QUERY_ROWS[:1], test=QUERY_ROWS[1:])
    assert sorted(read_queries(str(tmp_path / "queries"))) == QUERIES
    assert read_queries(str(tmp_path / "queries" / "train")) == QUERIES[:1]
    saved(tmp_path / "all" / "qrels", train=QREL_ROWS[:1], test=QREL_ROWS[1:])
    assert read_qrels(str(tmp_path / "all" / "qrels" / "test")) == QRELS[1:]
    with pytest.raises(CorpusError, match=r"judgements of 2 splits; give one: .*qrels/\{test,train\}"):
        read_qrels(str(tmp_path / "all"))


def test_queries_of_every_form(tmp_path):
    for file in _queries_files(tmp_path):
        assert read_queries(str(file)) == QUERIES, file.name


def test_numbers_are_ids(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"_id": 5, "text": "x"}')
    assert read_queries(str(tmp_path / "q.jsonl")) == [Query("5", "x")]


def _qrels_files(folder):
    rows = "q1\td1\t2\nq1\td2\t0\nq2\td1\t-1\n"
    (folder / "a.tsv").write_text("query-id\tcorpus-id\tscore\n" + rows)
    (folder / "b.tsv").write_text(rows)
    (folder / "c.tsv.gz").write_bytes(
        gzip.compress(b"score\tquery-id\tcorpus-id\n2\tq1\td1\n0\tq1\td2\n-1\tq2\td1", mtime=0)
    )
    (folder / "d.txt").write_text("q1 0 d1 2\nq1 0  d2 0\nq2 0 d1 -1\n")
    (folder / "e.qrels").write_text("q1\t0\td1\t2\nq1\t0\td2\t0\nq2\t0\td1\t-1\n")
    (folder / "f.jsonl").write_text(
        '{"query-id": "q1", "corpus-id": "d1", "score": 2}\n{"query-id": "q1", "corpus-id": "d2", "score": 0.0}\n'
        '{"query-id": "q2", "corpus-id": "d1", "score": -1}\n'
    )
    _table(folder / "g.parquet", query_id=["q1", "q1", "q2"], doc_id=["d1", "d2", "d1"], relevance=[2, 0, -1])
    return sorted(folder.iterdir())


def test_qrels_of_every_form(tmp_path):
    for file in _qrels_files(tmp_path):
        assert read_qrels(str(file)) == QRELS, file.name


def test_folders(tmp_path):
    (tmp_path / "queries").mkdir()
    _table(tmp_path / "queries" / "part-00000.parquet", query_id=["q1"], text=["one thing"])
    _table(tmp_path / "queries" / "part-00001.parquet", query_id=["q2"], text=["another"])
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text("q1\td1\t2\nq1\td2\t0\nq2\td1\t-1\n")
    assert read_queries(str(tmp_path / "queries")) == read_queries(str(tmp_path)) == QUERIES
    assert read_queries(f"file://{tmp_path}/queries") == QUERIES
    assert read_qrels(str(tmp_path / "qrels")) == read_qrels(str(tmp_path)) == QRELS
    (tmp_path / "qrels" / "train.tsv").write_text("q1\td1\t2\n")
    with pytest.raises(CorpusError, match="judgements of 2 splits; give one"):
        read_qrels(str(tmp_path))


def test_the_same_judgement_twice_counts_once(tmp_path):
    (tmp_path / "q.tsv").write_text("q1\td1\t2\nq1\td1\t2\n")
    assert read_qrels(str(tmp_path / "q.tsv")) == [Qrel("q1", "d1", 2)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.tsv", b"", "holds no query"),
        ("q.jsonl", b"\n\n", "holds no query"),
        ("q.jsonl", b"{}\n", "no column query_id or _id"),
        ("q.jsonl", b"nonsense\n", "no column"),
        (
            "q.jsonl",
            b'{"_id": "a", "text": "x"}\nnonsense\n',
            r"q.jsonl:2 is not a query: it is not JSON \(Expecting value, column 1\)",
        ),
        ("q.jsonl", b'{"_id": "a", "text": "x"}\n[1]\n', r"q.jsonl:2 .*not a JSON object"),
        ("q.jsonl", b'{"_id": "a", "text": "x"}\n{"_id": "b", "text": null}\n', r"q.jsonl:2 .*text is null"),
        ("q.jsonl", b'{"_id": "a", "text": "x"}\n{"_id": "b"}\n', r"q.jsonl:2 .*no text field"),
        (
            "q.jsonl",
            b'{"_id": "a", "text": "x"}\n{"_id": "a", "text": "y"}\n',
            r"q.jsonl:2 .*an earlier row has its id \('a'\)",
        ),
        ("q.jsonl", b'{"_id": "a", "text": "\\ud800"}\n', r"q.jsonl:1 .*not UTF-8"),
        ("q.tsv", b"a\tx\nb\t \n", r"q.tsv:2 .*text is empty"),
        ("q.tsv", b"a\tx\nb\n", r"q.tsv:2 .*number of columns .*\(1, not 2\)"),
        ("q.tsv", b"a\tx\nb\t\xff\xfe\n", r"q.tsv:2 .*not UTF-8"),
        ("q.tsv", b"a\n", "has 1 column and no header line; give id and text"),
        (
            "q.csv",
            b"a,b\n",
            "q.csv has no column query_id or _id.* are a, b: say which one it is with --columns query_id=COLUMN",
        ),
        ("q.json", b'{"queries": [{"id": 1}]}', "no column query_id .*its columns are queries"),
        ("q.json", b'[{"id": 1, "text": "x"}, {"id": 2, "text": ', "q.json is not JSON after value 1"),
        ("q.arrow", b"nonsense", "cannot be read as Arrow"),
        ("q.xml", b"<q/>", "not a file of queries by its name; give one that ends with .jsonl"),
        ("q.parquet", b"PAR1nonsense", "cannot be read as Parquet"),
        ("q.tsv.gz", gzip.compress(b"a\tx\n" * 9, mtime=0)[:-9], "cannot be read after line"),
    ],
)
def test_bad_queries_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        read_queries(str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.tsv", b"", "holds no judgement"),
        ("r.tsv", b"query-id\tscore\nq\t1\n", "no column doc_id or corpus-id"),
        ("r.tsv", b"q1\td1\t1\nq1\td2\tyes\n", r"r.tsv:2 is not a judgement: its relevance .* \('yes'\); fix"),
        ("r.tsv", b"q1\td1\t1\nq1\td2\t0.5\n", r"r.tsv:2 .*relevance"),
        ("r.tsv", b"q1\td1\t1\nq1\td2\tnan\n", r"r.tsv:2 .*relevance"),
        ("r.tsv", b"q1\td1\t1\nq1\td1\t2\n", r"r.tsv:2 .*judges the same passage otherwise"),
        ("r.tsv", b"q1\td1\t1\n\td1\t2\n", r"r.tsv:2 .*no id"),
        ("r.txt", b"q1 0 d1 1\nq1 0 d2\n", r"r.txt:2 .*number of columns"),
        ("r.txt", b"a b c d e\n", "has 5 columns; give query, document and relevance"),
    ],
)
def test_bad_qrels_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        read_qrels(str(tmp_path / name))


def test_what_is_not_there(tmp_path):
    with pytest.raises(CorpusError, match="no such file or folder"):
        read_queries(str(tmp_path / "nosuch.tsv"))
    with pytest.raises(CorpusError, match="no judgements in the folder"):
        read_qrels(str(tmp_path))


def test_ids_are_as_those_of_passages(tmp_path):
    (tmp_path / "q.tsv").write_text(" q 1\tone\n")
    (tmp_path / "r.tsv").write_text("q 1 \t doc 12\t1\n")
    assert read_queries(str(tmp_path / "q.tsv")) == [Query("q%201", "one")]
    assert read_qrels(str(tmp_path / "r.tsv")) == [Qrel("q%201", "doc%2012", 1)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"\xef\xbb\xbfd1\r\nd 2\r\n\n"),
        ("a", b"d1\nd 2"),
        ("a.txt.gz", gzip.compress(b"d1\nd 2", mtime=0)),
        ("a.tsv", b"d1\nd%202\n"),
        ("a.txt", b"q1 0 d1 1\nq1 0 d%202 0\n"),
        ("a.list", b"q1\td1\t1\nq1\td 2\t0\n"),
        ("a.txt", b"query-id corpus-id score\nq1 d1 1\nq1 d%202 0\n"),
        ("a.qrels", b"q1 Q0 d1 1\nq1 Q0 d%202 1\n"),
        ("a.jsonl", b'{"doc_id": "d1"}\n{"doc_id": "d 2"}\n'),
        ("a.jsonl", b'{"query-id": "q", "corpus-id": "d1", "score": 1}\n{"corpus-id": "d 2"}\n'),
    ],
)
def test_lists_of_doc_ids(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert read_doc_ids(str(tmp_path / name)) == {"d1", "d%202"}


def test_doc_ids_of_parquet_are_strings(tmp_path):
    for number, column in enumerate((pa.array([1, 2]), pa.array(["1", "2"]), pa.array([b"1", b"2"]))):
        _table(tmp_path / f"{number}.parquet", doc_id=column, other=[0, 0])
        assert read_doc_ids(str(tmp_path / f"{number}.parquet")) == {"1", "2"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b" \n", "lists no doc_id; give one a line"),
        ("a.txt", b"d1\n\xff\n", "a.txt:2 is not a doc_id: it is not UTF-8"),
        ("a.jsonl", b'{"doc_id": "d1"}\n{"doc_id": null}\n', "a.jsonl:2 is not a doc_id: it has no id"),
        ("a.jsonl", b'{"text": "x"}\n', "no column doc_id or corpus-id"),
        ("a.tsv", b"d1\tx\n", "has 2 columns; give query, document and relevance"),
    ],
)
def test_bad_lists_of_doc_ids_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        read_doc_ids(str(tmp_path / name))
    with pytest.raises(CorpusError, match=r"no file .*give a list of doc_ids, one a line, or qrels"):
        read_doc_ids(str(tmp_path / "absent"))


def test_keep_judged_keeps_the_order_and_any_relevance():
    queries = [Query("b", "x"), Query("c", "x"), Query("a", "x")]
    assert keep_judged(queries, [Qrel("a", "d", 0), Qrel("b", "d", 1)]) == [queries[0], queries[2]]


@pytest.mark.parametrize(("name", "judged"), [("nfcorpus", 323), ("scifact", 300), ("rgb_zh", 300)])
def test_judged_queries_of_real_collections(name, judged):
    folder = collection(name)
    queries = read_queries(str(folder))
    assert len(keep_judged(queries, read_qrels(str(folder / "qrels" / "test.tsv")))) == judged
