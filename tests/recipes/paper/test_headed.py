"""A retriever with the head of its pretrained model: what transformers makes of the folder."""

import json
from pathlib import Path

import pytest
import torch

from readapt_ray.errors import ArtifactConflictError
from readapt_ray.model_file_names import INDEX_NAME
from readapt_ray.recipes.paper import headed
from readapt_ray.recipes.paper.headed import add_head
from readapt_ray.storage import Location
from tests import factories


@pytest.mark.parametrize("shards", [1, 3])
def test_transformers_loads_the_body_of_one_and_the_head_of_the_other(tmp_path: Path, shards: int) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = factories.tiny_decoder(tmp_path / "base", tie_word_embeddings=False)
    retriever = factories.full_retriever(tmp_path / "retriever", base, shards=shards)
    whole = add_head(Location(str(retriever)), base, Location(str(tmp_path / "whole")))
    model, loading = AutoModelForCausalLM.from_pretrained(whole.uri, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    body, head = factories.read_tensors(retriever), factories.read_tensors(base)["lm_head.weight"]
    assert torch.equal(model.lm_head.weight, head)
    loaded = dict(model.model.named_parameters())
    assert set(loaded) == set(body)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in body.items())
    assert AutoTokenizer.from_pretrained(whole.uri)("array")["input_ids"]

    written = (whole / INDEX_NAME).local_path.stat().st_mtime_ns
    add_head(Location(str(retriever)), base, whole)
    assert (whole / INDEX_NAME).local_path.stat().st_mtime_ns == written


def test_a_tied_head_needs_nothing(tmp_path: Path) -> None:
    base = factories.tiny_decoder(tmp_path / "base")
    retriever = Location(str(factories.full_retriever(tmp_path / "retriever", base)))
    assert add_head(retriever, base, Location(str(tmp_path / "whole"))) is retriever
    assert not (tmp_path / "whole").exists()


def test_what_a_kill_left_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = factories.tiny_decoder(tmp_path / "base", tie_word_embeddings=False)
    retriever = Location(str(factories.full_retriever(tmp_path / "retriever", base)))
    with monkeypatch.context() as patched, pytest.raises(TypeError):
        patched.setattr(headed, "save", lambda _: None)
        add_head(retriever, base, Location(str(tmp_path / "whole")))
    assert (tmp_path / "whole" / "body-model.safetensors").is_file()
    whole = add_head(retriever, base, Location(str(tmp_path / "whole")))
    index = json.loads((whole / INDEX_NAME).read_text())
    assert set(index["weight_map"].values()) == {"head.safetensors", "body-model.safetensors"}
    assert (whole / "head.safetensors").size_bytes() > 4


@pytest.mark.parametrize("name", ["head.safetensors", "model.safetensors.index.json"])
def test_files_of_another_program_are_in_the_way(tmp_path: Path, name: str) -> None:
    base = factories.tiny_decoder(tmp_path / "base", tie_word_embeddings=False)
    retriever = Location(str(factories.full_retriever(tmp_path / "retriever", base)))
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / name).write_text("precious")
    with pytest.raises(ArtifactConflictError, match=f"holds {name} that no stage of readapt made"):
        add_head(retriever, base, Location(str(tmp_path / "whole")))
    assert (tmp_path / "whole" / name).read_text() == "precious"
