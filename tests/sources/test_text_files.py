import datetime
import threading

import pyarrow as pa
import pytest

from readapt_ray.errors import CorpusError, InputError
from readapt_ray.sources import text_files
from readapt_ray.sources.columns import ColumnChoice
from readapt_ray.sources.documents import split_heading
from readapt_ray.sources.lines import read_whole
from readapt_ray.sources.read_options import ReadOptions
from readapt_ray.sources.source import MISSING, BadRow, Row
from readapt_ray.sources.text_files import TextSource, split_text
from readapt_ray.storage import Location


def _rows(path, **options):
    return list(TextSource(Location(str(path)), ReadOptions(**options)).rows())


def test_a_folder_of_files(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.txt").write_text("not data")
    (tmp_path / "deep" / "my notes.md").write_text("intro\n\n```sh\n# not a heading\n```\n## Title two ##\nbody")
    (tmp_path / "a.txt").write_text("# plain text\r\nsecond")
    (tmp_path / "z.png").write_bytes(b"other")
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
        TextSource(Location(str(tmp_path)), ReadOptions()).check()


def test_names_that_begin_with_an_underscore_are_text(tmp_path, caplog):
    caplog.set_level("INFO", "readapt_ray")
    for name in ("_posts/a.md", "_index.md", "b.md", ".hidden.md", ".git/x.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    assert [row.doc_id for row in _rows(tmp_path)] == ["_index.md", "_posts/a.md", "b.md"]
    assert "not read: 2 with a part in their path that begins with . (.git/x.md first)" in caplog.text


def test_many_files_come_in_order_and_a_bad_one_is_met_in_its_place(tmp_path):
    for number in range(60):
        (tmp_path / f"{number:02}.txt").write_text(f"text {number}")
    source = TextSource(Location(str(tmp_path)), ReadOptions())
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
    together = threading.Barrier(8, timeout=120)

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


FRONT = "---\ntitle: 'Front'\ntags: [a, b]\ndate: 2024-05-01\n---\n"


@pytest.mark.parametrize(
    ("text", "title", "left"),
    [
        (FRONT + "# Welcome\nbody", "Front", "# Welcome\nbody"),
        (FRONT + "# Front\nbody", "Front", "body"),
        ("---\ntitle: Tides: a guide\n---\nbody", "Tides: a guide", "body"),
        ("---\n---\n# Heading\nbody", "Heading", "body"),
        ("---\r\ntitle: Front\r\n---\r\nbody", "Front", "body"),
        ("\ufeff---\ntitle: Front\n---\nbody", "Front", "body"),
        ("---\ntitle: 2024\n...\nbody", "2024", "body"),
        ('+++\ntitle = "Toml"\n[params]\nx = 1\n+++\nbody', "Toml", "body"),
        ("---\nJust a rule.\n---\n# Heading\nbody", "Heading", "---\nJust a rule.\n---\nbody"),
        ("text\n---\ntitle: no front matter\n---\n", "a", "text\n---\ntitle: no front matter\n---"),
    ],
)
def test_front_matter_is_no_text(tmp_path, text, title, left):
    (tmp_path / "a.md").write_bytes(text.encode())
    (row,) = _rows(tmp_path)
    assert (row.title, row.text) == (title, left)


def test_fields_of_front_matter_are_kept_and_may_be_the_title(tmp_path):
    (tmp_path / "a.md").write_text(FRONT + "body")
    (tmp_path / "b.md").write_text("---\nheadline: B\n---\nbody two")
    options = ReadOptions(columns=ColumnChoice.parse(["title=headline"], ["date", "tags"]))
    source = TextSource(Location(str(tmp_path)), options)
    source.check()
    assert source.kept == pa.schema([("date", pa.date32()), ("tags", pa.list_(pa.string()))])
    assert [(row.title, row.kept) for row in source.rows()] == [
        ("Front", (datetime.date(2024, 5, 1), ["a", "b"])),
        ("B", (MISSING, MISSING)),
    ]
    options = ReadOptions(columns=ColumnChoice.parse([], ["author"]))
    with pytest.raises(
        CorpusError, match="has 'author' in its front matter; the fields there are title, tags, date, headline"
    ):
        TextSource(Location(str(tmp_path)), options).check()
    with pytest.raises(InputError, match="only title=FIELD of the front matter"):
        TextSource(Location(str(tmp_path)), ReadOptions(columns=ColumnChoice.parse(["text=body"], [])))


PAGE = """<!DOCTYPE html><html><head><title> Tides &amp;
 moons </title><style>p {}</style></head><body><script>var x = "<p>no</p>";</script><nav>Home</nav><h1>Head</h1>
<p>The <b>moon</b> raises
tides.<br>Twice<!-- not this -->.</p><ul><li>one<li>two</ul><div hidden>no</div><pre>a
  b</pre></body></html>"""


@pytest.mark.parametrize(
    ("encode", "word"),
    [
        (lambda page: page.encode(), "é"),
        (lambda page: page.replace("<head>", '<head><meta charset="iso-8859-1">').encode("latin-1"), "é"),
        (lambda page: page.encode("utf-16"), "日"),
    ],
)
@pytest.mark.parametrize("suffix", [".html", ".HTM", ".xhtml"])
def test_html_is_read_as_text(tmp_path, encode, word, suffix):
    (tmp_path / f"a{suffix}").write_bytes(encode(PAGE.replace("moon<", f"m{word}n<")))
    (row,) = _rows(tmp_path)
    assert row.title == "Tides & moons"
    assert row.text.split("\n\n") == ["Home", "Head", f"The m{word}n raises tides.", "Twice.", "one", "two", "a\n  b"]


def test_pages_without_a_head_or_without_anything(tmp_path):
    (tmp_path / "a.html").write_text("<p>The moon raises tides.")
    (tmp_path / "b.html").write_text("<html></html>")
    (tmp_path / "c.html").write_text("<div>" * 1000 + "deep" + "</div>" * 1000)
    rows = _rows(tmp_path)
    assert [(row.title, row.text) for row in rows] == [("a", "The moon raises tides."), ("", ""), ("c", "deep")]


def _pdf(text):
    """A PDF of one page."""
    stream = f"BT /F1 24 Tf 72 720 Td ({text}) Tj ET"
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R /Resources << /Font << /F1 5 0 R >> >> >>",
        f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    content, places = "%PDF-1.4\n", []
    for number, each in enumerate(objects, start=1):
        places.append(len(content))
        content += f"{number} 0 obj\n{each}\nendobj\n"
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    end = f"xref\n0 6\n0000000000 65535 f \n{table}trailer\n<< /Size 6 /Root 1 0 R >>\nstartxref\n{len(content)}\n%%EOF"
    return (content + end).encode()


def test_pdf_is_read_with_its_extra(tmp_path):
    pytest.importorskip("pypdf", reason="the extra pdf is not installed")
    (tmp_path / "a.pdf").write_bytes(_pdf("The moon raises tides."))
    (tmp_path / "b.pdf").write_bytes(b"%PDF-1.4 damaged")
    assert _rows(tmp_path) == [
        Row("a.pdf", "a.pdf", "a", "The moon raises tides."),
        BadRow("b.pdf", "not_pdf", "Stream has ended unexpectedly"),
    ]


def test_pdf_without_its_extra_is_counted_or_refused(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("readapt_ray.sources.documents.has_pdf_reader", lambda: False)
    (tmp_path / "b.pdf").write_bytes(_pdf("x"))
    for place in (tmp_path, tmp_path / "b.pdf"):
        with pytest.raises(InputError, match=r"holds only PDF files, which needs .*pip install 'readapt-ray\[pdf\]'"):
            TextSource(Location(str(place)), ReadOptions()).check()
    (tmp_path / "c.md").write_text("text")
    source = TextSource(Location(str(tmp_path)), ReadOptions())
    source.check()
    assert source.description() == {"files": 1, "files_not_read": {".pdf": 1}}
    assert "1 PDF file is not read, which needs" in caplog.text
