"""Completion in a shell: the script is made from the parsers, and the shells complete with it."""

import os
import pty
import select
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from readapt_ray import cli
from readapt_ray.command_parsers import COMMANDS, parser_of


def _script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    pytest.importorskip("shtab", reason="shtab is not installed")
    assert cli.main(["--completion", shell]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_knows_every_command_and_option(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    script = _script(shell, capsys)
    for command in COMMANDS:
        assert command in script
        names = [name for action in parser_of(command)._actions for name in action.option_strings]
        assert all(name.lstrip("-") in script for name in names), command


def test_bash_completes_commands_and_options(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "script").write_text(_script("bash", capsys))
    bash = shutil.which("bash")
    assert bash is not None

    def completed(*words: str) -> list[str]:
        line = " ".join(f"'{word}'" for word in words)
        code = (
            f"source {tmp_path / 'script'}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}\n"
            "function=$(complete -p readapt | sed 's/.*-F \\([^ ]*\\).*/\\1/'); $function 2>/dev/null; echo ${COMPREPLY[@]}"
        )
        return subprocess.run([bash, "-c", code], capture_output=True, text=True, check=True).stdout.split()

    assert completed("readapt", "qu") == ["quickstart"]
    assert completed("readapt", "embed", "--max-l") == ["--max-left-out"]
    assert set(completed("readapt", "run", "--")) >= {"--config", "--set", "--overwrite", "--from"}


def test_fish_completes_commands_and_options(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "script").write_text(_script("fish", capsys))
    fish = shutil.which("fish") or pytest.skip("fish is not installed")

    def completed(words: str) -> list[str]:
        code = f"source {tmp_path / 'script'}; complete -C '{words}'"
        out = subprocess.run([fish, "-c", code], capture_output=True, text=True, check=True, timeout=300).stdout
        return [line.split("\t")[0] for line in out.splitlines()]

    assert completed("readapt qu") == ["quickstart"]
    assert completed("readapt embed --max-l") == ["--max-left-out"]
    assert set(completed("readapt run --")) >= {"--config", "--set", "--overwrite", "--from"}


def test_zsh_completes_commands_and_options(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "_readapt").write_text(_script("zsh", capsys))
    zsh = shutil.which("zsh") or pytest.skip("zsh is not installed")
    begin = f"PS1=; PS2=; fpath=({tmp_path} $fpath); autoload -Uz compinit; compinit -u -d {tmp_path}/dump; readapt() {{ echo GIVEN $@ }}"

    def completed(words: str) -> str:
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [zsh, "-f", "-i"], stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "dumb"}
        )
        os.write(ours, f"{begin}; echo READY\n".encode())
        _read_until(ours, "\nREADY")
        os.write(ours, f"{words}\t\n".encode())
        said = _read_until(ours, "\nGIVEN")
        process.kill()
        process.wait()
        return said.rpartition("GIVEN ")[2].partition("\n")[0].strip()

    assert completed("readapt qu") == "quickstart"
    assert completed("readapt embed --max-l") == "embed --max-left-out"


def _read_until(terminal: int, mark: str) -> str:
    """What a terminal shows up to the end of the line that begins with a mark."""
    said = ""
    while "\n" not in said.partition(mark)[2]:
        assert select.select([terminal], [], [], 300)[0], said
        said += os.read(terminal, 4096).decode().replace("\r", "")
    return said


def test_what_is_missing_or_unknown_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["--completion", "bash"]) == 2
    assert "needs the package shtab; pip install 'readapt-ray[completion]'" in capsys.readouterr().err
    for arguments in (["--completion", "tcsh"], ["--completion"]):
        assert cli.main(arguments) == 2
        assert "give one of bash, zsh, fish, such as" in capsys.readouterr().err
