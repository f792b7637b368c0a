"""A retriever with the head of its pretrained model: what transformers makes of the folder."""

import json
from pathlib import Path

import pytest
import torch

from readapt_ray.model_file_names import INDEX_NAME
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


def test_what_a_kill_left_is_written_again(tmp_path: Path) -> None:
    base = factories.tiny_decoder(tmp_path / "base", tie_word_embeddings=False)
    retriever = Location(str(factories.full_retriever(tmp_path / "retriever", base)))
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "head.safetensors").write_bytes(b"half")
    whole = add_head(retriever, base, Location(str(tmp_path / "whole")))
    index = json.loads((whole / INDEX_NAME).read_text())
    assert set(index["weight_map"].values()) == {"head.safetensors", "body-model.safetensors"}
    assert (whole / "head.safetensors").size_bytes() > 4
