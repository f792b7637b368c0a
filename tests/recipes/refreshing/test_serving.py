"""A server that runs is brought to the new generation by `readapt serve --update` in a process of its own."""

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from readapt_ray import cli
from readapt_ray.errors import InputError, ReadaptError
from readapt_ray.serving.options import ServeConfig
from tests import factories
from tests.recipes.refreshing import root as roots
from tests.recipes.refreshing.root import Root, StandIns

PASSAGES = factories.small_corpus(20)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Root:
    StandIns(monkeypatch)
    made = Root(tmp_path, roots.models(tmp_path / "models") / "model")
    made.holds(PASSAGES)
    (tmp_path / "server.yaml").write_text("port: 8123\nname: docs\n")
    return made


class Server:
    """In place of `subprocess.run`: parses the command as the real one does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.served: list[ServeConfig] = []
        self.returncode = 0
        monkeypatch.setattr(subprocess, "run", self._run)
        monkeypatch.setattr("readapt_ray.serving.server.serve", self.served.append)

    def _run(self, command: list[str], **_: Any) -> Any:
        assert command[1:3] == ["-m", "readapt_ray.cli"]
        assert cli.main(command[3:]) == 0
        return SimpleNamespace(returncode=self.returncode)


def test_each_generation_is_a_version_of_its_own(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    server, file = Server(monkeypatch), str(root.folder / "server.yaml")
    root.refresh(serve=file)
    root.holds(PASSAGES[1:])
    root.refresh(serve=file)
    found = [(each.name, each.update, each.port, each.index, each.corpus) for each in server.served]
    folders = [f"{root.uri}/generations/0000{number}" for number in (1, 2)]
    assert found == [
        (f"docs-{number}", True, 8123, f"{folder}/index", f"{folder}/corpus")
        for number, folder in zip((1, 2), folders, strict=True)
    ]


def test_a_server_that_cannot_be_updated_is_tried_again_by_the_next_refresh(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, file = Server(monkeypatch), str(root.folder / "server.yaml")
    server.returncode = 2
    with pytest.raises(ReadaptError, match="generation 1 is in place, and the server was not updated"):
        root.refresh(serve=file)
    server.returncode = 0
    assert root.refresh(serve=file).number == 1
    assert [each.name for each in server.served] == ["docs-1", "docs-1"]


def test_what_the_refresh_sets_is_refused_in_the_file_before_anything_is_made(root: Root) -> None:
    (root.folder / "server.yaml").write_text("port: 8123\nindex: elsewhere\n")
    with pytest.raises(InputError, match=r"server.yaml' sets index, which the refresh itself sets; remove it"):
        root.refresh(serve=str(root.folder / "server.yaml"))
    assert not root.there()
