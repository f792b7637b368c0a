import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from readapt_ray import artifact_files, artifacts, leases, outputs
from readapt_ray.artifacts import Workspace
from readapt_ray.config import StageConfig
from readapt_ray.errors import ArtifactConflictError, ArtifactMissingError, CorruptFileError, InputError
from readapt_ray.recipes.refreshing.clean import remove_artifact
from readapt_ray.shared_files import share
from readapt_ray.storage import Location


class CopyConfig(StageConfig):
    """Options of a stage that exists for these tests."""

    corpus: str = "somewhere"
    """An input."""
    factor: int = 1
    """Decides what comes out."""
    num_workers: int = 1
    """Decides how."""

    inputs = frozenset({"corpus"})
    operational = frozenset({"num_workers"})


@pytest.fixture(autouse=True)
def listed_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the stage of these tests writes."""
    files = ("data*", "part-*", "*.part", "state-*", "passages/part-*", "deep/part")
    monkeypatch.setitem(artifact_files.STAGE_FILES, "copy", files)


def tree(folder: Path) -> dict[str, str | None]:
    """Every file with its content, and every folder, by relative path."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_text() if path.is_file() else None for path in paths}


def lay(folder: Path, *names: str) -> None:
    """Write files that no stage of ours made."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("precious")


def make(config: CopyConfig, calls: list[int], corpus: str = "c1") -> artifacts.Artifact:
    def work(workspace: Workspace) -> None:
        calls.append(config.factor)
        (workspace.location / "data.txt").write_text(str(config.factor))
        workspace.counts = {"num_rows": config.factor}

    return artifacts.produce("copy", config, inputs={"corpus": corpus}, work=work)


def test_the_same_stage_twice_does_nothing(tmp_path: Path) -> None:
    calls: list[int] = []
    config = CopyConfig(output=str(tmp_path / "a"), factor=3)
    first = make(config, calls)
    second = make(config, calls)
    assert calls == [3]
    assert first.fingerprint == second.fingerprint
    assert second.manifest.counts == {"num_rows": 3}
    assert second.manifest.inputs == {"corpus": "c1"}
    assert not (tmp_path / "a" / "building.json").exists()


def test_only_what_decides_the_content_is_in_the_fingerprint(tmp_path: Path) -> None:
    calls: list[int] = []
    base = make(CopyConfig(output=str(tmp_path / "a")), calls).fingerprint
    moved = make(CopyConfig(output=str(tmp_path / "b"), corpus="elsewhere", num_workers=7), calls).fingerprint
    other_option = make(CopyConfig(output=str(tmp_path / "c"), factor=2), calls).fingerprint
    other_input = make(CopyConfig(output=str(tmp_path / "d")), calls, corpus="c2").fingerprint
    assert base == moved
    assert len({base, other_option, other_input}) == 3


def test_another_fingerprint_is_refused_and_the_difference_named(tmp_path: Path) -> None:
    calls: list[int] = []
    make(CopyConfig(output=str(tmp_path / "a"), factor=1), calls)
    with pytest.raises(ArtifactConflictError, match=r"factor: 1 there, 2 now.*--overwrite"):
        make(CopyConfig(output=str(tmp_path / "a"), factor=2), calls)
    with pytest.raises(ArtifactConflictError, match="corpus: its content changed"):
        make(CopyConfig(output=str(tmp_path / "a"), factor=1), calls, corpus="c2")
    assert (tmp_path / "a" / "data.txt").read_text() == "1"
    make(CopyConfig(output=str(tmp_path / "a"), factor=2, overwrite=True), calls)
    assert (tmp_path / "a" / "data.txt").read_text() == "2"


def test_a_failed_stage_is_unfinished_and_goes_on(tmp_path: Path) -> None:
    config = CopyConfig(output=str(tmp_path / "a"))

    def fail(workspace: Workspace) -> None:
        (workspace.location / "part-0").write_text("kept")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        artifacts.produce("copy", config, inputs={}, work=fail)
    assert artifacts.read_manifest(config.output) is None
    with pytest.raises(ArtifactMissingError, match="unfinished"):
        artifacts.open_artifact(config.output, "copy")
    seen = []
    artifacts.produce("copy", config, inputs={}, work=lambda w: seen.append((w.location / "part-0").read_text()))
    assert seen == ["kept"]


def test_an_unfinished_artifact_of_other_options_is_refused(tmp_path: Path) -> None:
    def fail(workspace: Workspace) -> None:
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        artifacts.produce("copy", CopyConfig(output=str(tmp_path / "a"), factor=1), inputs={}, work=fail)
    with pytest.raises(ArtifactConflictError, match="factor: 1 there, 2 now"):
        artifacts.produce("copy", CopyConfig(output=str(tmp_path / "a"), factor=2), inputs={}, work=fail)


def fill(workspace: Workspace, num_files: int = 3) -> None:
    for number in range(num_files):
        (workspace.location / "passages" / f"part-{number}").write_text("old")
        (workspace.location / f"state-{number}").write_text("old")


def test_replacing_that_is_killed_at_any_moment_leaves_no_manifest_over_a_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delete = Location.delete
    for moment in range(7):  # the manifest and six files
        output = tmp_path / str(moment)
        old, new = CopyConfig(output=str(output), factor=1), CopyConfig(output=str(output), factor=2, overwrite=True)
        artifacts.produce("copy", old, inputs={}, work=fill)
        left = [moment]

        def cut_off(location: Location, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            delete(location)

        monkeypatch.setattr(Location, "delete", cut_off)
        with pytest.raises(KeyboardInterrupt):
            artifacts.produce("copy", new, inputs={}, work=lambda w: None)
        monkeypatch.setattr(Location, "delete", delete)
        assert (artifacts.read_manifest(str(output)) is not None) == (moment == 0)
        if moment:
            with pytest.raises(ArtifactMissingError, match="unfinished"):
                artifacts.open_artifact(str(output), "copy")
            with pytest.raises(ArtifactConflictError, match="what is left of an artifact that was being replaced"):
                artifacts.produce("copy", old, inputs={}, work=fill)
        made = artifacts.produce("copy", new, inputs={}, work=lambda w: (w.location / "data").write_text("new"))
        assert made.manifest.config["factor"] == 2
        assert sorted(path.name for path in output.iterdir()) == ["data", "manifest.json"]


def test_a_half_cleared_artifact_keeps_what_is_not_ours_when_clearing_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "a"
    artifacts.produce("copy", CopyConfig(output=str(output)), inputs={}, work=fill)
    lay(output, "passages/notes.txt", "mine/passages/part-0")
    delete = Location.delete
    left = [3]

    def cut_off(location: Location) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        delete(location)

    new = CopyConfig(output=str(output), factor=2, overwrite=True)
    monkeypatch.setattr(Location, "delete", cut_off)
    with pytest.raises(KeyboardInterrupt):
        artifacts.produce("copy", new, inputs={}, work=lambda w: None)
    monkeypatch.setattr(Location, "delete", delete)
    artifacts.produce("copy", new, inputs={}, work=lambda w: (w.location / "data").write_text("new"))
    found = [name for name, content in tree(output).items() if content is not None]
    assert found == ["data", "manifest.json", "mine/passages/part-0", "passages/notes.txt"]


@pytest.mark.parametrize("is_replaced", [True, False])
def test_preempted_work_that_may_replace_goes_on_at_each_start(is_replaced: bool, tmp_path: Path) -> None:
    config = CopyConfig(output=str(tmp_path / "a"), factor=2, overwrite=True)
    if is_replaced:
        make(CopyConfig(output=str(tmp_path / "a"), factor=1), [])
    found = []

    def work(workspace: Workspace) -> None:
        number = len(workspace.location.files("part"))
        found.append(number)
        (workspace.location / f"{number}.part").write_text("kept")
        if number < 2:
            raise RuntimeError("preempted")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="preempted"):
            artifacts.produce("copy", config, inputs={}, work=work)
    for _ in range(2):
        artifacts.produce("copy", config, inputs={}, work=work)
    assert found == [0, 1, 2]
    assert not (tmp_path / "a" / "data.txt").exists()


def test_a_manifest_of_another_program_is_none_and_is_not_replaced(tmp_path: Path) -> None:
    for content in ('{"name": "app", "icons": []}', "[1]", "3"):
        (tmp_path / "manifest.json").write_text(content)
        assert artifacts.read_manifest(str(tmp_path)) is None
        with pytest.raises(ArtifactMissingError, match=r"holds no manifest\.json of a stage"):
            artifacts.open_artifact(str(tmp_path), "copy")
        for overwrite in (True, False):
            with pytest.raises(ArtifactConflictError, match=r"manifest\.json that no stage of readapt made"):
                make(CopyConfig(output=str(tmp_path), overwrite=overwrite), [])
        assert (tmp_path / "manifest.json").read_text() == content


def test_a_single_file_artifact_is_replaced_and_gone_on_with(tmp_path: Path) -> None:
    output = tmp_path / "base.trec"

    def write(workspace: Workspace) -> None:
        workspace.location.write_text(str(workspace.fingerprint))

    def fail(workspace: Workspace) -> None:
        write(workspace)
        raise RuntimeError("power cut")

    def refuse(workspace: Workspace) -> None:
        raise InputError("no such query")

    artifacts.produce("search", CopyConfig(output=str(output)), inputs={}, work=write)
    config = CopyConfig(output=str(output), factor=2, overwrite=True)
    with pytest.raises(RuntimeError):
        artifacts.produce("search", config, inputs={}, work=fail)
    with pytest.raises(InputError, match="no such query"):
        artifacts.produce("search", config, inputs={}, work=refuse)
    assert artifacts.read_manifest(str(output)) is None
    made = artifacts.produce("search", config, inputs={}, work=write)
    assert output.read_text() == made.fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.trec", "base.trec.manifest.json"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["thesis.doc"], r"holds thesis\.doc that no stage of readapt made"),
        (["home/me/thesis.doc"], "holds home/ that"),
        (["corpus/manifest.json", "vectors/part-0", "run.json"], r"holds corpus/, vectors/, run\.json that"),
        ([f"{letter}/x" for letter in "abcdef"], "holds a/, b/, c/, d/ and 2 more that"),
        (["building.json"], r"holds building\.json that"),
        ([".tmp-mine"], r"holds \.tmp-mine that"),
    ],
)
def test_a_folder_with_anything_that_is_not_ours_is_refused_and_named(
    names: list[str], said: str, overwrite: bool, tmp_path: Path
) -> None:
    lay(tmp_path, *names)
    before = tree(tmp_path)
    with pytest.raises(ArtifactConflictError, match=said):
        make(CopyConfig(output=str(tmp_path), overwrite=overwrite), [])
    assert tree(tmp_path) == before


def test_a_folder_of_empty_folders_or_links_is_refused(tmp_path: Path) -> None:
    """An unmounted disk leaves an empty folder."""
    (tmp_path / "mnt" / "disk").mkdir(parents=True)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "elsewhere").symlink_to(tmp_path / "mnt")
    for folder, name in (("mnt", "disk/"), ("linked", "elsewhere")):
        with pytest.raises(ArtifactConflictError, match=f"holds {name} that"):
            make(CopyConfig(output=str(tmp_path / folder), overwrite=True), [])


def test_the_root_of_a_run_is_no_output_and_loses_nothing(tmp_path: Path) -> None:
    root = tmp_path / "run"
    for name in ("corpus", "vectors/base", "adapter"):
        make(CopyConfig(output=str(root / name)), [])
    before = tree(root)
    for factor, overwrite in ((1, False), (2, True)):
        with pytest.raises(ArtifactConflictError, match="holds adapter/, corpus/, vectors/ that"):
            make(CopyConfig(output=str(root), factor=factor, overwrite=overwrite), [])
    assert tree(root) == before


def test_a_file_in_the_place_of_the_output_is_refused(tmp_path: Path) -> None:
    lay(tmp_path, "notes.txt")
    with pytest.raises(ArtifactConflictError, match=r"notes\.txt' is a file"):
        make(CopyConfig(output=str(tmp_path / "notes.txt"), overwrite=True), [])
    assert (tmp_path / "notes.txt").read_text() == "precious"


def test_overwriting_removes_what_is_listed_and_names_what_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "a"
    artifacts.produce("copy", CopyConfig(output=str(output)), inputs={}, work=fill)
    lay(output, "thesis/chapter-1.doc", "passages/notes.txt", "other/passages/part-0", ".tmp-mine", "README")
    (output / "empty").mkdir()
    (output / "linked").symlink_to(tmp_path)
    new = CopyConfig(output=str(output), factor=2, overwrite=True)
    artifacts.produce("copy", new, inputs={}, work=lambda w: (w.location / "data").write_text("new"))
    (output / "linked").unlink()
    assert [name for name in tree(output) if not (output / name).is_dir()] == [
        ".tmp-mine", "README", "data", "manifest.json", "other/passages/part-0", "passages/notes.txt",
        "thesis/chapter-1.doc",
    ]  # fmt: skip
    assert (output / "empty").is_dir()
    (said,) = [record.getMessage() for record in caplog.records if "keeps" in record.getMessage()]
    assert said.endswith(
        "keeps .tmp-mine, README, linked, other/passages/part-0 and 2 more, which no stage of readapt made"
    )


def test_lease_and_manifest_list_the_files_and_are_believed_in_a_later_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "a"
    leased = []

    def work(workspace: Workspace) -> None:
        leased.append(artifacts.read_lease(workspace.location))
        fill(workspace)

    made = artifacts.produce("copy", CopyConfig(output=str(output)), inputs={}, work=work)
    assert set(leased[0]["patterns"]) == set(artifact_files.STAGE_FILES["copy"])
    assert made.manifest.files == [["passages/part-", "0", "2", ""], ["state-", "0", "2", ""]]
    monkeypatch.setitem(artifact_files.STAGE_FILES, "copy", ("data.txt",))
    make(CopyConfig(output=str(output), factor=2, overwrite=True), [])
    assert sorted(tree(output)) == ["data.txt", "manifest.json"]


LOOKALIKES = ("passages/part-00007", "passages/part-mine", "state-3", "state-old")


def test_what_only_looks_like_ours_stays_in_a_complete_artifact(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "a"
    artifacts.produce("copy", CopyConfig(output=str(output)), inputs={}, work=fill)
    lay(output, *LOOKALIKES)
    new = CopyConfig(output=str(output), factor=2, overwrite=True)
    with pytest.raises(ArtifactConflictError, match=r"holds passages/part-00007, .*state-old that no stage of readapt"):
        artifacts.produce("copy", new, inputs={}, work=fill)
    assert artifacts.read_manifest(str(output)) is not None
    remove_artifact(Location(str(output)))
    assert {name for name, content in tree(output).items() if content} == set(LOOKALIKES)
    assert "keeps passages/part-00007, passages/part-mine, state-3, state-old, which no stage" in caplog.text


def begin(output: Path, factor: int = 1) -> None:
    """Leave what a driver leaves that was cut off."""

    def cut_off(workspace: Workspace) -> None:
        fill(workspace)
        (workspace.location / ".tmp-0123456789ab-state-7").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        artifacts.produce("copy", CopyConfig(output=str(output), factor=factor), inputs={}, work=cut_off)


def let_time_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, what is written comes too late to be of the driver before."""
    monkeypatch.setattr(artifact_files, "_LAST_WRITES_S", 1.0)
    time.sleep(1.2)


