"""The command line as a user meets it: messages, exit codes, help."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from readapt_ray import cli, recipes
from tests import factories

REPOSITORY = Path(__file__).parent.parent


def run(*arguments: str) -> tuple[int, str, str]:
    """`readapt` in a process of its own: exit code, stdout, stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "readapt_ray.cli", *arguments],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one message of a command that must be refused as bad input, within seconds and without a traceback."""
    started = time.monotonic()
    code = cli.main(list(arguments))
    said = capsys.readouterr().err
    assert code == 2, said
    assert "Traceback" not in said
    assert time.monotonic() - started < 30
    lines = [line for line in said.splitlines() if line.startswith("readapt: error:")]
    assert len(lines) == 1, said
    import ray

    assert "RAY_ADDRESS" not in said
    assert ray is not None
    return lines[0]


def test_help_names_every_command_and_every_option() -> None:
    code, out, _ = run("--help")
    assert code == 0
    assert all(f"\n  {name}" in out for name in (*recipes.STAGES, "run", "serve", "status", "quickstart"))


@pytest.mark.parametrize("command", [*recipes.STAGES, "serve"])
def test_each_option_has_a_help_text_and_a_default_or_is_required(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if command == "serve":
        from readapt_ray.serving.options import ServeConfig

        config_class: type = ServeConfig
    else:
        config_class, _ = recipes.stage_parts(command)
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, field in config_class.model_fields.items():  # type: ignore[attr-defined]
        assert f"--{name.replace('_', '-')}" in text
        assert field.description, name
        assert " ".join(field.description.split()[:4]) in text, name


def test_an_unknown_command_and_option_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no command 'embedd'; the commands are quickstart, run, ingest" in refused(capsys, "embedd")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["embed", "--corpsu", "x"])
    assert stopped.value.code == 2
    assert "--corpsu" in capsys.readouterr().err


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pretrained model, retriever, adapter, an adapter of another model, and a corpus."""
    folder = tmp_path_factory.mktemp("pieces")
    base = factories.tiny_decoder(folder / "base")
    factories.write_contract(factories.full_retriever(folder / "retriever", base))
    factories.dora_adapter(folder / "adapter", base)
    other = factories.tiny_decoder(folder / "other", hidden_size=48)
    factories.dora_adapter(folder / "other-adapter", other)
    passages = factories.small_corpus(30)
    factories.ingest_artifact(folder / "corpus", passages, *factories.small_queries(passages))
    return folder


def merge_arguments(pieces: Path, output: Path, **changes: str) -> list[str]:
    values = {
        "pretrained": str(pieces / "base"),
        "retriever": str(pieces / "retriever"),
        "adapter": str(pieces / "adapter"),
        "output": str(output),
        **changes,
    }
    return ["merge", *(part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", value))]


def test_a_stage_prints_where_its_artifact_lies(
    pieces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(merge_arguments(pieces, tmp_path / "m", knowledge_scale="0.25")) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "m")
    assert (tmp_path / "m" / "model.safetensors").is_file()


def test_bad_input_gives_one_message_and_exit_code_2(
    pieces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = str(tmp_path / "absent")
    assert absent in refused(capsys, "ingest", "--source", absent, "--output", str(tmp_path / "a"))
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert "empty.jsonl" in refused(capsys, "ingest", "--source", str(empty), "--output", str(tmp_path / "b"))
    textless = tmp_path / "textless.jsonl"
    textless.write_text('{"_id": "1", "name": "x"}\n')
    assert "text" in refused(capsys, "ingest", "--source", str(textless), "--output", str(tmp_path / "c"))
    corpus = str(pieces / "corpus")
    not_a_model = refused(capsys, "embed", "--retriever", corpus, "--corpus", corpus, "--output", str(tmp_path / "d"))
    assert "is not a model" in not_a_model
    other = refused(capsys, *merge_arguments(pieces, tmp_path / "e", adapter=str(pieces / "other-adapter")))
    assert "other-adapter" in other
    scales = refused(capsys, *merge_arguments(pieces, tmp_path / "f", knowledge_scale="much"))
    assert "knowledge_scale" in scales
    assert "much" in scales
    infinite = refused(capsys, *merge_arguments(pieces, tmp_path / "g", readapter_scale="nan"))
    assert "readapter_scale" in infinite
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert port in refused(capsys, "serve", "--retriever", str(pieces / "retriever"), "--port", port)
    assert not any((tmp_path / name).exists() for name in "abcdefg")


def test_no_worker_starts_on_bad_input() -> None:
    """In a fresh process: Ray is not even imported when the input is refused."""
    script = (
        "import sys\nfrom readapt_ray import cli\n"
        "code = cli.main(['embed', '--retriever', 'absent-model', '--corpus', 'absent', '--output', 'x'])\n"
        "print(code, 'ray' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY, timeout=60, check=True
    )
    assert done.stdout.split() == ["2", "False"]


def test_options_come_from_a_file_and_flags_go_before_it(
    pieces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    file = tmp_path / "merge.yaml"
    file.write_text("knowledge_scale: 0.25\nreadapter_scale: 0.75\n")
    assert cli.main([*merge_arguments(pieces, tmp_path / "m", readapter_scale="1.0"), "--config", str(file)]) == 0
    config = json.loads((tmp_path / "m" / "manifest.json").read_text())["config"]
    assert (config["readapter_scale"], config["knowledge_scale"]) == (1.0, 0.25)
    file.write_text("knowlege_scale: 0.25\n")
    assert "unknown option 'knowlege_scale'" in refused(
        capsys, *merge_arguments(pieces, tmp_path / "n"), "--config", str(file)
    )


def test_an_interruption_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli._RUNNERS, "status", interrupt)
    assert cli.main(["status"]) == 130
    assert "run the same command again" in capsys.readouterr().err


def test_status_tells_done_from_missing(pieces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", "--root", str(pieces)]) == 0
    out = capsys.readouterr().out
    assert "corpus" in out
    assert "done" in out
    assert "30 passages" in out
    assert "no folder" in refused(capsys, "status", "--root", str(tmp_path / "absent"))
