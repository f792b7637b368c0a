import threading

import pytest

from readapt_ray.errors import CorpusError
from readapt_ray.sources import text_files
from readapt_ray.sources.lines import read_whole
from readapt_ray.sources.source import BadRow, Limits, Row
from readapt_ray.sources.text_files import TextSource, split_heading, split_text
from readapt_ray.storage import Location


def _rows(path, **limits):
    return list(TextSource(Location(str(path)), Limits(**limits)).rows())


def test_a_folder_of_files(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.txt").write_text("not data")
    (tmp_path / "deep" / "my notes.md").write_text("intro\n\n```sh\n# not a heading\n```\n## Title two ##\nbody")
    (tmp_path / "a.txt").write_text("# plain text\r\nsecond")
    (tmp_path / "z.pdf").write_bytes(b"other")
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (tmp_path / "large.txt").write_text("x" * 100)
    assert _rows(tmp_path, max_text_bytes=100) == [
        Row("a.txt", "a.txt", "a", "# plain text\nsecond"),
        Row(
            "deep/my notes.md",
            "deep/my%20notes.md",
            "Title two",
            "intro\n\n```sh\n# not a heading\n```\n\n\nbody".replace("\n\n\n", "\n"),
        ),
        BadRow("large.txt", "long_text"),
        BadRow("latin.txt", "not_utf8"),
    ]


def test_a_long_file_is_split_on_paragraphs(tmp_path):
    (tmp_path / "a.md").write_text("# T\n" + "\n\n".join(f"paragraph {number}" for number in range(4)))
    rows = _rows(tmp_path, max_passage_chars=25)
    assert [(row.doc_id, row.title, row.text) for row in rows] == [
        ("a.md#1", "T", "paragraph 0\n\nparagraph 1"),
        ("a.md#2", "T", "paragraph 2\n\nparagraph 3"),
    ]


@pytest.mark.parametrize("text", ["one two three " * 50, "x" * 777, "a\n\nb\n \n\n" * 30, "", " \n\n "])
@pytest.mark.parametrize("max_chars", [1, 7, 100])
def test_splitting_loses_nothing_and_keeps_the_bound(text, max_chars):
    pieces = split_text(text, max_chars)
    assert all(0 < len(piece) <= max_chars for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(text.split())


def test_no_heading_leaves_the_text_alone():
    assert split_heading("#no space\n    # code\ntext") == ("", "#no space\n    # code\ntext")


@pytest.mark.parametrize("content", [None, ""])
def test_nothing_to_read_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "a.txt").write_text(content)
    with pytest.raises(CorpusError, match="holds no text"):
        TextSource(Location(str(tmp_path)), Limits()).check()


def test_names_that_begin_with_an_underscore_are_text(tmp_path, caplog):
    caplog.set_level("INFO", "readapt_ray")
    for name in ("_posts/a.md", "_index.md", "b.md", ".hidden.md", ".git/x.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    assert [row.doc_id for row in _rows(tmp_path)] == ["_index.md", "_posts/a.md", "b.md"]
    assert "left out 2 files with a part in their path that begins with ., .git/x.md first" in caplog.text


def test_many_files_come_in_order_and_a_bad_one_is_met_in_its_place(tmp_path):
    for number in range(60):
        (tmp_path / f"{number:02}.txt").write_text(f"text {number}")
    source = TextSource(Location(str(tmp_path)), Limits())
    assert [row.text for row in source.rows()] == [f"text {number}" for number in range(60)]
    assert source.fraction_read == 1.0
    (tmp_path / "40.txt").unlink()
    rows = source.rows()
    assert [next(rows).text for _ in range(40)] == [f"text {number}" for number in range(40)]
    with pytest.raises(CorpusError, match=r"40.txt cannot be read to its end: .*No such file"):
        next(rows)


def test_files_are_read_at_the_same_time(tmp_path, monkeypatch):
    for number in range(20):
        (tmp_path / f"{number:02}.txt").write_text("text")
    together = threading.Barrier(8, timeout=10)

    def read(location, label, *, max_bytes):
        if label < "08.txt":
            together.wait()
        return read_whole(location, label, max_bytes=max_bytes)

    monkeypatch.setattr(text_files, "read_whole", read)
    assert len(_rows(tmp_path)) == 20


def test_a_name_may_begin_with_white_space(tmp_path):
    for name in (" a.txt", "a.txt"):
        (tmp_path / name).write_text("text")
    assert [row.doc_id for row in _rows(tmp_path)] == ["%20a.txt", "a.txt"]
