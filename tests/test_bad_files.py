"""What a user can get wrong outside the options: variables, files that are none, text that is not YAML or UTF-8."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from readapt_ray import cli
from readapt_ray.catalog import cache_entries, converted_weights, models
from readapt_ray.errors import InputError

RUN = "source: a\npretrained: b\nretriever: c\n"


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a command that is refused as bad input."""
    code = cli.main(list(arguments))
    said = capsys.readouterr().err
    assert code == 2, said
    (line,) = [line for line in said.splitlines() if line.startswith("readapt: ")]
    assert said.rstrip().endswith(line), f"more than one line: {said}"
    return line


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("READAPT_LOG_LEVEL", "verbose", "READAPT_LOG_LEVEL = 'verbose': must be one of DEBUG, INFO, WARNING, ERROR"),
        ("READAPT_LOG_LEVEL", "3", "READAPT_LOG_LEVEL = '3': must be one of"),
    ],
)
def test_a_variable_of_wrong_form_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(name, value)
    assert message in refused(capsys, "--help")


@pytest.mark.parametrize("folder", ["models", "converted"])
def test_a_cache_that_is_no_folder_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("READAPT_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"READAPT_CACHE = '.*file': must be a folder"):
        if folder == "models":
            cache_entries.folder_of("models")
        else:
            (tmp_path / "pytorch_model.bin").write_bytes(b"x")
            converted_weights.safe_folder(tmp_path, "x")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("READAPT_NUM_CPUS", "two", "must be a whole number from 1"),
        ("READAPT_NUM_CPUS", "0", "must be a whole number from 1"),
        ("READAPT_NUM_NODES", "many", "must be a whole number from 1"),
        ("READAPT_WAIT_S", "soon", "must be a number of 0 or more"),
        ("READAPT_WAIT_S", "nan", "must be a number of 0 or more"),
    ],
)
def test_a_variable_of_the_cluster_is_read_before_ray_starts(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    import ray

    from readapt_ray.cluster import connection

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray started"))
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=re.escape(f"{name} = {value!r}: {message}")):
        connection.connect()


def test_a_log_level_in_any_case_is_taken(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for level in ("Warning", "debug", ""):
        monkeypatch.setenv("READAPT_LOG_LEVEL", level)
        assert cli.main(["--version"]) == 0


Write = Callable[[Path], object]
UNREADABLE: dict[str, Write] = {
    "broken": lambda file: file.write_text("a: [1\nb: }"),
    "folder": lambda file: file.mkdir(),
    "latin-1": lambda file: file.write_bytes("a: café".encode("latin-1")),
    "absent": lambda file: None,
    "empty": lambda file: file.write_text(""),
    "list": lambda file: file.write_text("- 1\n- 2\n"),
    "control": lambda file: file.write_bytes(b"a: \x00\x01"),
    "python": lambda file: file.write_text("!!python/object:os.system {}"),
}
COMMANDS: dict[str, list[str]] = {
    "run": ["run", "--config", "{bad}"],
    "stage": ["embed", "--config", "{bad}"],
    "compare": ["compare", "--config", "{bad}"],
    "plan": ["plan", "--config", "{run}", "--cluster", "{bad}"],
    "prices": ["plan", "--config", "{run}", "--cluster", "local", "--prices", "{bad}"],
    "status": ["status", "--root", ".", "--cluster", "{bad}"],
    "encoding": ["embed", "--retriever", "r", "--corpus", "c", "--output", "o", "--encoding", "{bad}"],
    "versions": ["serve", "--versions", "{bad}"],
    "keys": ["serve", "--retriever", "r", "--api-keys", "{bad}"],
}


@pytest.mark.parametrize("kind", UNREADABLE)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_that_cannot_be_read_is_named_in_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    UNREADABLE[kind](tmp_path / "bad.yaml")
    (tmp_path / "run.yaml").write_text(RUN)
    arguments = [each.format(bad="bad.yaml", run="run.yaml") for each in COMMANDS[command]]
    said = refused(capsys, *arguments)
    assert "bad.yaml" in said or (command, kind) == ("stage", "empty"), said


@pytest.mark.parametrize(
    "change", ["train.lora_rank=[1", "train={lora_rank: 1", "train.lora_rank", "=1", "train.lora_rank.x=1", "train=3"]
)
def test_a_change_that_is_none_is_one_of_what_is_wrong(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, change: str
) -> None:
    (tmp_path / "run.yaml").write_text(RUN + "train: {lora_rank: 4}\n")
    assert cli.main(["run", "--config", str(tmp_path / "run.yaml"), "--set", change]) == 2
    said = capsys.readouterr().err
    assert said.count("readapt: error: ") == 1 and "Traceback" not in said, said
    listed = [line for line in said.splitlines() if line.startswith("  - ")]
    [about] = [line for line in listed if not line.startswith("  - no ")]  # the source and the models are not there
    assert "train" in about or "--set" in about


@pytest.mark.parametrize("error", [PermissionError, IsADirectoryError, NotADirectoryError])
def test_a_path_that_may_not_be_read_is_bad_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: type[OSError]
) -> None:
    def fail(_: object) -> None:
        raise error(13, "Failed to open\nlocal file", "x/y")

    monkeypatch.setitem(cli._RUNNERS, "status", fail)
    assert "'x/y'; give a path that may be read" in refused(capsys, "status")


@pytest.mark.parametrize("text", ["{", "[1]", "3", "\xff"])
def test_a_damaged_config_of_a_model_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"config.json is not a JSON object"):
        models.OpenModel("m", tmp_path).read_json("config.json")
