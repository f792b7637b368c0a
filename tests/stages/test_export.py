"""The export stage itself; what every target must do is in tests/targets/test_contract.py."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from readapt_ray.artifacts import Artifact
from readapt_ray.cluster import export_parts
from readapt_ray.errors import ArtifactConflictError, FingerprintMismatchError, InputError, TargetError
from readapt_ray.stages.export import ExportConfig, export
from readapt_ray.targets import sending
from readapt_ray.targets.files import FilesTarget
from tests.targets import worlds

ROWS = worlds.passages(30)


@pytest.fixture
def world(tmp_path: Path) -> Path:
    worlds.write(tmp_path, ROWS)
    return tmp_path


def exported(folder: Path, to: str, output: str = "export", **options: Any) -> Artifact:
    inputs = {name: str(folder / name) for name in ("vectors", "corpus")}
    return export(ExportConfig(**{**inputs, "to": to, "output": str(folder / output), **options}))


def rows_in(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["doc_id"]: row for file in folder.glob("*.parquet") for row in pq.read_table(file).to_pylist()}


@pytest.mark.usefixtures("ray_session")
def test_much_is_sent_by_ray_tasks_and_little_is_not(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = exported(world, f"files:{world}/here")
    monkeypatch.setattr(export_parts, "_SMALL_BYTES", 0)
    monkeypatch.setattr(export_parts, "_here", lambda job: pytest.fail("it was sent by this process"))
    there = exported(world, f"files:{world}/there", "on-ray")
    assert rows_in(world / "there") == rows_in(world / "here")
    assert there.manifest.counts == here.manifest.counts
    assert there.manifest.details["check"] == here.manifest.details["check"]
    changed = {name: dict(row) for name, row in list(ROWS.items())[1:]}
    changed[worlds.doc_id(3)]["text"] = "changed"
    worlds.write(world / "new", changed)
    updated = exported(world / "new", f"files:{world}/there", previous=there.uri)
    assert updated.manifest.counts == {"num_vectors": 29, "num_sent": 1, "num_deleted": 1}
    assert rows_in(world / "there").keys() == changed.keys()


def test_without_text_only_ids_and_vectors_are_sent(world: Path) -> None:
    exported(world, f"files:{world}/files", corpus=None, with_text=False)
    assert {tuple(row) for row in rows_in(world / "files").values()} == {("doc_id", "vector")}
    with pytest.raises(InputError, match="was sent with with_text = False; give the same"):
        exported(world, f"files:{world}/files", "next", previous=str(world / "export"))


def test_text_needs_the_corpus_that_the_vectors_are_of(world: Path) -> None:
    with pytest.raises(InputError, match="give --corpus, whose texts are sent along, or turn --with-text off"):
        ExportConfig.parse({"vectors": "v", "to": "files:f", "output": "o"}, flags=True)
    worlds.write(world / "other", worlds.passages(5))
    with pytest.raises(FingerprintMismatchError, match="are not vectors of the corpus"):
        exported(world, f"files:{world}/files", corpus=str(world / "other/corpus"))
    assert not (world / "files").exists()


def test_what_others_wrote_is_neither_mixed_with_nor_replaced(world: Path) -> None:
    (world / "files").mkdir()
    (world / "files/part-00000-0a0b0c0d.parquet").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ArtifactConflictError, match="readapt did not write it"):
            exported(world, f"files:{world}/files", overwrite=overwrite)
    assert (world / "files/part-00000-0a0b0c0d.parquet").read_text() == "mine"


def test_previous_must_have_gone_to_the_same_place(world: Path) -> None:
    previous = exported(world, f"files:{world}/files")
    with pytest.raises(InputError, match=r"was sent to files:.*/files, and this goes to files:.*/elsewhere"):
        exported(world, f"files:{world}/elsewhere", "next", previous=previous.uri)
    for file in (world / "files").iterdir():
        file.unlink()
    worlds.write(world / "new", worlds.passages(5))
    with pytest.raises(InputError, match="is gone"):
        exported(world / "new", f"files:{world}/files", previous=previous.uri)


def test_a_collection_that_was_removed_meanwhile_is_filled_from_the_start(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(FilesTarget, "finish", lambda self: 1 / 0)
        with pytest.raises(TargetError, match="ZeroDivisionError"):
            exported(world, f"files:{world}/files")
    for file in (world / "files").iterdir():
        file.unlink()
    exported(world, f"files:{world}/files")
    assert rows_in(world / "files").keys() == ROWS.keys()


def test_a_request_that_fails_is_made_again_and_then_the_export_fails(
    world: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sending, "_FIRST_WAIT_S", 0.001)
    write, failures = FilesTarget.write, iter(range(5))

    def failing(self: FilesTarget, *args: Any) -> None:
        if next(failures, None) is not None:
            raise ConnectionError("busy")
        write(self, *args)

    monkeypatch.setattr(FilesTarget, "write", failing)
    with pytest.raises(TargetError, match="ConnectionError: busy"):
        exported(world, f"files:{world}/files")
    assert sum("trying again" in each for each in caplog.messages) == 3
    assert exported(world, f"files:{world}/files").manifest.counts["num_sent"] == 30


def test_rows_that_others_deleted_are_missed(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish = FilesTarget.finish
    monkeypatch.setattr(FilesTarget, "finish", lambda self: (finish(self), self.delete([worlds.doc_id(1)]))[0])
    with pytest.raises(TargetError, match="holds 29 rows, and 30 were sent"):
        exported(world, f"files:{world}/files")


def test_a_collection_that_another_export_took_meanwhile_is_a_failure(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FilesTarget, "finish", lambda self: self.set_record({"export": "another"}))
    with pytest.raises(TargetError, match="was taken by another export in between"):
        exported(world, f"files:{world}/files")


def test_vectors_of_int8_are_sent_as_what_they_stand_for(world: Path) -> None:
    worlds.write(world / "int8", ROWS, dtype="int8")
    artifact = exported(world / "int8", f"files:{world}/files", check=30)
    found, due = rows_in(world / "files"), worlds.matrix_of(ROWS)
    assert max(abs(due - [found[name]["vector"] for name in ROWS]).ravel()) < 0.01
    assert artifact.manifest.details["check"]["lowest"] == 1.0


def test_the_check_says_how_many_of_the_ten_best_the_target_finds(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = FilesTarget.search

    def half_of_the_first(self: FilesTarget, vectors: Any, top_k: int) -> list[list[str]]:
        first, *others = search(self, vectors, top_k)
        return [[*first[:5], *(f"no {place}" for place in range(5))], *others]

    monkeypatch.setattr(FilesTarget, "search", half_of_the_first)
    found = exported(world, f"files:{world}/there", check=10).manifest.details["check"]
    assert found == {"num_queries": 10, "overlap_at_10": 0.95, "lowest": 0.5}
