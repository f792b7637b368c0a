"""Values and files that no well-behaved tool writes, and that corpora have nevertheless."""

import datetime
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from readapt_ray.errors import CorpusError, InputError
from readapt_ray.records import Qrel
from readapt_ray.sources.columns import kept_value
from readapt_ray.sources.documents import split_front_matter
from readapt_ray.sources.judgements import iter_qrels, iter_queries
from readapt_ray.sources.source import BadRow, Unreadable
from readapt_ray.storage import Location
from tests.sources.test_formats import opened, passages

HALF_PAIR = "\\ud800"  # JSON allows half of a surrogate pair, and UTF-8 does not


@pytest.mark.parametrize(
    ("lines", "texts"),
    [
        ([r'1,"he said, \"hi\""'], ['he said, "hi"']),
        ([r'1,"\"hi\""', r'2,"a \"b\", c"'], ['"hi"', 'a "b", c']),
        ([r'1,"5\" wide', 'and long"', '2,"plain"'], ['5" wide\nand long', "plain"]),
        ([r'1,"5\" or 6\"', r"or \"7\"", 'long"', "2,x"], ['5" or 6"\nor "7"\nlong', "x"]),
        ([r'1,"in C:\",2'.replace(",2", ""), '2,"a ""b"" in C:\\"'], ["in C:\\", 'a "b" in C:\\']),
        ([r'1,"G\""odel, ""hi""', 'and ""so""', 'on"', "2,x"], ['G\\"odel, "hi"\nand "so"\non', "x"]),
    ],
)
def test_quotes_behind_backslashes_at_the_end_of_a_field_and_across_lines(tmp_path, lines, texts):
    (tmp_path / "c.csv").write_text("\n".join(["id,text", *lines]) + "\n")
    assert passages(tmp_path / "c.csv") == [(str(number), "", text) for number, text in enumerate(texts, 1)]


def test_a_stray_quote_among_backslashes_is_text_and_costs_no_other_row(tmp_path):
    rows = [f'{number},a \\" b' for number in range(2, 200)]
    (tmp_path / "c.csv").write_text("\n".join(["id,text", '1,"never closed', *rows]) + "\n")
    found = passages(tmp_path / "c.csv")
    assert [row[0] for row in found] == [str(number) for number in range(1, 200)]
    assert found[0] == ("1", "", '"never closed')


@pytest.mark.parametrize("behind", ['\n[{"id": "2", "text": "y"}]', " {}", "]", "x" * (3 << 20)])
def test_text_behind_a_json_array_is_refused_and_not_lost(tmp_path, behind):
    (tmp_path / "c.json").write_text('[{"id": "1", "text": "x"}]' + behind)
    with pytest.raises(CorpusError, match=r"after the end of its array there is more text, line [12], column"):
        passages(tmp_path / "c.json")


def test_white_space_behind_a_json_array_is_nothing(tmp_path):
    (tmp_path / "c.json").write_text('[{"id": "1", "text": "x"}]' + " \n" * (2 << 20))
    assert passages(tmp_path / "c.json") == [("1", "", "x")]


def test_half_a_surrogate_pair_in_kept_columns_is_null_and_counted(tmp_path):
    values = [f'"{HALF_PAIR}"', f'{{"a": "{HALF_PAIR}"}}', f'["{HALF_PAIR}"]', '"fine"']
    rows = [f'{{"id": "{number}", "text": "x", "u": {value}}}' for number, value in enumerate(values)]
    (tmp_path / "c.jsonl").write_text("\n".join(rows))
    for row in list(opened(tmp_path / "c.jsonl", keep=("u",)).rows())[:3]:
        with pytest.raises(ValueError, match="surrogates not allowed"):
            kept_value(row.kept[0], pa.string())


def test_half_a_surrogate_pair_in_ids_of_labels_is_a_bad_row(tmp_path):
    (tmp_path / "q.jsonl").write_text(f'{{"_id": "q{HALF_PAIR}", "text": "x"}}\n')
    (tmp_path / "r.jsonl").write_text(f'{{"query_id": "q", "doc_id": "{HALF_PAIR}", "relevance": 1}}\n')
    found = [*iter_queries(Location(str(tmp_path / "q.jsonl"))), *iter_qrels(Location(str(tmp_path / "r.jsonl")))]
    assert [row.reason for row in found] == ["not_utf8", "not_utf8"]


