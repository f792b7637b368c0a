"""A merged model goes to the hub: what is sent, what is refused, what is asked again, with which exit code."""

import json

import pytest
import yaml

from readapt_ray import cli
from readapt_ray.artifacts import read_manifest
from readapt_ray.catalog import fetching
from tests import factories
from tests.hub_server import hub_server

ID = "me/adapted"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    pretrained = factories.tiny_encoder(root / "pre", shards=2)
    retriever = factories.full_retriever(root / "full", pretrained)
    factories.write_contract(retriever, pooling="mean")
    adapter = factories.dora_adapter(root / "ad", pretrained)
    return {"pretrained": str(pretrained), "retriever": str(retriever), "adapter": str(adapter)}


@pytest.fixture
def hub(monkeypatch):
    with hub_server() as (hub, address):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        monkeypatch.setenv("HF_TOKEN", "hf_made_up")
        monkeypatch.setattr(fetching, "_FIRST_WAIT_S", 0.001)
        yield hub


def push(models, output, *options, to=f"hub:{ID}"):
    named = {**models, "output": str(output), "push": to}
    return cli.main(["merge", *(text for name, value in named.items() for text in (f"--{name}", value)), *options])


def test_the_model_and_its_card_are_sent_and_private(tmp_path, models, hub, capsys):
    output = tmp_path / "out"
    assert push(models, output, "--max-shard-bytes", "100000") == 0
    said = capsys.readouterr().err
    assert hub.private == {ID: True}
    assert "sent to https://huggingface.co/me/adapted/commit/" in said and "(private)" in said
    sent = hub.files[ID]
    written = {path.relative_to(output).as_posix(): path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert {*sent} - {".gitattributes"} == {*written} - {"manifest.json"}
    assert sum(name.endswith(".safetensors") for name in sent) > 1
    assert all(sent[name] == content for name, content in written.items() if name not in ("manifest.json", "README.md"))
    card = sent["README.md"].decode()
    assert f'SentenceTransformer("{ID}")' in card and "PATH_OF_THIS_FOLDER" not in card
    assert "PATH_OF_THIS_FOLDER" in written["README.md"].decode()
    manifest = read_manifest(str(output))
    for role, name in models.items():
        of_role = manifest.details["sources"][
            "adapter 1" if role == "adapter" and "adapter" not in manifest.details["sources"] else role
        ]
        assert f"| `{name}` |" in card and of_role["fingerprint"] in card
    assert "hub:" not in card and hub.messages == [f"Readapted retriever {manifest.fingerprint}"]
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "sentence-transformers"


def test_a_second_push_sends_what_changed_and_removes_its_older_shards(tmp_path, models, hub):
    assert push(models, tmp_path / "one", "--max-shard-bytes", "100000") == 0
    assert push(models, tmp_path / "one", "--max-shard-bytes", "100000") == 0  # merged already; nothing to commit
    assert len(hub.messages) == 1
    hub.files[ID]["NOTES.md"] = b"a user's own"
    assert push(models, tmp_path / "two") == 0
    assert len(hub.messages) == 2
    names = {name for name in hub.files[ID] if "model" in name}
    assert "model.safetensors" in names and not any(name.startswith("model-") or "index" in name for name in names)
    assert "NOTES.md" in hub.files[ID]


def test_public_leaves_a_private_repository_private_and_says_so(tmp_path, models, hub, capsys):
    assert push(models, tmp_path / "one") == 0
    capsys.readouterr()
    assert push(models, tmp_path / "two", "--public", "--knowledge-scale", "0.25") == 0
    assert hub.private == {ID: True} and "(private)" in capsys.readouterr().err


def test_what_is_public_or_of_others_is_not_written(tmp_path, models, hub, capsys):
    assert push(models, tmp_path / "out", "--public") == 0
    assert hub.private == {ID: False}
    assert push(models, tmp_path / "out") == 2
    assert "hub:me/adapted is public; give --public" in capsys.readouterr().err
    hub.files["me/theirs"], hub.private["me/theirs"] = {"config.json": b"{}"}, True
    assert push(models, tmp_path / "out", to="hub:me/theirs") == 2
    assert "holds something that readapt did not write (config.json)" in capsys.readouterr().err
    assert hub.files["me/theirs"] == {"config.json": b"{}"}


@pytest.mark.parametrize("to", ["me/adapted", "hub:adapted", "hub:me/adapted/more", "hub:me/a..b", "hub:me/a b"])
def test_a_bad_name_is_refused_before_anything_is_made(tmp_path, models, hub, capsys, to):
    assert push(models, tmp_path / "out", to=to) == 2
    assert f"push = {to!r}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not hub.asked


@pytest.mark.parametrize("status", [429, 502, 503])
def test_a_busy_hub_is_asked_again(tmp_path, models, hub, capsys, status):
    hub.failures = [status, status]
    assert push(models, tmp_path / "out") == 0
    said = capsys.readouterr().err
    assert said.count("cannot send the model to me/adapted on the hub") == 2 and "trying again in" in said
    assert hub.asked.count("POST api/repos/create") == 3


def test_a_hub_that_goes_on_failing_is_a_failure_and_the_model_stays(tmp_path, models, hub, capsys):
    hub.failures = [503] * 5
    assert push(models, tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert "tried 5 times: the model is whole in its folder; run the same command later" in said
    assert read_manifest(str(tmp_path / "out")) is not None
    assert push(models, tmp_path / "out") == 0 and json.loads(hub.files[ID]["readapt.json"])


@pytest.mark.parametrize("status", [401, 403])
def test_a_token_that_may_not_write_is_bad_input(tmp_path, models, hub, capsys, status):
    hub.failures = [status]
    assert push(models, tmp_path / "out") == 2
    assert "set HF_TOKEN to a token that may write there" in capsys.readouterr().err
    assert hub.asked.count("POST api/repos/create") == 1


def test_a_bundle_is_not_sent(tmp_path, models, hub, capsys):
    assert push(models, tmp_path / "out", "--factors") == 2
    assert "--push sends a whole model; leave --factors out" in capsys.readouterr().err
