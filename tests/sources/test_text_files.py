import pytest

from readapt_ray.errors import CorpusError
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
