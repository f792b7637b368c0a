"""Every format of rows, in the shapes in which people have them, by one process and by tasks."""

import bz2
import csv
import gzip
import io
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from readapt_ray.errors import CorpusError, InputError
from readapt_ray.sources import opening
from readapt_ray.sources.columns import ID_NAMES, TEXT_NAMES, TITLE_NAMES, ColumnChoice
from readapt_ray.sources.formats import FORMATS
from readapt_ray.sources.opening import open_source
from readapt_ray.sources.pieces import plan_pieces
from readapt_ray.sources.read_options import ReadOptions
from readapt_ray.sources.source import BadRow
from readapt_ray.sources.text_files import TEXT_SUFFIXES

ROWS = [("a", "T", 'x "quoted" x'), ("b", "", "y, z"), ("c", "U", "one\ntwo")]
NAMES = ("doc_id", "title", "text")


def opened(path, kind="auto", columns=(), keep=()):
    source = open_source(str(path), kind, ReadOptions(columns=ColumnChoice.parse(columns, keep)))
    source.check()
    return source


def read(path, kind="auto", columns=(), keep=()):
    """Rows by one process, which are those by tasks."""
    source = opened(path, kind, columns, keep)
    rows = list(source.rows())
    if hasattr(source, "files"):
        pieces, _ = plan_pieces(source)
        assert [row[1:] for piece in pieces for _, row in piece.rows(source.format, source.options, [])] == [
            row[1:] for row in rows
        ]
    return rows


def passages(path, *args, **options):
    return [
        (str(row.doc_id), row.title or "", row.text) if not isinstance(row, BadRow) else row.message
        for row in read(path, *args, **options)
    ]


def written_csv(rows, names=NAMES, **dialect):
    out = io.StringIO()
    csv.writer(out, **dialect).writerows([names, *rows] if names else rows)
    return out.getvalue()


def json_rows(rows=ROWS, names=NAMES):
    return [dict(zip(names, row, strict=True)) for row in rows]


def zstd(data):
    return pa.Codec("zstd").compress(data, asbytes=True)


@pytest.mark.parametrize(
    "dialect",
    [
        {},
        {"lineterminator": "\n"},
        {"delimiter": ";"},
        {"delimiter": "|"},
        {"delimiter": "\t"},
        {"quoting": csv.QUOTE_ALL},
        {"quoting": csv.QUOTE_NONNUMERIC},
        {"doublequote": False, "escapechar": "\\"},
    ],
)
def test_csv_as_csv_writers_write_it(tmp_path, dialect):
    (tmp_path / "c.csv").write_text(written_csv(ROWS, **dialect), newline="")
    assert passages(tmp_path / "c.csv") == ROWS
    if dialect.get("delimiter", ",") == "\t":
        (tmp_path / "c.tsv").write_text(written_csv(ROWS, **dialect), newline="")
        assert passages(tmp_path / "c.tsv") == ROWS


@pytest.mark.parametrize(
    "encode",
    [
        str.encode,
        lambda text: b"\xef\xbb\xbf" + text.encode(),
        lambda text: text.encode("utf-16"),
        lambda text: text.encode("utf-16-le"),
        lambda text: text.encode("utf-16-be"),
        lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
    ],
)
@pytest.mark.parametrize("pack", [None, gzip.compress, bz2.compress, zstd])
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_every_encoding_and_compression(tmp_path, kind, encode, pack, line_end):
    rows = [("é1", "Tä", "x y"), ("2", "", "日本語 🌊")]
    text = {
        "csv": written_csv(rows, lineterminator=line_end),
        "tsv": written_csv(rows, delimiter="\t", lineterminator=line_end),
        "jsonl": line_end.join(json.dumps(row, ensure_ascii=False) for row in json_rows(rows)),
        "json": json.dumps(json_rows(rows), ensure_ascii=False, indent=1).replace("\n", line_end),
    }[kind]
    suffix = {None: "", gzip.compress: ".gz", bz2.compress: ".bz2", zstd: ".zst"}[pack]
    file = tmp_path / f"c.{kind}{suffix}"
    file.write_bytes((pack or bytes)(encode(text)))
    assert passages(file) == rows


