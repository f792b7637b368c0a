"""A folder here that is called like a row of the catalog is that folder, wherever a model or corpus is named."""

from pathlib import Path

import pytest
import torch

from readapt_ray.catalog import models, retrievers
from readapt_ray.catalog.shapes import model_shape
from readapt_ray.cluster import on_worker
from readapt_ray.evaluation.measure_options import drops_self_hits
from readapt_ray.planner import corpus
from readapt_ray.serving.app import version_spec
from readapt_ray.serving.options import VersionConfig
from tests import factories

NAMES = ["m3e-base", "moka-ai/m3e-base"]


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An encoder of our own in a folder below the current one, called like a row of the catalog (which pools by mean)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("READAPT_CACHE", str(tmp_path / "cache"))
    factories.write_contract(factories.tiny_encoder(tmp_path / request.param), pooling="cls", max_passage_tokens=77)
    return str(request.param)


def test_it_has_no_row(name: str, tmp_path: Path) -> None:
    assert models.find_row(name) is None
    assert models.base_name(name) == name
    (tmp_path / name / "config.json").unlink()  # a folder of another kind, such as the root of a run
    assert models.find_row("m3e-base") is (retrievers.retriever("m3e-base"))


def test_the_plan_counts_its_own_size_and_encoding(name: str) -> None:
    assert (corpus.encoding_of(name).pooling, corpus.encoding_of(name).max_passage_tokens) == ("cls", 77)
    assert model_shape(name).num_layers < 12


def test_a_worker_is_told_its_path(name: str, tmp_path: Path) -> None:
    model = models.open_model(name)
    assert on_worker.model_name(model) == str(tmp_path / name)
    torch.save(factories.read_tensors(model.folder), model.folder / "pytorch_model.bin")
    (model.folder / "model.safetensors").unlink()
    converted = models.open_model(name)
    assert converted.folder != model.folder
    assert on_worker.model_name(converted) == str(tmp_path / name)


def test_a_server_is_told_its_path(name: str, tmp_path: Path) -> None:
    assert version_spec("default", VersionConfig(retriever=name)).retriever == str(tmp_path / name)
    (tmp_path / "e5-mistral").mkdir()  # not a model
    assert version_spec("default", VersionConfig(retriever="e5-mistral")).retriever == "e5-mistral"


def test_a_snapshot_folder_of_our_own_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "snapshots").mkdir()
    monkeypatch.chdir(tmp_path / "snapshots")
    factories.tiny_encoder(tmp_path / "snapshots/m3e-base")
    assert models.open_model("m3e-base").pinned_name == "m3e-base"


def test_the_queries_of_a_corpus_in_a_folder_may_find_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert drops_self_hits("arguana")
    (tmp_path / "arguana").mkdir()
    assert not drops_self_hits("arguana")
    assert not drops_self_hits("s3://bucket/corpus.jsonl")  # no store is asked
