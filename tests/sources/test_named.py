import importlib.util
from typing import NamedTuple

import pytest

from readapt_ray.errors import CorpusError, InputError
from readapt_ray.records import Qrel, Query
from readapt_ray.sources.columns import ColumnChoice
from readapt_ray.sources.named import NamedSource
from readapt_ray.sources.read_options import ReadOptions
from readapt_ray.sources.source import BadRow, Row


class Doc(NamedTuple):
    doc_id: str
    title: str
    body: str


class PlainDoc(NamedTuple):
    doc_id: str
    abstract: str

    def default_text(self):
        return self.abstract


class DocQuery(NamedTuple):
    query_id: str
    text: str


class DocQrel(NamedTuple):
    query_id: str
    doc_id: str
    relevance: int


class Made:
    """A collection with the methods of an ir_datasets one, and no download."""

    docs = (Doc("d1", "t", "x"), Doc("d2", "", "y"))
    error = None

    def has_docs(self):
        return self.docs is not None

    def has_queries(self):
        return True

    def has_qrels(self):
        return True

    def docs_iter(self):
        if self.error:
            raise self.error
        return iter(self.docs)

    def queries_iter(self):
        return iter([DocQuery("q1", "ask "), DocQuery("q2", "")])

    def qrels_iter(self):
        return iter([DocQrel("q1", "d2", 1)])

    def metadata(self):
        return {"docs": {"count": 2}}


@pytest.fixture
def made(monkeypatch):
    import ir_datasets

    dataset = Made()
    monkeypatch.setitem(ir_datasets.registry._registered, "made/dev/small", dataset)
    return dataset


def test_a_collection_becomes_rows_queries_and_qrels(made):
    source = NamedSource("made/dev/small", ReadOptions())
    source.check()
    assert list(source.rows()) == [
        Row("made/dev/small:1", "d1", "t", "x"),
        Row("made/dev/small:2", "d2", "", "y"),
    ]
    assert source.fraction_read == 1.0
    assert list(source.queries()) == [Query("q1", "ask"), BadRow("made/dev/small query 2", "empty_text")]
    assert {split: list(qrels) for split, qrels in source.qrels().items()} == {"dev": [Qrel("q1", "d2", 1)]}
    assert source.has_qrels


def test_a_judgement_that_a_collection_repeats_is_taken_once_and_a_conflict_is_a_bad_row(made, monkeypatch):
    judged = [DocQrel("q1", "d2", 1), DocQrel("q1", "d2", 1), DocQrel("q1", "d2", 0), DocQrel("q1", "d1", 0)]
    monkeypatch.setattr(made, "qrels_iter", lambda: iter(judged), raising=False)
    (found,) = NamedSource("made/dev/small", ReadOptions()).qrels().values()
    conflict = BadRow("made/dev/small qrel 3", "conflicting_judgement")
    assert list(found) == [Qrel("q1", "d2", 1), conflict, Qrel("q1", "d1", 0)]


def test_a_collection_with_other_fields_gives_its_default_text(made):
    made.docs = (PlainDoc("d1", "x"),)
    assert list(NamedSource("made/dev/small", ReadOptions()).rows()) == [Row("made/dev/small:1", "d1", None, "x")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"docs": None}, "has no documents; name a collection"),
        ({"docs": ()}, "it is empty"),
        ({"error": OSError("no route")}, "cannot be read: no route; check the network"),
    ],
)
def test_what_cannot_be_read_is_refused(made, changes, message):
    for name, value in changes.items():
        setattr(made, name, value)
    with pytest.raises(CorpusError, match=message):
        NamedSource("made/dev/small", ReadOptions()).check()


def test_an_unknown_name_is_refused():
    with pytest.raises(CorpusError, match="no collection 'no/such'"):
        NamedSource("no/such", ReadOptions())


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'readapt-ray\[datasets\]'"):
        NamedSource("beir/nfcorpus/test", ReadOptions())


def test_columns_of_a_collection_are_chosen_and_kept(made):
    made.docs = (Doc("d1", "t", "x"), Doc("d2", "", "y"))
    source = NamedSource(
        "made/dev/small", ReadOptions(columns=ColumnChoice.parse(["text=title+body"], ["body:string"]))
    )
    source.check()
    assert [(row.text, row.kept) for row in source.rows()] == [("t\nx", ("x",)), ("y", ("y",))]
    with pytest.raises(
        CorpusError, match="ir_datasets:made/dev/small has no column 'abstract'; its columns are doc_id, title, body"
    ):
        NamedSource("made/dev/small", ReadOptions(columns=ColumnChoice.parse(["text=abstract"], []))).check()


@pytest.mark.parametrize("what", ["queries_iter", "qrels_iter"])
def test_errors_of_queries_and_qrels_are_caught_as_those_of_documents(made, monkeypatch, what):
    def failing():
        raise RuntimeError("404 for queries.tsv")

    monkeypatch.setattr(made, what, failing, raising=False)
    source = NamedSource("made/dev/small", ReadOptions())
    with pytest.raises(
        CorpusError, match=r"ir_datasets:made/dev/small cannot be read: 404 for queries.tsv; check the network"
    ):
        list(source.queries() if what == "queries_iter" else source.qrels()["dev"])
