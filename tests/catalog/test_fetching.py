"""Files from the hub and from an object store: what is asked again, what is refused, what stays where it is."""

import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import errors

from readapt_ray.catalog import fetching, models
from readapt_ray.catalog.reachable import check_reachable
from readapt_ray.errors import InputError, ModelError, ReadaptError
from readapt_ray.storage import Location
from tests import factories

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def _status(code: int) -> errors.HfHubHTTPError:
    response = SimpleNamespace(status_code=code, headers={}, request=None)
    return errors.HfHubHTTPError(f"the hub says {code}", response=response)


def _nothing_cached(cause: Exception) -> errors.LocalEntryNotFoundError:
    error = errors.LocalEntryNotFoundError(f"nothing cached, since {cause}")
    error.__cause__ = cause
    return error


def _of_the_client(message: str) -> Exception:
    """An error of the HTTP library itself, as a broken download raises it."""
    return errors.HfHubHTTPError.__bases__[0](message)


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """A hub that has one model and goes wrong as `errors_of` says; the revisions that were asked for."""
    monkeypatch.setenv("READAPT_CACHE", str(tmp_path / "cache"))
    factories.tiny_decoder(tmp_path / f"models--me--it/snapshots/{COMMIT}", headless=True)
    monkeypatch.setattr(fetching, "_FIRST_WAIT_S", 0.001)
    return []


