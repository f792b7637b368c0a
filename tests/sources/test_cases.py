"""Corpora as people have them, on which ingest once failed: what each gives now."""

import pyarrow.parquet as pq
import pytest

from readapt_ray.errors import CorpusError
from readapt_ray.stages.ingest import IngestConfig, ingest
from tests.data import case

SEA = [("1", "Tides"), ("2", "Salt"), ("3", "Wind"), ("4", "Café")]
UNTITLED = [(doc_id, "") for doc_id, _ in SEA]
CASES = {
    "csv/c.csv": [*SEA, ("9", "Quoted, with comma")],
    "front-matter/docs": [("index.md", "Front")],
    "hf-save-to-disk/hf_ds": [("1", "a"), ("2", ""), ("3", "c")],
    "hf-save-to-disk/hf_dd": [("1", "a"), ("2", ""), ("3", "c")],
    "html-pdf-ignored/web": [("a.html", "Tides")],
    "html-pdf-ignored/webmix": [("a.html", "a"), ("c.md", "Moon")],
    "nan-title/nan.jsonl": [("1", "Tides"), ("2", ""), ("3", "Wind"), ("4", "")],
    "nan-title/int_title.jsonl": [("a", ""), ("b", "1984"), ("7", "t"), ("8", "")],
    "pyserini-columns/pyserini.jsonl": UNTITLED,
    "pyserini-columns/docid_text.jsonl": SEA,
    "pyserini-columns/id_content.jsonl": UNTITLED,
    "pyserini-columns/pid.parquet": UNTITLED[:3],
    "quoted-tsv/p.tsv": [("1", "Aaron"), ("2", "Moses")],
    "quoted-tsv/stray.tsv": [("1", ""), ("2", ""), ("3", "")],
    "title-without-text/empty.jsonl": [("a", "Tides and the Moon"), ("b", "x")],
}
"""The doc_id and title of each passage."""


LEFT_OUT = {
    "hf-save-to-disk/hf_dd": {"duplicate_id": 3},
    "html-pdf-ignored/web": {"not_pdf": 1},
    "html-pdf-ignored/webmix": {"not_pdf": 1},
}
TEXTS = {
    "front-matter/docs": '# Welcome\nThis is the front page.\n## Install\nRun pip install.\n```python\nprint("hi")\n```',
    "quoted-tsv/p.tsv": 'Aaron "the" priest',
    "html-pdf-ignored/web": "The moon raises tides.",
    "title-without-text/empty.jsonl": "",
}
"""The text of the first passage."""


@pytest.mark.parametrize("name", CASES)
def test_every_passage_is_taken_with_its_title_and_what_is_not_is_counted(name, tmp_path):
    artifact = ingest(IngestConfig(source=str(case(name)), output=str(tmp_path / "corpus"), deduplicate="none"))
    rows = pq.read_table(tmp_path / "corpus/passages").to_pylist()
    assert [(row["doc_id"], row["title"]) for row in rows] == CASES[name]
    assert artifact.manifest.details["bad_rows"].get("by_reason", {}) == LEFT_OUT.get(name, {})
    assert TEXTS.get(name) in (None, rows[0]["text"])


def test_data_sets_beside_each_other_are_refused_with_their_list(tmp_path):
    with pytest.raises(CorpusError, match="as-corpus, as-queries, bn-corpus, bn-queries; choose one"):
        ingest(IngestConfig(source=str(case("folder-per-language/lang")), output=str(tmp_path / "corpus")))
