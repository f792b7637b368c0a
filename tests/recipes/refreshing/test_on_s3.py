"""The same on a real S3 server on loopback: generations, the lock, removal."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from readapt_ray.errors import ArtifactConflictError
from readapt_ray.recipes.refreshing.clean import clean
from readapt_ray.recipes.refreshing.find import find
from readapt_ray.recipes.refreshing.options import CleanConfig, FindConfig
from tests import factories, object_store
from tests.recipes.refreshing import root as roots
from tests.recipes.refreshing.root import Root, StandIns

PASSAGES = factories.small_corpus(30)


@pytest.fixture(scope="module")
def store() -> Iterator[object_store.Store]:
    with object_store.running() as running:
        yield running


def test_a_root_on_s3_is_refreshed_searched_through_and_cleaned(
    store: object_store.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    StandIns(monkeypatch)
    root = Root(tmp_path, roots.models(tmp_path / "models") / "model", f"s3://{object_store.BUCKET}/root")
    root.holds(PASSAGES)
    first = root.refresh()
    assert root.refresh() == first
    root.holds(PASSAGES[1:])
    second = root.refresh()
    assert second.counts == {"added": 0, "changed": 0, "deleted": 1, "kept": 29}
    assert root.passages(second).keys() == {each.doc_id for each in PASSAGES[1:]}
    gone = {"id": b"d00000", "text": PASSAGES[0].text.encode(), "vector": root.vectors(first)["d00000"]}
    assert len({each.partition(" in ")[0] for each in root.files_with(gone)}) == 3
    assert {row["generation"] for row in find(FindConfig(root=root.uri, doc_id="d00000"))} == {"1"}
    clean(CleanConfig(root=root.uri, yes=True))
    assert root.files_with(gone) == []
    files = [name for name in store.names() if not name.endswith("/")]  # the others are marks of folders
    assert not [name for name in files if "generations/00001" in name or ".tmp-" in name]


def test_a_root_on_s3_is_held_by_one_process(store: object_store.Store, tmp_path: Path) -> None:
    root = Root(tmp_path, tmp_path, f"s3://{object_store.BUCKET}/held")
    code = (
        "import sys; from readapt_ray.storage import Location; from readapt_ray.recipes.refreshing.lock import locked\n"
        "with locked(Location(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, root.uri]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as held:
        assert held.stdout is not None
        assert held.stdout.readline() == "held\n"
        with pytest.raises(ArtifactConflictError, match=f"process {held.pid} on .* is writing"):
            root.refresh()
        held.kill()
