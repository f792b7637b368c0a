"""Which passages pack takes, and what it refuses; the blocks themselves are in tests/training/test_packing.py."""

import importlib
import json
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from readapt_ray.artifacts import Artifact
from readapt_ray.cluster import placement
from readapt_ray.errors import CorpusError, CorruptFileError, ModelError, PlacementError
from readapt_ray.stages.pack import PackConfig, pack
from tests import factories

stage = importlib.import_module("readapt_ray.stages.pack")

pytestmark = pytest.mark.usefixtures("ray_session")
PASSAGES = [each._replace(doc_id=str(number)) for number, each in enumerate(factories.small_corpus(24))]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return factories.tiny_decoder(tmp_path_factory.mktemp("pack") / "base")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    factories.ingest_artifact(tmp_path / "corpus", PASSAGES, num_files=3)
    return tmp_path / "corpus"


def packed(base: Path, corpus: Path, **options: Any) -> Artifact:
    output = f"{corpus}-blocks"
    return pack(PackConfig(pretrained=str(base), corpus=str(corpus), output=output, block_tokens=64, **options))


def test_passages_are_left_out_by_whole_numbers_and_by_qrels(base: Path, corpus: Path, caplog: Any) -> None:
    pq.write_table(pa.table({"doc_id": [3, 7, 99]}), corpus.parent / "some.parquet")
    (corpus.parent / "qrels.txt").write_text("q1 0 3 1\nq1 0 8 0\nq2 0 9 1\n")
    artifact = packed(base, corpus, exclude=str(corpus.parent / "some.parquet"), only=str(corpus.parent / "qrels.txt"))
    files = pq.read_table(corpus / "passages")["doc_id"].to_pylist()
    blocks = pq.read_table(str(artifact.location.local_path / "blocks"))
    numbers = blocks["passage_numbers"].combine_chunks().flatten().to_pylist()
    assert sorted(files[number] for number in numbers) == ["8", "9"]
    assert artifact.manifest.counts["num_withheld_passages"] == 22
    assert "pack: 1 of the 3 doc_ids of exclude are not in the corpus" in caplog.messages
    assert not any("doc_ids of only" in each for each in caplog.messages)


@pytest.mark.parametrize("name", ["exclude", "only"])
def test_a_list_that_names_no_passage_is_refused(base: Path, corpus: Path, name: str) -> None:
    (corpus.parent / "some.txt").write_text("d3\nd7\n")
    with pytest.raises(CorpusError, match=rf"{name} lists 2 doc_ids, and .*corpus' has none of them; .*--{name} out"):
        packed(base, corpus, **{name: str(corpus.parent / "some.txt")})


def test_lists_that_leave_nothing_are_refused(base: Path, corpus: Path) -> None:
    (corpus.parent / "some.txt").write_text("3\n7\n")
    with pytest.raises(CorpusError, match="leave none of the 24 passages"):
        packed(base, corpus, exclude=str(corpus.parent / "some.txt"), only=str(corpus.parent / "some.txt"))


def test_a_corpus_that_lost_a_file_is_refused(base: Path, corpus: Path) -> None:
    (corpus / "passages" / "part-00001.parquet").unlink()
    with pytest.raises(CorruptFileError, match=r"holds 16 passages in 2 files, but its manifest counts 24; copy"):
        packed(base, corpus)
    factories.ingest_artifact(corpus.parent / "other", PASSAGES)
    (corpus.parent / "other" / "passages" / "part-00000.parquet").unlink()
    with pytest.raises(CorruptFileError, match="holds 0 passages in 0 files"):
        packed(base, corpus.parent / "other")


def test_it_waits_for_others_as_long_as_it_takes(base: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.data import Dataset

    limits = []

    def tell(self: Dataset) -> Any:
        limits.append(self.context.execution_no_progress_timeout_s)
        return iter_rows(self)

    iter_rows = Dataset.iter_rows
    monkeypatch.setattr(Dataset, "iter_rows", tell)
    packed(base, corpus)
    assert limits == [-1]

    def full(num_workers: int, each: dict[str, float], *, who: str) -> None:
        raise PlacementError(f"{num_workers} {who} of {each} cannot be placed")

    monkeypatch.setattr(placement, "check_placement", full)
    with pytest.raises(PlacementError, match=r"1 tasks of \{'CPU': 1\}"):
        packed(base, corpus, mode="packed", overwrite=True)


def test_blocks_are_no_longer_than_the_model_has_positions_unless_asked(base: Path, corpus: Path) -> None:
    options = {"pretrained": str(base), "corpus": str(corpus), "output": f"{corpus}-blocks"}
    positions = json.loads((base / "config.json").read_text())["max_position_embeddings"]
    assert positions < PackConfig(**options).block_tokens
    assert pack(PackConfig(**options)).manifest.config["block_tokens"] == positions
    with pytest.raises(ModelError, match=f"block_tokens = 1024 is more than the {positions} positions"):
        pack(PackConfig(**options, block_tokens=1024))


def test_a_tokenizer_is_loaded_once_per_process(base: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    real = stage.models.open_model
    monkeypatch.setattr(
        stage.models, "open_model", lambda name, **options: opened.append(name) or real(name, **options)
    )
    job = {"pretrained": str(base), "tokenizer": "a", "mode": "packed", "block_tokens": 32}
    file = str(corpus / "passages" / "part-00000.parquet")
    for index in range(2):
        part = {"index": index, "file": file, "first_number": 0}
        assert stage._pack_file(part, str(corpus.parent / "blocks"), job, stage._Choice({}, frozenset(), None))[
            "num_blocks"
        ]
    assert opened == [str(base)]
    replaced = {"index": 2, "file": file, "first_number": 0}
    stage._pack_file(
        replaced, str(corpus.parent / "blocks"), job | {"tokenizer": "b"}, stage._Choice({}, frozenset(), None)
    )
    assert opened == [str(base)] * 2


def test_footers_are_read_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = factories.ingest_artifact(tmp_path / "corpus", factories.small_corpus(8), num_files=4)
    all_are_open = threading.Barrier(4, timeout=120)
    real = pq.ParquetFile

    def opened(stream: Any) -> pq.ParquetFile:
        all_are_open.wait()
        return real(stream)

    monkeypatch.setattr(stage.pq, "ParquetFile", opened)
    parts, num_passages = stage._parts(artifact, {})
    assert ([part["first_number"] for part in parts], num_passages) == ([0, 2, 4, 6], 8)
