"""`ra.Retriever` filters by the columns that were kept, as the server does; without Ray."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import readapt_ray as ra
from tests.factories import ingest_artifact, small_corpus
from tests.serving.conftest import World


@pytest.fixture(scope="module")
def places(world: World, tmp_path_factory):
    """The small corpus with a year and tags per passage."""
    corpus = tmp_path_factory.mktemp("kept") / "corpus"
    ingest_artifact(corpus, small_corpus(40))
    [file] = (corpus / "passages").iterdir()
    rows = pq.read_table(file)
    numbers = [int(doc_id[1:]) for doc_id in rows["doc_id"].to_pylist()]
    rows = rows.append_column("year", pa.array([2000 + number if number % 4 else None for number in numbers]))
    rows = rows.append_column("tags", pa.array([["even" if number % 2 == 0 else "odd"] for number in numbers]))
    pq.write_table(rows, file)
    return world.version() | {"corpus": str(corpus)}


def test_only_passages_that_pass_are_searched(world: World, places):
    retriever = ra.Retriever(**places)
    plain = retriever.search_all(["array shape", "lock a thread"], top_k=40)
    for wanted, passes in (
        ({"year": {"gte": 2010, "lt": 2030}}, lambda number: number % 4 and 10 <= number < 30),
        ({"year": [2001, 2002], "tags": "odd"}, lambda number: number == 1),
        ({"tags": ["odd", "even"]}, lambda number: True),
        ({"year": 1900}, lambda number: False),
    ):
        found = retriever.search_all(["array shape", "lock a thread"], top_k=5, filter=wanted)
        for own, everything in zip(found, plain, strict=True):
            due = [hit for hit in everything if passes(int(hit.doc_id[1:]))][:5]
            assert [hit.doc_id for hit in own] == [hit.doc_id for hit in due]
            np.testing.assert_allclose([hit.score for hit in own], [hit.score for hit in due], atol=1e-6)
        [first] = retriever.search_all(["array shape"], top_k=5, filter=wanted)
        assert first == retriever.search("array shape", top_k=5, filter=wanted)
    assert [len(own) for own in retriever.search_all(["array"], 5)] == [5]


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"yaer": 1}, r"no column 'yaer' to filter by; the columns of this corpus are: 'year', 'tags'"),
        ({"year": "late"}, r"the column 'year' holds int64, and 'late' is no such value"),
        ({"year": {"least": 3}}, r"ra\.Retriever\.search_all: filter = .*'least'"),
        ({"year": None}, r"ra\.Retriever\.search_all: filter = "),
        ({}, r"ra\.Retriever\.search_all: filter = "),
        ("year=3", r"filter = 'year=3': must be a dict"),
    ],
)
def test_a_filter_that_cannot_be_is_refused(places, wanted, said):
    with pytest.raises(ra.InputError, match=said):
        ra.Retriever(**places).search("array", filter=wanted)


def test_a_filter_needs_the_corpus(places):
    places = {name: place for name, place in places.items() if name != "corpus"}
    with pytest.raises(ra.InputError, match=r"filter needs the corpus.*give corpus to ra\.Retriever"):
        ra.Retriever(**places).search("array", filter={"year": 2001})


def test_documents_that_were_split_are_found_by_their_passages_that_pass(places):
    retriever = ra.Retriever(**places)
    retriever._is_split = True
    hits = retriever.search("array shape", top_k=40, filter={"tags": "odd"})
    assert len(hits) == 20 and {int(hit.doc_id[1:]) % 2 for hit in hits} == {1}
    assert all(hit.passage_id for hit in hits)