def test_quotes_of_tsv_count_where_csv_has_them(tmp_path):
    (tmp_path / "p.tsv").write_text(
        'id\ttext\ttitle\n1\t"Aaron ""the"" priest"\tAaron\n2\t"Moses, the brother"\tMoses\n'
    )
    assert passages(tmp_path / "p.tsv") == [
        ("1", "Aaron", 'Aaron "the" priest'),
        ("2", "Moses", "Moses, the brother"),
    ]
    (tmp_path / "stray.tsv").write_text(
        '1\tfirst text\n2\t"starts with a quote\n3\tthird text\n4\t"He said" loudly\n5\tends with "\n6\t5" disk\n'
    )
    assert passages(tmp_path / "stray.tsv") == [
        ("1", "", "first text"),
        ("2", "", '"starts with a quote'),
        ("3", "", "third text"),
        ("4", "", '"He said" loudly'),
        ("5", "", 'ends with "'),
        ("6", "", '5" disk'),
    ]


def test_two_stray_quotes_of_tsv_do_not_join_two_rows(tmp_path):
    (tmp_path / "c.tsv").write_text('1\t"opens\n2\tcloses"\n3\tthird\n4\t"opens\n5\tcloses"\n')
    opens, closes = '"opens', 'closes"'
    assert [text for _, _, text in passages(tmp_path / "c.tsv")] == [opens, closes, "third", opens, closes]


def test_a_line_break_in_the_first_row_of_tsv_without_names(tmp_path):
    (tmp_path / "c.tsv").write_text('1\t"one\ntwo"\n2\tthird\n')
    assert passages(tmp_path / "c.tsv") == [("1", "", "one\ntwo"), ("2", "", "third")]


def test_a_stray_quote_of_csv_takes_no_other_row(tmp_path):
    (tmp_path / "c.csv").write_text(
        'id,text\n1,first\n2,"starts with a quote\n3,third\n4,"fine, too"\n5,6" disk\n6,"open\n'
    )
    assert passages(tmp_path / "c.csv") == [
        ("1", "", "first"),
        ("2", "", '"starts with a quote'),
        ("3", "", "third"),
        ("4", "", "fine, too"),
        ("5", "", '6" disk'),
        ("6", "", '"open'),
    ]


def test_line_breaks_in_quotes_of_tsv_are_read_by_one_task(tmp_path, monkeypatch):
    monkeypatch.setattr("readapt_ray.sources.pieces.MIN_PIECE_BYTES", 50)
    rows = [(f"d{number}", f"t{number}", f"first {number}\nsecond\n\nthird") for number in range(40)]
    (tmp_path / "c.tsv").write_text(written_csv(rows, delimiter="\t"), newline="")
    found = passages(tmp_path / "c.tsv")
    assert [(doc_id, title, text.replace("\n\n", "\n")) for doc_id, title, text in found] == [
        (doc_id, title, text.replace("\n\n", "\n")) for doc_id, title, text in rows
    ]


