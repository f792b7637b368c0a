"""A tiny retriever and two tiny corpora in BEIR's layout."""

import json
from pathlib import Path

import pytest

from tests import factories


@pytest.fixture(scope="package")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base` (with a head of its own), `retriever`, and `data/nfcorpus` and `data/scifact`."""
    folder = tmp_path_factory.mktemp("paper")
    base = factories.tiny_decoder(folder / "base", tie_word_embeddings=False)
    factories.write_contract(factories.full_retriever(folder / "retriever", base))
    for seed, name in enumerate(("nfcorpus", "scifact")):
        passages = factories.small_corpus(60, seed=seed)
        queries, qrels = factories.small_queries(passages, 12)
        beir = folder / "data" / name
        (beir / "qrels").mkdir(parents=True)
        (beir / "corpus.jsonl").write_text(
            "".join(json.dumps({"_id": p.doc_id, "title": p.title, "text": p.text}) + "\n" for p in passages)
        )
        (beir / "queries.jsonl").write_text(
            "".join(json.dumps({"_id": q.query_id, "text": q.text}) + "\n" for q in queries)
        )
        lines = ["query-id\tcorpus-id\tscore", *(f"{q.query_id}\t{q.doc_id}\t{q.relevance}" for q in qrels)]
        (beir / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    return folder
