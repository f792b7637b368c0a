import json

import pytest
import torch

from readapt_ray.storage import Location
from readapt_ray.training import trainable
from readapt_ray.weights.weight_files import Checkpoint, stored_tensors
from tests import factories, families


def _saved(tmp_path, monkeypatch, shard_bytes):
    from transformers import AutoModel

    source = factories.tiny_encoder(tmp_path / "source")
    model = AutoModel.from_pretrained(source)
    monkeypatch.setattr(trainable, "_SHARD_BYTES", shard_bytes)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    trainable.save_model(model, Location(str(source)), Location(str(tmp_path / "saved")))
    return model.state_dict(), tmp_path / "saved"


def test_all_weights_are_saved_in_files_that_the_index_lists(tmp_path, monkeypatch):
    weights, saved = _saved(tmp_path, monkeypatch, 20_000)
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in saved.glob("*.safetensors"))
    assert len(files) > 2
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(each.nbytes for each in weights.values())
    stored = stored_tensors(saved, "saved")
    assert {name: tensor.path.name for name, tensor in stored.items()} == index["weight_map"]
    assert stored.keys() == weights.keys()
    for name, tensor in stored.items():
        torch.testing.assert_close(tensor.read(), weights[name], rtol=0, atol=0)


def test_one_file_has_the_usual_name_and_the_tokenizer_comes_along(tmp_path, monkeypatch):
    weights, saved = _saved(tmp_path, monkeypatch, 2 << 30)
    assert [path.name for path in saved.glob("*.safetensors*")] == ["model.safetensors"]
    assert len(Checkpoint(saved).names()) == len(weights)
    assert (saved / "tokenizer.json").is_file()
    assert json.loads((saved / "config.json").read_text())["architectures"] == ["BertModel"]


@pytest.mark.parametrize("name", ["nomic-bert", "jina-v3", "gte"])
def test_weights_are_saved_under_the_names_that_transformers_gives_its_files(tmp_path, monkeypatch, name):
    """They hold several weights as one tensor, under other names than the modules'."""
    from transformers import AutoModelForMaskedLM

    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    source = families.pretrained(tmp_path / "source", families.FAMILIES[name])
    model = AutoModelForMaskedLM.from_pretrained(source)
    trainable.save_model(model, Location(str(source)), Location(str(tmp_path / "saved")))
    saved, due = (stored_tensors(folder, "saved") for folder in (tmp_path / "saved", source))
    assert saved.keys() == due.keys()
    assert all(torch.equal(saved[each].read(), due[each].read()) for each in due)
    again, loading = AutoModelForMaskedLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(loading.values())
    for each, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[each], weight)
