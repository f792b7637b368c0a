import hashlib
import time

import pytest

from readapt_ray.catalog.models import open_model
from readapt_ray.weights import provenance
from readapt_ray.weights.provenance import command_line, hashed_in_background
from tests import factories


def test_every_file_that_decides_the_content_has_its_sha256(tmp_path):
    folder = factories.tiny_decoder(tmp_path / "m", shards=3)
    (folder / "notes.md").write_text("decides nothing")
    with hashed_in_background([("pretrained", open_model(str(folder)))]) as wait:
        (found,) = wait()
    paths = [path for path in folder.iterdir() if path.name != "notes.md"]
    assert found.files == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    assert sorted(found.weight_files) == sorted(path.name for path in folder.glob("*.safetensors"))
    assert found.fingerprint == open_model(str(folder)).fingerprint
    assert found.revision == ""
    assert found.to_json()["files"] == found.files


def test_the_revision_of_a_model_from_the_hub(tmp_path):
    folder = factories.tiny_decoder(tmp_path / "models--me--it" / "snapshots" / "0123abcd")
    with hashed_in_background([("pretrained", open_model(str(folder)))]) as wait:
        assert wait()[0].revision == "0123abcd"


def test_several_models_in_their_order(tmp_path):
    models = [(f"role {seed}", factories.tiny_decoder(tmp_path / str(seed), seed=seed)) for seed in range(3)]
    with hashed_in_background([(role, open_model(str(folder))) for role, folder in models]) as wait:
        found = wait()
    assert [each.role for each in found] == [role for role, _ in models]
    assert len({each.fingerprint for each in found}) == 3


def test_an_error_beside_it_ends_the_hashing(tmp_path, monkeypatch):
    folder = factories.tiny_decoder(tmp_path / "m")
    large = folder / "large.safetensors"
    with large.open("wb") as file:
        file.truncate(1 << 40)
    started = time.monotonic()
    with pytest.raises(ValueError, match="beside"), hashed_in_background([("pretrained", open_model(str(folder)))]):
        raise ValueError("beside")
    assert time.monotonic() - started < 150


def test_a_file_larger_than_a_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "_CHUNK_BYTES", 1000)
    folder = factories.tiny_decoder(tmp_path / "m")
    with hashed_in_background([("pretrained", open_model(str(folder)))]) as wait:
        digest = wait()[0].files["model.safetensors"]
    assert digest == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_the_command_that_makes_the_same_again():
    options = {
        "pretrained": "a/b",
        "knowledge_scale": (0.5, 0.25),
        "factors": True,
        "low_rank": None,
        "overwrite": False,
    }
    assert command_line("merge", options) == "readapt merge --pretrained a/b --knowledge-scale 0.5,0.25 --factors"
    assert (
        command_line("merge", {"retriever": "my models/it's"}) == """readapt merge --retriever 'my models/it'"'"'s'"""
    )
