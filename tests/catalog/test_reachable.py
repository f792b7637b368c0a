"""Models that can be had, cannot, or are gated, seen without fetching weights."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from huggingface_hub import errors

from readapt_ray.catalog import shapes
from readapt_ray.catalog.reachable import check_reachable
from readapt_ray.errors import ModelError
from tests import factories, object_store

WEIGHTS = {"model.safetensors": 14_000, "pytorch_model.bin": 14_000, "tokenizer.json": 10, "config.json": 5, "x.py": 3}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub with me/whole, me/adapter (of me/whole), me/empty and me/gated; what is fetched of it."""
    fetched: list[str] = []

    def snapshot_download(hub_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        if hub_id == "me/gated":
            response = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co"))
            raise errors.GatedRepoError("Access to model me/gated is restricted", response=response)
        fetched.extend(allow_patterns)
        folder = tmp_path / hub_id
        folder.mkdir(parents=True, exist_ok=True)
        if hub_id == "me/whole":
            (folder / "config.json").write_text("{}")
        if hub_id == "me/adapter":
            (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "me/whole"}))
        return str(folder)

    def model_info(self: Any, hub_id: str, **_: Any) -> Any:
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name, size=size) for name, size in WEIGHTS.items()])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    return fetched


def test_the_bytes_to_fetch_are_those_of_the_model_and_of_an_adapters_base(hub: list[str], tmp_path: Path) -> None:
    assert check_reachable("me/whole") == 14_010  # config.json was fetched
    assert check_reachable("me/adapter") == 14_010 + 14_015
    assert set(hub) == {"config.json", "adapter_config.json"}
    (tmp_path / "me/whole/model.safetensors").touch()
    assert check_reachable("me/whole") == 0


def test_a_model_of_which_only_some_shards_are_fetched_counts_the_others(hub: list[str], tmp_path: Path) -> None:
    assert check_reachable("me/whole") == 14_010
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model.safetensors"}}
    (tmp_path / "me/whole/model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "me/whole/model-1.safetensors").touch()
    assert check_reachable("me/whole") == 14_010
    (tmp_path / "me/whole/model.safetensors").touch()
    assert check_reachable("me/whole") == 0


def test_the_base_of_an_adapter_of_ones_own_is_checked_and_not_fetched(
    hub: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = factories.lora_adapter(tmp_path / "adapter", factories.tiny_decoder(tmp_path / "base"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    for base, expected in (("me/whole", 14_010), (str(tmp_path / "base"), 0)):
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
        assert check_reachable(str(adapter)) == expected
    with object_store.running() as store:
        config |= {"base_model_name_or_path": "me/gated"}
        body = json.dumps(config).encode()
        store.client.put_object(Bucket=object_store.BUCKET, Key="adapter/adapter_config.json", Body=body)
        with pytest.raises(ModelError, match="cannot fetch 'me/gated'"):
            check_reachable(f"s3://{object_store.BUCKET}/adapter")
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "me/whole"}))
    hub.clear()
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda hub_id, name: str(tmp_path / "base" / name))
    of_base = shapes.model_shape(str(tmp_path / "base"))
    assert shapes.model_shape(str(adapter)) == replace(of_base, name=str(adapter))
    assert not hub


def test_what_cannot_be_had_is_said(hub: list[str]) -> None:
    with pytest.raises(ModelError, match=r"cannot fetch 'me/gated' .* set HF_TOKEN for a gated model"):
        check_reachable("me/gated")
    with pytest.raises(ModelError, match=r"'me/empty' is not a model: the hub has neither config\.json"):
        check_reachable("me/empty")
    with pytest.raises(ModelError, match="not in the catalog"):
        check_reachable("nothing")


def test_models_that_are_here(tmp_path: Path) -> None:
    assert check_reachable(str(factories.tiny_decoder(tmp_path / "model"))) == 0
    assert check_reachable("quickstart-retriever") == 0


def test_a_model_in_an_object_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from readapt_ray.catalog.models import open_model

    monkeypatch.setenv("READAPT_CACHE", str(tmp_path / "cache"))
    folder = factories.tiny_decoder(tmp_path / "model")
    with object_store.running() as store:
        for file in folder.iterdir():
            store.client.upload_file(str(file), object_store.BUCKET, f"model/{file.name}")
        uri = f"s3://{object_store.BUCKET}/model"
        assert check_reachable(uri) >= (folder / "model.safetensors").stat().st_size
        assert not (tmp_path / "cache").exists()
        open_model(uri)
        assert check_reachable(uri) == 0
        store.client.put_object(Bucket=object_store.BUCKET, Key="model/building.json", Body=b"{}")
        with pytest.raises(ModelError, match="is unfinished"):
            check_reachable(uri)
        store.client.put_object(Bucket=object_store.BUCKET, Key="other/notes.txt", Body=b"")
        with pytest.raises(ModelError, match=r"has neither config\.json"):
            check_reachable(f"s3://{object_store.BUCKET}/other")
        with pytest.raises(ModelError, match="is empty or does not exist"):
            check_reachable(f"s3://{object_store.BUCKET}/none")


def test_a_plan_reads_the_encoding_of_a_model_in_a_store_without_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from readapt_ray.planner.corpus import encoding_of

    monkeypatch.setenv("READAPT_CACHE", str(tmp_path / "cache"))
    folder = factories.write_contract(factories.tiny_encoder(tmp_path / "model"), pooling="cls")
    with object_store.running() as store:
        for file in folder.iterdir():
            store.client.upload_file(str(file), object_store.BUCKET, f"planned/{file.name}")
        assert encoding_of(f"s3://{object_store.BUCKET}/planned").pooling == "cls"
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_folder_that_is_no_model_leaves_a_catalog_name_to_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The root of a run may have the name of its retriever; nothing is fetched to find out."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "e5-mistral").mkdir()
    monkeypatch.setattr("readapt_ray.catalog.models.open_model", lambda name: pytest.fail(f"{name} was fetched"))
    seen = tmp_path / "seen"
    seen.mkdir()
    (seen / "config.json").write_text("{}")
    monkeypatch.setattr("readapt_ray.catalog.fetching.check_on_hub", lambda plain, target, revision: (seen, 7))
    assert check_reachable("e5-mistral") == 7
