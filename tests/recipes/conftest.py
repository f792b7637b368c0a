"""Models and a desk for the tests of runs."""

from pathlib import Path

import pytest

from tests import factories
from tests.recipes.desk import Desk


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    base = factories.tiny_decoder(folder / "base")
    factories.write_contract(factories.full_retriever(folder / "retriever", base))
    factories.full_retriever(folder / "silent", base)
    return folder


@pytest.fixture
def desk(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    return Desk(tmp_path, models, monkeypatch)