def test_what_is_not_a_row_of_csv_is_named(tmp_path):
    content = b'id,text,title\n1,"one\ntwo",t\n2,too,many,fields\n3,few\n4,"broken \xff\nline",t\n5,good,t\n'
    (tmp_path / "c.csv").write_bytes(content)
    told = [row if isinstance(row, str) else row[0] for row in passages(tmp_path / "c.csv")]
    assert told[0] == "1" and told[-1] == "5"
    assert told[1:3] == [
        f"c.csv:{line}: it has another number of columns than the first line: {count}, not 3"
        for line, count in ((4, 4), (5, 2))
    ]
    assert "c.csv:6: it is not UTF-8" in told


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("as_array", [True, False])
def test_json_values(tmp_path, indent, as_array, monkeypatch):
    monkeypatch.setattr("readapt_ray.sources.json_files._CHUNK_BYTES", 7)
    rows = json_rows()
    text = json.dumps(rows, indent=indent) if as_array else "\n".join(json.dumps(row, indent=indent) for row in rows)
    (tmp_path / "c.json").write_text(text)
    assert passages(tmp_path / "c.json") == ROWS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '[{"id": 1, "text": "x"}, {"id": 2,',
            "c.json is not JSON after value 1: .* fetch it again if it was cut short",
        ),
        ('[{"id": 1, "text": "x"}', "its array has no end"),
        ("nonsense", "c.json is not JSON after value 0"),
        ("[1, 2]", "c.json holds no JSON objects: its first value is 1"),
        ('{"version": 1, "data": [{"id": 1}]}', "is one JSON object, whose 'data' is a list .*jq .data"),
        ("[]", "holds no rows"),
    ],
)
def test_what_is_no_json_is_refused_by_name(tmp_path, content, message):
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(CorpusError, match=message):
        read(tmp_path / "c.json")


def test_json_lines_that_are_an_array_name_the_format(tmp_path):
    (tmp_path / "c.jsonl").write_text(json.dumps(json_rows(), indent=1))
    with pytest.raises(CorpusError, match=r"c.jsonl is not JSON Lines: .* --format json"):
        read(tmp_path / "c.jsonl")


def write_arrow(file, table, *, as_file=False):
    file.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(file), "wb") as sink:
        new = pa.ipc.new_file if as_file else pa.ipc.new_stream
        with new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=1)


def save_to_disk(folder, rows):
    """What `datasets.save_to_disk` writes, with a cached file of an earlier map beside it."""
    table = pa.table(dict(zip(NAMES, map(list, zip(*rows, strict=True)), strict=True)))
    write_arrow(folder / "data-00000-of-00001.arrow", table)
    write_arrow(folder / "cache-1234.arrow", table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    (folder / "dataset_info.json").write_text("{}")


def test_what_datasets_saves(tmp_path, caplog):
    caplog.set_level("INFO", "readapt_ray")
    save_to_disk(tmp_path / "one", ROWS)
    assert passages(tmp_path / "one") == ROWS
    assert opened(tmp_path / "one").description()["files_not_read"] == {".arrow": 1, ".json": 2}
    save_to_disk(tmp_path / "dict" / "train", ROWS[:2])
    save_to_disk(tmp_path / "dict" / "test", ROWS[2:])
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert passages(tmp_path / "dict") == [ROWS[2], *ROWS[:2]]
    (tmp_path / "one" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(CorpusError, match=r"state.json lists data-00000-of-00001.arrow, which is not there"):
        opened(tmp_path / "one")


@pytest.mark.parametrize("as_file", [True, False])
def test_arrow_files(tmp_path, as_file):
    table = pa.table({"id": [1, 2], "text": pa.array(["x", "y"], pa.dictionary(pa.int32(), pa.string()))})
    write_arrow(tmp_path / "c.arrow", table, as_file=as_file)
    assert passages(tmp_path / "c.arrow") == [("1", "", "x"), ("2", "", "y")]
    (tmp_path / "c.arrow").write_bytes((tmp_path / "c.arrow").read_bytes()[:300])
    with pytest.raises(CorpusError, match=r"c.arrow cannot be read"):
        read(tmp_path / "c.arrow")


KNOWN = [
    ("docid", "contents"),
    ("docid", "text"),
    ("id", "content"),
    ("pid", "passage"),
    ("_id", "body"),
    ("docno", "text"),
    ("Doc ID", "Content"),
    ("passageId", "passage_text"),
    ("url", "TEXT"),
]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "parquet", "arrow"])
@pytest.mark.parametrize("names", KNOWN)
def test_well_known_columns_of_every_format(tmp_path, kind, names):
    write_table(tmp_path / f"c.{kind}", [("1", "x"), ("2", "y")], names)
    assert passages(tmp_path / f"c.{kind}") == [("1", "", "x"), ("2", "", "y")]


