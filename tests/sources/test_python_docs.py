import sys

import pytest

from readapt_ray.errors import CorpusError, InputError
from readapt_ray.records import Qrel
from readapt_ray.sources.python_docs import (
    Docstring,
    PythonDocsSource,
    makes_query,
    package_files,
    read_docstrings,
    split_summary,
)
from readapt_ray.sources.source import BadRow, Row

LONG = "The rest says much more about what this does, at such a length that it can be found."
MODULE = f'''"""Package that must never run."""
raise RuntimeError("imported")

def twice():
    """Give back the first of two.

    {LONG}
    """

def twice():
    """Short."""

class Thing:
    r"""A thing \\d that stands for many others. {LONG}"""
    async def method(self):
        "Do it."
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "raising_package"
    (folder / "inner").mkdir(parents=True)
    (folder / "tests").mkdir()
    (folder / "__init__.py").write_text(MODULE)
    (folder / "inner" / "bad.py").write_text("def (:\n")
    (folder / "inner" / "good.py").write_text('"""Inner."""')
    (folder / "tests" / "test_x.py").write_text('"""Left out."""')
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def test_a_package_is_read_and_never_imported(package, caplog):
    names = [each.name for each in read_docstrings("raising_package")]
    prefix = "raising_package"
    assert names == [
        prefix,
        f"{prefix}.twice",
        f"{prefix}.twice",
        f"{prefix}.Thing",
        f"{prefix}.Thing.method",
        f"{prefix}.inner.good",
    ]
    assert "1 files of raising_package do not parse" in caplog.text
    assert prefix not in sys.modules


def test_rows_queries_and_qrels(package):
    source = PythonDocsSource("raising_package")
    source.check()
    rows = list(source.rows())
    bad = [row for row in rows if isinstance(row, BadRow)]
    good = {row.doc_id: row for row in rows if isinstance(row, Row)}
    assert bad == [BadRow(str(package / "inner" / "bad.py"), "not_python")]
    assert list(good) == [
        f"raising_package{suffix}" for suffix in ("", ".twice", ".twice#2", ".Thing", ".Thing.method", ".inner.good")
    ]
    assert good["raising_package.twice"].text == LONG
    assert good["raising_package.twice"].place == f"{package / '__init__.py'}:4"
    assert good["raising_package.twice#2"][2:4] == ("raising_package.twice", "Short.\n")
    assert source.fraction_read == 1.0
    for each in (source, PythonDocsSource("raising_package")):
        assert [(query.query_id, query.text) for query in each.queries()] == [
            ("q:raising_package.twice", "Give back the first of two."),
            ("q:raising_package.Thing", "A thing \\d that stands for many others."),
        ]
        assert next(each.qrels()["test"]) == Qrel("q:raising_package.twice", "raising_package.twice", 1)


def test_fingerprint_follows_the_content(package):
    before = PythonDocsSource("raising_package").fingerprint()
    assert PythonDocsSource("raising_package,raising_package").fingerprint() == before
    (package / "inner" / "good.py").write_text('"""Other."""')
    assert PythonDocsSource("raising_package").fingerprint() != before


def test_a_module_of_one_file(tmp_path, monkeypatch):
    (tmp_path / "lone_module.py").write_text('"""Lone."""\ndef f():\n    "F."')
    monkeypatch.syspath_prepend(str(tmp_path))
    assert [each.name for each in read_docstrings("lone_module")] == ["lone_module", "lone_module.f"]


@pytest.mark.parametrize("name", ["no_such_package_x", "sys", "a.b", "", " , ", "../x"])
def test_what_is_not_a_package_is_refused(name):
    with pytest.raises(InputError, match="package"):
        PythonDocsSource(name)


def test_a_package_without_docstrings_is_refused(tmp_path, monkeypatch):
    (tmp_path / "bare_module.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(CorpusError, match="have no docstrings"):
        PythonDocsSource("bare_module").check()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("One. Two.", ("One.", "Two.")),
        ("One\n\nTwo.", ("One", "Two.")),
        ("One\n  goes on? Two", ("One goes on?", "Two")),
        ("One", ("One", "")),
        ("", ("", "")),
    ],
)
def test_split_summary(text, parts):
    assert split_summary(text) == parts


def test_a_query_needs_words_and_something_to_find():
    assert makes_query(Docstring(name="n", summary="a b c d", rest="x" * 60))
    assert not makes_query(Docstring(name="n", summary="a b c", rest="x" * 60))
    assert not makes_query(Docstring(name="n", summary="a b c d", rest="x" * 59))


def test_the_standard_library_has_no_test_packages():
    assert not any({"test", "tests", "site-packages"} & set(path.parts[-3:]) for path in package_files("stdlib"))