def test_what_came_after_a_killed_driver_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "a"
    begin(output)
    let_time_pass(monkeypatch)
    lay(output, *LOOKALIKES)
    os.utime(output / "state-3", (0, 0))
    new = CopyConfig(output=str(output), factor=2, overwrite=True)
    with pytest.raises(ArtifactConflictError, match=r"^passages/part-00007, .*state-old came to .* move it away"):
        artifacts.produce("copy", new, inputs={}, work=fill)
    remove_artifact(Location(str(output)))
    assert {name for name, content in tree(output).items() if content} == set(LOOKALIKES)


def test_work_goes_on_only_without_files_that_came_in_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "a"
    begin(output)
    let_time_pass(monkeypatch)
    lay(output, "state-1", "state-old", "notes.txt")
    for overwrite in (False, True):
        config = CopyConfig(output=str(output), overwrite=overwrite)
        with pytest.raises(ArtifactConflictError, match=r"^state-1, state-old came to .* move it away"):
            artifacts.produce("copy", config, inputs={}, work=fill)
    assert (output / "state-1").read_text() == "precious"
    (output / "state-1").unlink()
    (output / "state-old").unlink()
    made = artifacts.produce("copy", CopyConfig(output=str(output)), inputs={}, work=fill)
    assert made.manifest.files == [["passages/part-", "0", "2", ""], ["state-", "0", "2", ""]]


