"""Artifacts in a notebook: short to print, their rows as tables."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import readapt_ray as ra
from readapt_ray.dead_rows import write_row_numbers
from readapt_ray.evaluation.runs import write_run
from readapt_ray.records import ScoredDoc
from readapt_ray.storage import Location
from tests import factories


@pytest.fixture
def corpus(tmp_path: Path) -> ra.Artifact:
    factories.ingest_artifact(tmp_path / "<corpus>", factories.small_corpus(30))
    return ra.open_artifact(tmp_path / "<corpus>", "ingest")


def made(folder: Path, stage: str) -> ra.Artifact:
    """The artifact of a stage whose files lie in a folder."""
    manifest = {
        "stage": stage,
        "fingerprint": "f",
        "config": {},
        "inputs": {},
        "counts": {"num_vectors": 1, "num_bytes": 2},
        "details": {},
        "seconds": 200.0,
        "created": "2026-11-28T15:00:00+00:00",
        "versions": {},
    }
    file = folder / "manifest.json" if folder.is_dir() else Path(f"{folder}.manifest.json")
    file.write_text(json.dumps(manifest))
    return ra.open_artifact(folder)


def test_an_artifact_prints_as_three_lines(corpus: ra.Artifact, tmp_path: Path) -> None:
    head, place, when = repr(corpus).split("\n")
    assert head.startswith("ingest: 30 passages")
    assert place == str(tmp_path / "<corpus>") == str(corpus.path) == corpus.uri
    assert corpus.fingerprint in when
    assert "&lt;corpus&gt;" in corpus._repr_html_()
    (tmp_path / "a").mkdir()
    assert repr(made(tmp_path / "a", "index")).splitlines() == [
        "index: 1 vector, 2 bytes",
        str(tmp_path / "a"),
        "made 2026-11-28 15:00 UTC in 3 min 20 s, fingerprint f",
    ]


def test_the_rows_of_a_corpus_are_a_table(corpus: ra.Artifact) -> None:
    passages = factories.small_corpus(30)
    assert corpus.to_arrow()["doc_id"].to_pylist() == [each.doc_id for each in passages]
    assert list(corpus.to_pandas()["text"]) == [each.text for each in passages]


def test_logs_runs_measures_ids_and_grids_are_tables(tmp_path: Path) -> None:
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]

    def rows_of(stage: str, name: str, write: Any) -> list[Any]:
        file = tmp_path / stage / name
        file.parent.mkdir(parents=True)
        write(file)
        return made(tmp_path / stage, stage).to_arrow().to_pylist()

    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    assert rows_of("train", "metrics.jsonl", lambda file: file.write_text(lines)) == rows
    assert rows_of("tune", "tune.json", lambda file: file.write_text(json.dumps({"grid": rows}))) == rows
    table = pa.Table.from_pylist(rows)
    for stage, name in (
        ("synthesize", "queries/part-00000.parquet"),
        ("evaluate", "per_query.parquet"),
        ("pack", "blocks/part-0.parquet"),
        ("embed", "vectors/part-0.parquet"),
    ):
        assert rows_of(stage, name, lambda file: pq.write_table(table, file)) == rows
    write_run(str(tmp_path / "a.trec"), [ScoredDoc("q", "d", 0.5)], tag="a")
    run = made(tmp_path / "a.trec", "search")
    assert run.to_arrow().to_pylist() == [{"query_id": "q", "doc_id": "d", "score": 0.5}]


def test_the_rows_of_an_index_are_the_ids_that_searches_find(tmp_path: Path) -> None:
    shards = tmp_path / "index" / "shards"
    shards.mkdir(parents=True)
    pq.write_table(pa.table({"doc_id": ["a", "b", "c"], "content_hash": [b"1", b"2", b"3"]}), shards / "0.ids.parquet")
    pq.write_table(pa.table({"doc_id": ["b", None], "content_hash": [b"4", b"5"]}), shards / "1.ids.parquet")
    write_row_numbers(Location(str(shards / "0.dead")), np.array([1]))
    found = made(tmp_path / "index", "index").to_arrow()
    assert found["doc_id"].to_pylist() == ["a", "c", "b"]
    assert found["content_hash"].to_pylist() == [b"1", b"3", b"4"]


def test_a_model_has_no_rows_and_a_store_no_path(tmp_path: Path, corpus: ra.Artifact) -> None:
    with pytest.raises(ra.InputError, match=r"is a model, which has no rows; encode with ra\.Encoder"):
        made(tmp_path, "merge").to_arrow()
    for stage in ("export", "drift", "bridge"):
        (tmp_path / stage).mkdir()
        with pytest.raises(ra.InputError, match=f"the output of {stage} has no rows of its own; read the files in"):
            made(tmp_path / stage, stage).to_pandas()
    stored = ra.Artifact(Location("s3://bucket/run?region=us-east-1"), corpus.manifest)
    with pytest.raises(ra.InputError, match=r"is no path on this machine; use \.uri"):
        _ = stored.path


def test_a_folder_opens_as_what_its_manifest_says_or_as_what_is_asked_for(corpus: ra.Artifact) -> None:
    assert ra.open_artifact(corpus.path).manifest.stage == "ingest"
    with pytest.raises(ra.ReadaptError, match="is the output of 'ingest'; give the output folder of `readapt embed`"):
        ra.open_artifact(corpus.path, "embed")
