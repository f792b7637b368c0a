"""Pickled weights become safetensors once, and nothing in a pickle runs."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from readapt_ray import storage
from readapt_ray.catalog import converted_weights, models
from readapt_ray.errors import ModelError
from readapt_ray.storage import Location
from tests import factories


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("READAPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _as_bin(folder: Path, *, shards: int = 1) -> dict[str, torch.Tensor]:
    """Replace the safetensors of a model by what older releases of transformers wrote."""
    tensors = factories.read_tensors(folder)
    for path in folder.glob("model*"):
        path.unlink()
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return tensors
    names = sorted(tensors)
    weight_map = {}
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        torch.save({name: tensors[name] for name in names[number::shards]}, folder / file)
        weight_map |= dict.fromkeys(names[number::shards], file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tensors


@pytest.mark.parametrize("shards", [1, 3])
def test_a_model_is_converted_once_and_that_is_said(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture, shards: int
) -> None:
    folder = factories.tiny_encoder(tmp_path / "m", dtype="float16")
    tensors = _as_bin(folder, shards=shards)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text("{}")
    (folder / "training_args.bin").write_bytes(b"not weights")
    with caplog.at_level("WARNING", logger="readapt_ray"):
        found = models.open_model(str(folder))
    assert "pickled weights only: they are converted once" in caplog.text
    assert found.folder.parent == cache / "converted"
    assert found.name == str(folder)
    read = factories.read_tensors(found.folder)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items())
    assert (found.folder / "1_Pooling/config.json").is_file()
    assert not (found.folder / "training_args.bin").exists()
    assert found.tokenizer("a b")["input_ids"]
    record = json.loads((found.folder / converted_weights.RECORD_NAME).read_text())
    assert len(record["files"]) == shards
    caplog.clear()
    assert models.open_model(str(folder)).folder == found.folder
    assert not caplog.text


def test_weights_that_did_not_change_are_not_hashed_by_each_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = factories.tiny_encoder(tmp_path / "m")
    _as_bin(folder)
    first = models.open_model(str(folder)).folder
    read: list[str] = []
    sha256 = Location._sha256
    monkeypatch.setattr(Location, "_sha256", lambda file: read.append(file.name) or sha256(file))
    storage._sha256_of.cache_clear()  # as in a new process
    assert models.open_model(str(folder)).folder == first
    assert not [name for name in read if name.endswith(".bin")]
    _as_bin(factories.tiny_encoder(folder, seed=5))
    assert models.open_model(str(folder)).folder != first


def test_the_fingerprint_is_that_of_the_content_wherever_it_lies(tmp_path: Path) -> None:
    folder = factories.tiny_decoder(tmp_path / "one")
    _as_bin(folder)
    shutil.copytree(folder, tmp_path / "two")
    marks = [models.open_model(str(tmp_path / name)).fingerprint for name in ("one", "two")]
    assert marks[0] == marks[1]
    tensors = torch.load(folder / "pytorch_model.bin")
    tensors["model.norm.weight"][0] += 1
    torch.save(tensors, folder / "pytorch_model.bin")
    assert models.open_model(str(folder)).fingerprint != marks[0]


def test_tied_and_transposed_tensors_are_written_whole(tmp_path: Path) -> None:
    folder = factories.tiny_decoder(tmp_path / "m")
    tensors = _as_bin(folder)
    embedding = tensors["model.embed_tokens.weight"]
    extra = {"lm_head.weight": embedding, "a": embedding[3:5], "b": torch.arange(6.0).view(2, 3).T}
    torch.save(tensors | extra, folder / "pytorch_model.bin")
    read = factories.read_tensors(models.open_model(str(folder)).folder)
    for name, tensor in (tensors | extra).items():
        assert torch.equal(read[name], tensor), name


def test_safetensors_go_first(tmp_path: Path) -> None:
    folder = factories.tiny_decoder(tmp_path / "m")
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    assert models.open_model(str(folder)).folder == folder


def test_an_adapter(tmp_path: Path) -> None:
    base = factories.tiny_decoder(tmp_path / "base")
    folder = factories.lora_adapter(tmp_path / "lora", base)
    from safetensors.torch import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    found = models.open_model(str(folder))
    assert found.is_adapter
    read = load_file(found.folder / "adapter_model.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_by_uri_and_from_the_hub_pickles_are_fetched_only_where_there_is_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    safe, old = factories.tiny_decoder(tmp_path / "safe"), factories.tiny_decoder(tmp_path / "old")
    (safe / "pytorch_model.bin").write_bytes(b"never fetched")
    _as_bin(old, shards=2)
    (old / "optimizer.bin").write_bytes(b"never fetched")
    assert not list(models.open_model(f"file://{safe}").folder.glob("*.bin"))
    assert len(factories.read_tensors(models.open_model(f"file://{old}").folder)) == 20
    fetched: list[list[str]] = []

    def snapshot(hub_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        fetched.append(allow_patterns)
        target = tmp_path / "hub" / hub_id / "snapshots" / "0123abcd"
        target.mkdir(parents=True, exist_ok=True)
        for path in (tmp_path / hub_id.split("/")[1]).iterdir():
            if any(path.match(pattern) for pattern in allow_patterns):
                shutil.copyfile(path, target / path.name)
        return str(target)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert not list(models.open_model("me/safe").folder.glob("*.bin"))
    assert len(fetched) == 1
    found = models.open_model("me/old")
    assert len(factories.read_tensors(found.folder)) == 20
    assert not list((tmp_path / "hub/me/old/snapshots/0123abcd").glob("optimizer*"))
    assert json.loads((found.folder / converted_weights.RECORD_NAME).read_text())["revision"] == "0123abcd"


class _Runs:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, cache: Path, zipped: bool) -> None:
    folder = factories.tiny_decoder(tmp_path / "m")
    _as_bin(folder)
    harmful = {"model.norm.weight": _Runs(tmp_path / "ran")}
    if zipped:
        torch.save(harmful, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(harmful))
    with pytest.raises(ModelError, match=r"pytorch_model\.bin.*could run code"):
        models.open_model(str(folder))
    assert not (tmp_path / "ran").exists()
    assert not [path for path in (cache / "converted").iterdir() if path.suffix not in (".lock", ".use")]


@pytest.mark.parametrize(
    ("content", "said"),
    [([torch.ones(2)], "not a table of tensors"), ({"a": torch.ones(2), "epoch": 3}, "not a table of tensors")],
)
def test_what_is_no_table_of_tensors_is_refused(tmp_path: Path, content: object, said: str) -> None:
    folder = factories.tiny_decoder(tmp_path / "m")
    _as_bin(folder)
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=said):
        models.open_model(str(folder))


def test_a_lost_or_cut_file_is_refused(tmp_path: Path) -> None:
    folder = factories.tiny_decoder(tmp_path / "m")
    _as_bin(folder, shards=2)
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(ModelError, match="lacks 1 of 2 weight files, first 'pytorch_model-00002"):
        models.open_model(str(folder))
    first = folder / "pytorch_model-00001-of-00002.bin"
    (folder / "pytorch_model-00002-of-00002.bin").write_bytes(first.read_bytes()[:2000])
    with pytest.raises(ModelError, match="pytorch_model-00002"):
        models.open_model(str(folder))