def write_table(file, rows, names):
    kind = file.suffix[1:]
    table = pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))
    if kind == "parquet":
        pq.write_table(table, file)
    elif kind == "arrow":
        write_arrow(file, table)
    elif kind in ("csv", "tsv"):
        file.write_text(written_csv(rows, names, delimiter="," if kind == "csv" else "\t"), newline="")
    else:
        values = json_rows(rows, names)
        file.write_text(json.dumps(values) if kind == "json" else "\n".join(map(json.dumps, values)))


OWN = ("key", "headline", "abstract", "main", "url", "year")
OWN_ROWS = [("k1", "H", "A", "M", "u1", 2020), ("k2", "", "B", "", "u2", 2021)]
OWN_COLUMNS = ("doc_id=key", "title=headline", "text=abstract+main")


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "parquet", "arrow"])
def test_columns_are_mapped_joined_and_kept_in_every_format(tmp_path, kind):
    file = tmp_path / f"c.{kind}"
    write_table(file, OWN_ROWS, OWN)
    rows = read(file, columns=OWN_COLUMNS, keep=("url", "year"))
    assert [(row.doc_id, row.title or "", row.text) for row in rows] == [("k1", "H", "A\nM"), ("k2", "", "B")]
    source = opened(file, columns=OWN_COLUMNS, keep=("url", "year"))
    assert source.kept == pa.schema([("url", pa.string()), ("year", pa.int64())])
    assert [str(value) for row in rows for value in row.kept] == ["u1", "2020", "u2", "2021"]
    assert source.description()["columns"] == {
        "doc_id": ["key"],
        "title": ["headline"],
        "text": ["abstract", "main"],
        "kept": ["url", "year"],
        "not_read": [],
    }
    for columns, keep, message in (
        (
            ("text=story",),
            (),
            rf"c.{kind} has no column 'story'; its columns are key, headline, .*--columns text=COLUMN",
        ),
        (
            OWN_COLUMNS,
            ("year:int",),
            r"has no column 'year:int'; .*int is no type; the types are string, int64, float64, bool",
        ),
        (OWN_COLUMNS, ("yaer",), rf"c.{kind} has no column 'yaer'; .*did you mean 'year'.*--keep"),
    ):
        with pytest.raises(CorpusError, match=message):
            opened(file, columns=columns, keep=keep)


@pytest.mark.parametrize(
    ("columns", "keep", "message"),
    [
        (["body=content"], [], "columns = 'body=content': write FIELD=COLUMN, where the field is doc_id, title, text"),
        (["titel=headline"], [], "did you mean 'title'"),
        (["text="], [], "columns = 'text=' names no column: write text=COLUMN"),
        (["text"], [], "write FIELD=COLUMN"),
        (["text=a", "text=b"], [], r"sets a field twice; join columns with \+"),
        (["doc_id=a+b"], [], "doc_id is one column"),
        ([], ["title"], "keep = 'title': a passage has a column of its own"),
    ],
)
def test_a_choice_that_cannot_be_is_refused(columns, keep, message):
    with pytest.raises(InputError, match=message):
        ColumnChoice.parse(columns, keep)


def test_a_column_that_comes_late_can_be_kept_with_its_type(tmp_path):
    lines = [
        json.dumps({"id": number, "text": "x"} | ({"date": "2020"} if number > 150 else {})) for number in range(200)
    ]
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    with pytest.raises(CorpusError, match="--keep NAME:string"):
        opened(tmp_path / "c.jsonl", keep=("date",))
    assert read(tmp_path / "c.jsonl", keep=("date:string",))[-1].kept == ("2020",)