@pytest.mark.parametrize("value", ["1e300", "9223372036854775808", "-1e19"])
def test_a_relevance_that_no_column_holds_is_a_bad_row(tmp_path, value):
    (tmp_path / "r.tsv").write_text(f"q\td\t{value}\n")
    (row,) = iter_qrels(Location(str(tmp_path / "r.tsv")))
    assert isinstance(row, BadRow)
    assert row.reason == "bad_relevance"


def test_judgements_in_two_files_of_one_split_are_compared(tmp_path):
    (tmp_path / "corpus.jsonl").write_text('{"_id": "d", "text": "x"}\n')
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test-00000-of-00002.tsv").write_text("q1\td\t1\nq2\td\t1\n")
    (tmp_path / "qrels" / "test-00001-of-00002.tsv").write_text("q1\td\t1\nq2\td\t0\nq3\td\t1\n")
    (found,) = opened(tmp_path).qrels().values()
    conflict = BadRow("test-00001-of-00002.tsv:2", "conflicting_judgement")
    assert list(found) == [Qrel("q1", "d", 1), Qrel("q2", "d", 1), conflict, Qrel("q3", "d", 1)]


@pytest.mark.parametrize(
    "column",
    [
        pa.array([10**18, 0], pa.timestamp("us")),
        pa.array([10**7, 0], pa.date32()),
        pa.array([1, 0], pa.timestamp("us", "Nowhere/City")),
        pa.array([[10**7], [0]], pa.list_(pa.date32())),
    ],
)
def test_times_that_python_cannot_hold_are_null_and_stop_nothing(tmp_path, column):
    pq.write_table(pa.table({"id": ["1", "2"], "text": ["a", "b"], "at": column}), tmp_path / "c.parquet")
    source = opened(tmp_path / "c.parquet", keep=("at",))
    first, second = source.rows()
    assert isinstance(first.kept[0], Unreadable)
    with pytest.raises(ValueError, match=r"out of range|zoneinfo"):
        kept_value(first.kept[0], source.kept.field("at").type)
    assert second.text == "b"


@pytest.mark.parametrize("names", [("id", "id", "text"), ("id", "text", "text")])
@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_two_columns_of_one_name_are_refused(tmp_path, names, suffix):
    table = pa.Table.from_arrays([pa.array(["1"])] * 3, names)
    if suffix == "parquet":
        pq.write_table(table, tmp_path / "c.parquet")
    else:
        with pa.ipc.new_stream(str(tmp_path / "c.arrow"), table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(CorpusError, match=f"has 2 columns '{names[1]}'; write it again with one"):
        passages(tmp_path / f"c.{suffix}")


def test_numbers_are_read_as_people_write_them():
    with pytest.raises(ValueError, match="1_000"):
        kept_value("1_000", pa.int64())
    with pytest.raises(ValueError, match="1_0"):
        kept_value("1_0", pa.float64())
    assert kept_value("nan", pa.float64()) is None
    assert kept_value(" 7 ", pa.int64()) == 7
    assert kept_value(datetime.date(2024, 1, 2), pa.date32()) == datetime.date(2024, 1, 2)


@pytest.mark.parametrize("value", ["!!bool maybe", "!!timestamp soon", "2024-13-45", "[" * 3000])
def test_front_matter_that_yaml_cannot_read_is_taken_line_by_line(value):
    fields, text = split_front_matter(f"---\ntitle: Tides\nother: {value}\n---\nbody")
    assert fields == {"title": "Tides", "other": value}
    assert text == "body"


def test_a_file_name_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / os.fsdecode(b"\xff.txt")).write_text("text")
    with pytest.raises(InputError, match=r"xff.txt' is not UTF-8; rename it"):
        passages(tmp_path)


@pytest.mark.parametrize("name", ["c.jsonl", "c.txt", "c.csv"])
@pytest.mark.parametrize("in_folder", [True, False])
def test_a_file_that_changes_while_one_process_reads_it_is_refused(tmp_path, name, in_folder):
    contents = {"c.jsonl": '{"id": "1", "text": "x"}\n' * 3, "c.txt": "x\n\n" * 3, "c.csv": "id,text\n1,x\n2,y\n"}
    (tmp_path / name).write_text(contents[name])
    source = opened(tmp_path if in_folder else tmp_path / name)
    source.fingerprint()
    rows = source.rows()
    next(rows)
    (tmp_path / name).write_text(contents[name] + "\n")
    with pytest.raises(CorpusError, match=rf"{name} changed while it was read; wait until nobody writes it"):
        list(rows)
    (tmp_path / f"other-{name}").write_text(contents[name])
    assert list(opened(tmp_path).rows())