def test_work_goes_on_in_a_copy_of_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(tmp_path / "a")
    let_time_pass(monkeypatch)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    seen = []
    artifacts.produce(
        "copy",
        CopyConfig(output=str(tmp_path / "b")),
        inputs={},
        work=lambda w: seen.extend(file.name for file in w.location.files("")),
    )
    assert "state-1" in seen


def test_a_copy_of_an_unfinished_folder_is_replaced_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the clocks of driver and storage differ: then the lease is as late as the files."""
    begin(tmp_path / "a")
    let_time_pass(monkeypatch)
    for name in ("b", "c"):
        shutil.copytree(tmp_path / "a", tmp_path / name)
    new = CopyConfig(output=str(tmp_path / "b"), factor=2, overwrite=True)
    assert artifacts.produce("copy", new, inputs={}, work=fill).manifest.config["factor"] == 2
    remove_artifact(Location(str(tmp_path / "c")))
    assert not (tmp_path / "c").exists()


def test_work_goes_on_with_a_file_whose_other_names_came_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(tmp_path / "a")
    let_time_pass(monkeypatch)
    share(Location(str(tmp_path / "a/state-1")), Location(str(tmp_path / "other/state-1")))
    artifacts.produce("copy", CopyConfig(output=str(tmp_path / "a")), inputs={}, work=fill)


def test_a_run_of_another_tool_that_came_after_a_killed_search_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(workspace: Workspace) -> None:
        raise KeyboardInterrupt

    output = tmp_path / "base.trec"
    with pytest.raises(KeyboardInterrupt):
        artifacts.produce("search", CopyConfig(output=str(output)), inputs={}, work=cut_off)
    let_time_pass(monkeypatch)
    output.write_text("precious")
    for factor in (1, 2):
        config = CopyConfig(output=str(output), factor=factor, overwrite=True)
        with pytest.raises(ArtifactConflictError, match=r"^base\.trec came to .* move it away"):
            artifacts.produce("search", config, inputs={}, work=lambda w: w.location.write_text("ours"))
    assert output.read_text() == "precious"


def test_names_are_kept_in_short_and_come_back() -> None:
    names = [
        *(f"v/part-{n:05d}.parquet" for n in (0, 1, 2, 7, 99999)),
        "v/part-100000.parquet",
        "a",
        "d2/b",
        "x-9-of-10",
    ]
    short = artifact_files.packed(names)
    assert sorted(artifact_files.unpacked(short)) == sorted(names)
    assert len(short) == 7
    assert len(artifact_files.packed(f"part-{n:06d}" for n in range(244_000))) == 1


def test_what_the_new_stage_would_take_for_its_own_work_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(artifact_files.STAGE_FILES, "other", ("rows/part-*",))
    lay(tmp_path, "laid/rows/part-0", "elsewhere/part-0")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "rows").symlink_to(tmp_path / "elsewhere")
    for name, said in (("laid", r"holds rows/part-0 that .* move it away"), ("linked", "holds rows that")):
        output = tmp_path / name
        (output / "rows").rename(tmp_path / "rows")
        make(CopyConfig(output=str(output)), [])
        (tmp_path / "rows").rename(output / "rows")
        before = tree(output)
        with pytest.raises(ArtifactConflictError, match=said):
            artifacts.produce("other", CopyConfig(output=str(output), overwrite=True), inputs={}, work=lambda w: None)
        assert tree(output) == before


def test_a_link_that_stands_for_our_file_goes_without_what_it_leads_to(tmp_path: Path) -> None:
    output = tmp_path / "a"
    artifacts.produce("copy", CopyConfig(output=str(output)), inputs={"corpus": "c1"}, work=fill)
    lay(tmp_path, "folder/x", "file")
    for number, target in enumerate(("folder", "file", "nowhere")):
        (output / f"state-{number}").unlink()
        (output / f"state-{number}").symlink_to(tmp_path / target)
    make(CopyConfig(output=str(output), factor=2, overwrite=True), [])
    assert sorted(path.name for path in output.iterdir()) == ["data.txt", "manifest.json"]
    assert (tmp_path / "folder" / "x").read_text() == (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["mine.trec", "mine.trec/x", "mine.trec.manifest.json", "mine.trec.building.json"])
def test_a_run_of_another_tool_is_refused(name: str, overwrite: bool, tmp_path: Path) -> None:
    lay(tmp_path, name)
    with pytest.raises(ArtifactConflictError, match=r"mine\.trec' holds mine\.trec.* that no stage of readapt made"):
        artifacts.produce(
            "search",
            CopyConfig(output=str(tmp_path / "mine.trec"), overwrite=overwrite),
            inputs={},
            work=lambda w: w.location.write_text("ours"),
        )
    assert (tmp_path / name).read_text() == "precious"


def test_runs_lie_beside_each_other_and_beside_other_files(tmp_path: Path) -> None:
    lay(tmp_path, "bm25.trec", "notes.txt", "mine/x")
    for factor in (1, 2):
        config = CopyConfig(output=str(tmp_path / "base.trec"), factor=factor, overwrite=True)
        artifacts.produce("search", config, inputs={}, work=lambda w: w.location.write_text("ours"))
    names = ["base.trec", "base.trec.manifest.json", "bm25.trec", "mine", "mine/x", "notes.txt"]
    assert sorted(tree(tmp_path)) == names


@pytest.mark.parametrize("content", ["", '{"sta', '{"stage": "copy", "fin'])
def test_a_driver_that_was_killed_at_its_first_lease_is_followed(content: str, tmp_path: Path) -> None:
    (tmp_path / "building.json").write_text(content)
    (tmp_path / ".tmp-0123456789ab-building.json").write_text("half")
    make(CopyConfig(output=str(tmp_path)), [])
    assert (tmp_path / "data.txt").read_text() == "1"
    assert not (tmp_path / "building.json").exists()


def test_records_of_other_programs_are_none_whatever_they_hold(tmp_path: Path) -> None:
    """A building of a map, a manifest in UTF-16, one that is no JSON, and one that also names a stage."""
    lay(tmp_path, "a/x", "b/x", "c/x", "d/x", "e/x")
    (tmp_path / "a/building.json").write_text('{"stage": "built", "owner": "ACME", "height_m": 300}')
    (tmp_path / "b/manifest.json").write_bytes('{"name": "\u00fcber"}'.encode("utf-16"))
    (tmp_path / "c/manifest.json").write_text("// not JSON\n{}")
    (tmp_path / "d/manifest.json").write_text('{"stage": "prod", "fingerprint": "ab:cd"}')
    (tmp_path / "e/manifest.json").write_bytes(b"\xff\xfe\x00")
    assert artifacts.names_under(Location(str(tmp_path))) == []
    for name in "abcde":
        assert artifacts.read_manifest(str(tmp_path / name)) is None
        assert artifacts.read_lease(str(tmp_path / name)) is None
        with pytest.raises(ArtifactMissingError, match="holds no manifest"):
            artifacts.open_artifact(str(tmp_path / name), "copy")


@pytest.mark.parametrize("content", ["thesis", "[1]", '{"rows": 3}'])
def test_results_of_another_program_are_refused(content: str, tmp_path: Path) -> None:
    file, beside = Location(str(tmp_path / "compare.json")), Location(str(tmp_path / "compare.md"))
    outputs.refuse_foreign_results(file, {"rows", "corpus"}, beside)
    file.write_text(content)
    with pytest.raises(ArtifactConflictError, match=r"compare\.json is there, and readapt did not write it"):
        outputs.refuse_foreign_results(file, {"rows", "corpus"}, beside)
    file.delete()
    beside.write_text("# Thesis")
    with pytest.raises(ArtifactConflictError, match=r"compare\.md is there"):
        outputs.refuse_foreign_results(file, {"rows", "corpus"}, beside)
    file.write_text('{"rows": [], "corpus": "c"}')
    outputs.refuse_foreign_results(file, {"rows", "corpus"}, beside)


def test_an_artifact_of_a_release_without_a_new_option_is_complete_if_the_option_has_its_default(
    tmp_path: Path,
) -> None:
    class OlderConfig(StageConfig):
        text: str = "a"

    class NewerConfig(OlderConfig):
        copies: int = 1

    def done(config: StageConfig) -> str:
        return artifacts.produce("copy", config, inputs={}, work=lambda w: ran.append(w.fingerprint)).fingerprint

    output, ran = str(tmp_path), list[str]()
    assert done(OlderConfig(output=output)) == done(NewerConfig(output=output)) == ran[0]
    assert len(ran) == 1
    for changed in (NewerConfig(output=output, copies=2), NewerConfig(output=output, text="b")):
        with pytest.raises(ArtifactConflictError):
            done(changed)


def test_input_refused_after_a_folder_was_made_leaves_no_trace(tmp_path: Path) -> None:
    def refuse(workspace: Workspace) -> None:
        (workspace.location / "passages").local_path.mkdir()
        raise InputError("row 3 has no text")

    for corpus in ("broken", "broken, too"):
        with pytest.raises(InputError, match="row 3"):
            artifacts.produce("copy", CopyConfig(output=str(tmp_path / "a")), inputs={"corpus": corpus}, work=refuse)
        assert tree(tmp_path / "a") == {}


def test_a_single_file_artifact_keeps_its_manifest_beside_it(tmp_path: Path) -> None:
    config = CopyConfig(output=str(tmp_path / "runs" / "base.trec"))

    def work(workspace: Workspace) -> None:
        workspace.location.write_text("q1 Q0 d1 1 0.5 tag\n")

    artifacts.produce("search", config, inputs={}, work=work)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["base.trec", "base.trec.manifest.json"]
    assert artifacts.open_artifact(config.output, "search").manifest.stage == "search"


@pytest.mark.parametrize("content", ["", "{", '{\n  "st', '{"stage": "copy", ', "\0\0\0\0"])
def test_a_broken_manifest_is_named_and_listed(content: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(content)
    assert artifacts.names_under(Location(str(tmp_path))) == ["."]
    with pytest.raises(CorruptFileError, match=r"manifest\.json"):
        artifacts.read_manifest(str(tmp_path))


def test_another_stage_and_a_missing_folder_are_told_apart(tmp_path: Path) -> None:
    make(CopyConfig(output=str(tmp_path / "a")), [])
    with pytest.raises(ArtifactMissingError, match="is the output of 'copy'"):
        artifacts.open_artifact(str(tmp_path / "a"), "ingest")
    with pytest.raises(ArtifactMissingError, match="does not exist"):
        artifacts.open_artifact(str(tmp_path / "b"), "ingest")


WRITER = """
import sys, time
from tests.test_artifacts import CopyConfig
from readapt_ray import artifacts