def test_what_a_folder_holds_beside_its_tables_is_counted_and_named(tmp_path, caplog):
    caplog.set_level("INFO", "readapt_ray")
    write_table(tmp_path / "c.csv", [("1", "x")], ("id", "text"))
    for name in ("README.md", "LICENSE", "a.pdf", "b.pdf", "x/data.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert passages(tmp_path) == [("1", "", "x")]
    assert opened(tmp_path).description()["files_not_read"] == {".json": 1, ".md": 1, ".pdf": 2, "without suffix": 1}
    assert "1 file read; not read: 2 .pdf (a.pdf first), " in caplog.text


PARTS = ["as-corpus", "as-queries", "bn-corpus", "bn-queries"]


@pytest.mark.parametrize(
    "names",
    [
        [f"{part}/test-00000-of-00001.parquet" for part in PARTS],
        ["en/a.parquet", "de/a.parquet"],
        ["data/en/a.parquet", "data/pt-br/a.parquet"],
        ["20231101.en/a.parquet", "20231101.de/a.parquet"],
        ["deu_Latn/a.parquet", "eng_Latn/a.parquet"],
        ["en.parquet", "de.parquet"],
        ["one/corpus.parquet", "two/corpus.parquet"],
    ],
)
def test_a_folder_of_several_data_sets_is_refused_with_their_list(tmp_path, names):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"id": [name], "text": [name]}), tmp_path / name)
    with pytest.raises(
        CorpusError, match=r"holds several data sets: .*choose one, such as --source .*--format parquet"
    ):
        open_source(str(tmp_path), "auto", ReadOptions())
    assert len(passages(tmp_path, "parquet")) == len(names)


def test_shards_and_splits_are_one_corpus(tmp_path):
    for name in ("train/a.parquet", "test/a.parquet", "2023/b.parquet", "part-1.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"id": [name], "text": [name]}), tmp_path / name)
    assert len(passages(tmp_path)) == 4


def test_a_folder_of_parts_is_no_corpus_of_queries(tmp_path):
    for part in ("corpus", "queries"):
        (tmp_path / part).mkdir()
        pq.write_table(pa.table({"_id": [part], "text": [part]}), tmp_path / part / "a.parquet")
    source = open_source(str(tmp_path), "auto", ReadOptions())
    assert [row.doc_id for row in source.rows()] == ["corpus"]
    assert [query.query_id for query in source.queries()] == ["queries"]


def test_the_table_of_formats_says_what_is_read():
    page = (Path(opening.__file__).parent / "README.md").read_text()
    told = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", page, re.MULTILINE))
    read_ = {name: each.suffixes for name, each in FORMATS.items()} | {"text": TEXT_SUFFIXES}
    assert {name: tuple(re.findall(r"`(.\w+)`", files)) for name, files in told.items()} == read_
    columns = re.search(r"^\| corpus \| (.*?) \|", page, re.MULTILINE)[1]
    assert re.findall(r"`(\w+)`", columns) == [*ID_NAMES, *TEXT_NAMES, *TITLE_NAMES]


@pytest.mark.parametrize("num_rows", [2, 30_000])
def test_what_is_not_json_is_named_by_its_line_and_column_in_the_file(tmp_path, num_rows):
    """Also where it comes after the first megabyte."""
    text = json.dumps([{"id": str(number), "text": "some words"} for number in range(num_rows)], indent=1)
    lines = text.splitlines()
    at = len(lines) - 3  # the last text
    lines[at] = lines[at].replace(": ", " ")
    (tmp_path / "c.json").write_text("\ufeff\n" + "\n".join(lines))
    message = rf"c.json is not JSON after value {num_rows - 1}: Expecting ':' delimiter, line {at + 2}, column 10;"
    with pytest.raises(CorpusError, match=message):
        list(opened(tmp_path / "c.json").rows())