@pytest.fixture
def fail(asked: list[str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def with_these(*failures: Exception) -> None:
        left = list(failures)

        def snapshot_download(hub_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
            asked.append(revision)
            if left:
                raise left.pop(0)
            return str(tmp_path / f"models--me--it/snapshots/{COMMIT}")

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)

    return with_these


@pytest.mark.parametrize(
    "failure",
    [
        _status(429),
        _status(503),
        _nothing_cached(_status(502)),
        _nothing_cached(_of_the_client("connection refused")),
        _of_the_client("read timed out"),
        ConnectionResetError("reset by peer"),
        RuntimeError("Data processing error: CAS service error"),
    ],
)
def test_a_hub_that_fails_for_a_while_is_asked_again(
    failure: Exception, asked: list[str | None], fail: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    fail(failure, failure)
    assert models.open_model("me/it").folder.name == COMMIT
    assert len(asked) == 3
    assert "cannot fetch 'me/it'" in caplog.text and "trying again in" in caplog.text
    asked.clear()
    fail(*[failure] * 50)
    with pytest.raises(ReadaptError, match="tried 5 times: run again later") as caught:
        models.open_model("me/it")
    assert not isinstance(caught.value, InputError)
    assert len(asked) == 5


def test_where_nobody_answers_a_mistyped_folder_is_told_soon(
    asked: list[str | None], fail: Callable[..., None]
) -> None:
    client_error = errors.HfHubHTTPError.__bases__[0]
    fail(*[_nothing_cached(type("ConnectError", (client_error,), {})("no such host"))] * 50)
    with pytest.raises(ReadaptError, match=r"no folder here; me/it on the hub\): .*tried 3 times"):
        models.open_model("me/it")
    assert len(asked) == 3


def test_without_a_network_a_folder_that_is_not_there_is_told_at_once(
    asked: list[str | None], fail: Callable[..., None]
) -> None:
    unanswered = type("ConnectError", (errors.HfHubHTTPError.__bases__[0],), {})("no such host")
    unanswered.__cause__ = socket.gaierror(-2, "Name or service not known")
    fail(*[_nothing_cached(unanswered)] * 50)
    with pytest.raises(
        ModelError, match=r"'me/it' \(no folder here; me/it on the hub\): .*check the name and the network"
    ):
        models.open_model("me/it")
    assert len(asked) == 1


@pytest.mark.parametrize(
    "failure",
    [
        _status(401),
        _nothing_cached(_status(403)),
        _nothing_cached(_status(404)),
        _nothing_cached(errors.OfflineModeIsEnabled("offline")),
        errors.LocalEntryNotFoundError("nothing cached"),
        errors.HFValidationError("no such name can be"),
        OSError(28, "No space left on device"),
    ],
)
def test_what_the_user_must_mend_is_said_at_once(
    failure: Exception, asked: list[str | None], fail: Callable[..., None]
) -> None:
    fail(failure)
    with pytest.raises(ModelError, match="check the name and the network, set HF_TOKEN"):
        models.open_model("me/it")
    assert len(asked) == 1


def test_a_defect_of_ours_is_no_failure_of_the_hub(asked: list[str | None], fail: Callable[..., None]) -> None:
    fail(TypeError("ours"))
    with pytest.raises(TypeError, match="ours"):
        models.open_model("me/it")
    assert len(asked) == 1


def test_the_commit_that_one_machine_found_is_what_another_fetches(
    asked: list[str | None], fail: Callable[..., None], tmp_path: Path
) -> None:
    fail()
    found = models.open_model("me/it")
    assert (found.revision, found.pinned_name) == (COMMIT, f"me/it@{COMMIT}")
    again = models.open_model(found.pinned_name)
    assert again == found
    assert asked == [None, COMMIT]
    folder = str(tmp_path / f"models--me--it/snapshots/{COMMIT}")
    assert models.open_model(folder).pinned_name == folder
    assert models.open_model("quickstart-retriever").pinned_name == "quickstart-retriever"


def test_what_a_training_left_beside_a_model_is_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("READAPT_CACHE", str(tmp_path / "cache"))
    folder = factories.tiny_decoder(tmp_path / "m")
    wanted = {path.name for path in folder.iterdir()}
    for name in ("1_Pooling/config.json", "retriever/adapter_config.json", "knowledge-1/adapter_config.json"):
        (folder / name).parent.mkdir()
        (folder / name).write_text("{}")
        wanted.add(name)
    for name in ("checkpoints/step-8.safetensors", "workers/0.json", "pairs/x.json", "metrics/a.json", "tensorboard/b"):
        (folder / name).parent.mkdir()
        (folder / name).write_text("{}")
    found = models.open_model(f"file://{folder}").folder
    assert {name for name, _ in Location(str(found)).listing(recursive=True)} == wanted
    shutil.rmtree(folder / "checkpoints")
    assert models.open_model(f"file://{folder}").folder == found


def test_a_tokenizer_is_fetched_without_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("READAPT_CACHE", str(tmp_path / "cache"))
    whole = factories.tiny_decoder(tmp_path / "whole")
    fetched: list[str] = []

    def snapshot_download(hub_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        target = tmp_path / "hub" / (revision or COMMIT)
        target.mkdir(parents=True, exist_ok=True)
        for path in whole.iterdir():
            if any(path.match(pattern) for pattern in allow_patterns) and not (target / path.name).exists():
                shutil.copyfile(path, target / path.name)
                fetched.append(path.name)
        return str(target)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    expected = models.open_model(str(whole)).tokenizer_fingerprint
    for name in ("me/it", f"file://{whole}"):
        small = models.open_model(name, with_weights=False)
        assert small.tokenizer_fingerprint == expected
        assert small.tokenizer.vocab_size == models.open_model(str(whole)).tokenizer.vocab_size
        assert not list(small.folder.glob("*.safetensors"))
        assert list(models.open_model(name).folder.glob("*.safetensors")), "the weights come when they are needed"
    assert fetched[-1].endswith(".safetensors")


@pytest.mark.parametrize("with_weights", [True, False])
def test_a_model_of_gguf_files_on_the_hub_says_how_to_use_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_weights: bool
) -> None:
    """Most of these repositories hold one model several times, and some also its config.json."""
    (tmp_path / "bare").mkdir()
    (tmp_path / "described").mkdir()
    (tmp_path / "described" / "config.json").write_text("{}")
    names = [f"it.{kind}.gguf" for kind in ("Q2_K", "Q4_0", "Q5_0", "Q6_K", "Q8_0")]
    told = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name, size=1) for name in ["README.md", *names]])
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: told)
    folders = [tmp_path / "described"] * with_weights + [tmp_path / "bare"]
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(folders[0]))
    while folders:
        with pytest.raises(
            ModelError, match=r"it.Q2_K.gguf, .* and 1 more; fetch one of them \(hf download me/it FILE"
        ):
            models.open_model("me/it", with_weights=with_weights)
        del folders[0]
    folders.append(tmp_path / "bare")
    with pytest.raises(ModelError, match="has its weights as GGUF alone"):
        check_reachable("me/it")


@pytest.mark.parametrize("name", ["models", "models/it.gguf"])
def test_a_gguf_file_in_a_store_is_to_be_copied_here(tmp_path: Path, name: str) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "it.gguf").write_bytes(b"GGUF")
    for find in (models.open_model, check_reachable):
        with pytest.raises(
            ModelError, match=r"GGUF alone: it\.gguf; copy (it|one of them) to this machine, and give the path"
        ):
            find((tmp_path / name).as_uri())