def work(workspace):
    (workspace.location / "part-0").write_text("kept")
    print("working", flush=True)
    time.sleep(3600)

artifacts.produce("copy", CopyConfig(output=sys.argv[1]), inputs={}, work=work)
"""


def test_a_killed_writer_is_followed_and_a_living_one_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "_beats", lambda *_: pytest.fail("a writer of this machine is watched"))
    output = str(tmp_path / "a")
    writer = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WRITER), output],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "working\n"
        lease = artifacts.read_lease(output)
        assert lease is not None
        assert leases.is_alive(lease)
        with pytest.raises(ArtifactConflictError, match=f"process {writer.pid}"):
            artifacts.produce("copy", CopyConfig(output=output), inputs={}, work=lambda w: None)
    finally:
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
    assert not leases.is_alive(lease)
    seen = []
    artifacts.produce(
        "copy", CopyConfig(output=output), inputs={}, work=lambda w: seen.append((w.location / "part-0").read_text())
    )
    assert seen == ["kept"]


def test_errors_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(ArtifactConflictError("the message")))
    assert isinstance(error, InputError)
    assert str(error) == "the message"
    assert error.exit_code == 2


def test_the_fingerprint_does_not_depend_on_the_order_of_keys() -> None:
    assert artifacts.fingerprint({"a": 1, "b": [1, 2]}) == artifacts.fingerprint(json.loads('{"b": [1, 2], "a": 1}'))
    assert artifacts.fingerprint({"a": 1}) != artifacts.fingerprint({"a": "1"})


def test_refused_input_leaves_no_trace_so_that_mended_input_is_taken(tmp_path: Path) -> None:
    def refuse(workspace: Workspace) -> None:
        raise InputError("row 3 has no text")

    with pytest.raises(InputError, match="row 3"):
        artifacts.produce("copy", CopyConfig(output=str(tmp_path / "a")), inputs={"corpus": "broken"}, work=refuse)
    made = artifacts.produce(
        "copy", CopyConfig(output=str(tmp_path / "a")), inputs={"corpus": "mended"}, work=lambda w: None
    )
    assert made.manifest.inputs == {"corpus": "mended"}


def test_a_finished_artifact_holds_nothing_of_workers_that_were_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        artifacts, "_fill", artifacts._fill.__wrapped__
    )  # without conftest's check: some files are others'

    def work(workspace: Workspace) -> None:
        (workspace.location / "deep" / "part").write_text("whole")
        for name in ("deep/.tmp-0123456789ab-part", "deep/.tmp-mine", "other/.tmp-0123456789ab-part"):
            lay(tmp_path / "a", name)

    made = artifacts.produce("copy", CopyConfig(output=str(tmp_path / "a")), inputs={}, work=work)
    assert sorted(path.name for path in (tmp_path / "a" / "deep").iterdir()) == [".tmp-mine", "part"]
    assert (tmp_path / "a" / "other" / ".tmp-0123456789ab-part").read_text() == "precious"
    assert made.manifest.files


def test_going_on_removes_what_killed_writers_left(tmp_path: Path) -> None:
    def fail(workspace: Workspace) -> None:
        (workspace.location / "deep" / "part").write_text("whole")
        workspace.location.local_path.joinpath("deep", ".tmp-0123456789ab-part").write_text("half")
        lay(tmp_path / "a", "deep/.tmp-mine", "other/.tmp-0123456789ab-part")
        raise RuntimeError("power cut")

    config = CopyConfig(output=str(tmp_path / "a"))
    with pytest.raises(RuntimeError):
        artifacts.produce("copy", config, inputs={}, work=fail)
    artifacts.produce("copy", config, inputs={}, work=lambda w: None)
    assert sorted(path.name for path in (tmp_path / "a" / "deep").iterdir()) == [".tmp-mine", "part"]
    assert (tmp_path / "a" / "other" / ".tmp-0123456789ab-part").read_text() == "precious"
