import json
from importlib.resources import files

import pytest

from readapt_ray.catalog.corpora import CORPORA, corpus, find_corpus
from readapt_ray.errors import CorpusError
from readapt_ray.sources.judgements import keep_judged, read_qrels, read_queries
from tests.data import collection


def test_the_papers_fourteen():
    assert len({row.name for row in CORPORA}) == len({row.ir_datasets_id for row in CORPORA}) == 14
    assert [row.name for row in CORPORA if row.drops_self_hits] == ["quora", "arguana"]
    assert [row.name for row in CORPORA if row.split == "dev"] == ["msmarco"]
    assert not any(row.task.endswith(".") or "  " in row.task for row in CORPORA)
    assert {row.measure for row in CORPORA} == {"nDCG@10"}


@pytest.mark.parametrize("row", CORPORA, ids=lambda row: row.name)
def test_judged_queries_are_those_of_the_archive(row):
    folder = collection("beir_topics_qrels") / row.name
    qrels = read_qrels(str(folder / "qrels" / f"{row.split}.tsv"))
    queries = read_queries(str(folder / "queries.jsonl"))
    assert len(keep_judged(queries, qrels)) == row.num_judged_queries
    assert len({qrel.query_id for qrel in qrels}) == row.num_judged_queries


def test_sizes_and_ids_are_those_of_ir_datasets():
    known = json.loads((files("ir_datasets") / "etc" / "metadata.json").read_text())
    for row in CORPORA:
        assert known[row.ir_datasets_id]["queries"]["count"] == row.num_judged_queries
        assert known[f"beir/{row.name}"]["docs"]["count"] == row.num_passages


@pytest.mark.parametrize("name", ["nfcorpus", "NFCorpus", "BeIR/nfcorpus"])
def test_a_corpus_has_three_names(name):
    assert corpus(name).num_passages == 3633


def test_an_unknown_corpus_is_refused_with_the_names_that_there_are():
    assert find_corpus("nosuch") is None
    with pytest.raises(CorpusError, match=r"no corpus 'nosuch'.*nfcorpus"):
        corpus("nosuch")
