"""`readapt encoding`: what a model's files say, and the guess for a model whose files say nothing."""

import json
import re

import pytest

from readapt_ray import cli
from readapt_ray.catalog import models
from readapt_ray.catalog.likely_encoding import guess_encoding
from readapt_ray.errors import ModelError
from readapt_ray.retrieval.encoder import Encoder
from tests import factories, families


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"model_type": "llama"}, "last"),
        ({"model_type": "qwen3"}, "last"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "mean"),
        ({"model_type": "llama", "is_causal": False}, "mean"),
        ({"model_type": "bert"}, "mean"),
        ({"model_type": "mpnet"}, "mean"),
        ({"model_type": "modernbert"}, "cls"),
        ({"model_type": "gte"}, "cls"),
        ({"model_type": "nomic_bert"}, "mean"),
        ({"model_type": "eurobert"}, "mean"),
        ({}, "mean"),
    ],
)
def test_the_likely_pooling_follows_the_architecture(config, pooling):
    assert guess_encoding(config, None).pooling == pooling


@pytest.mark.parametrize(("positions", "due"), [(514, 512), (130, 128), (8194, 512)])
def test_positions_before_the_first_are_not_counted(positions, due):
    config = {"model_type": "xlm-roberta", "max_position_embeddings": positions, "pad_token_id": 1}
    assert guess_encoding(config, None).max_passage_tokens == due


def test_the_error_shows_what_would_do_and_it_does(tmp_path):
    """The JSON in the message is a readapt.json as it stands."""
    folder = factories.tiny_decoder(tmp_path / "m")
    with pytest.raises(ModelError, match=r"likely 'last'.*\n\{") as caught:
        _ = models.open_model(str(folder)).encoding
    shown = re.search(r"\{.*\}", str(caught.value), re.DOTALL)
    assert shown is not None and len(shown[0].splitlines()) == 3
    (folder / "readapt.json").write_text(shown[0])
    model = models.open_model(str(folder))
    encoding = model.encoding
    assert (encoding.pooling, encoding.add_bos, encoding.add_eos) == ("last", False, True)
    assert encoding == models.likely_encoding(model)
    assert Encoder.load(model, device="cpu").encode(["a text"], "query").shape == (1, 32)


def test_a_guess_is_written_once(tmp_path, capsys):
    folder = factories.tiny_encoder(tmp_path / "m")
    assert cli.main(["encoding", "--model", str(folder)]) == 0
    shown = capsys.readouterr()
    assert "this is a guess from its architecture" in shown.err
    assert not (folder / "readapt.json").exists()
    assert cli.main(["encoding", "--model", str(folder), "--write"]) == 0
    assert json.loads((folder / "readapt.json").read_text()) == json.loads(shown.out)
    assert models.open_model(str(folder)).encoding.pooling == "mean"
    factories.write_contract(folder, pooling="cls")
    capsys.readouterr()
    assert cli.main(["encoding", "--model", str(folder), "--write"]) == 0
    assert json.loads(capsys.readouterr().out)["encoding"]["pooling"] == "cls"


def test_sentence_transformers_files_are_asked(tmp_path, capsys):
    family = families.FAMILIES["xlm-roberta"]
    base = families.pretrained(tmp_path / "base", family)
    folder = families.retriever(tmp_path / "retriever", base, family)
    before = models.open_model(str(folder)).encoding
    assert cli.main(["encoding", "--model", str(folder), "--write"]) == 0
    assert "sentence-transformers' files" in capsys.readouterr().err
    assert models.open_model(str(folder)).encoding == before
    assert "readapt.json" in [each.name for each in folder.iterdir()]


def test_the_catalog_is_asked_and_not_written_to(capsys):
    assert cli.main(["encoding", "--model", "quickstart-retriever"]) == 0
    assert json.loads(capsys.readouterr().out)["encoding"]["max_query_tokens"] == 64
    assert cli.main(["encoding", "--model", "quickstart-pretrained", "--write"]) == 2
    assert "neither a folder here nor a URI" in capsys.readouterr().err


def test_an_adapter_is_guessed_from_its_base(tmp_path):
    base = factories.tiny_decoder(tmp_path / "base")
    adapter = factories.lora_adapter(tmp_path / "adapter", base)
    assert models.likely_encoding(models.open_model(str(adapter))).pooling == "last"
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(tmp_path / "no")}))
    with pytest.raises(ModelError, match="no pooling or prompt settings"):
        _ = models.open_model(str(adapter)).encoding
