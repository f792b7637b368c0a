import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from readapt_ray import artifacts, leases
from readapt_ray.artifacts import Workspace
from readapt_ray.config import StageConfig
from readapt_ray.errors import ArtifactConflictError, ArtifactMissingError, CorruptFileError, InputError
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
    for moment in range(5):  # the manifest, three files and a folder
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


def test_a_folder_of_foreign_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.doc").write_text("precious")
    with pytest.raises(ArtifactConflictError, match="no stage of readapt made"):
        make(CopyConfig(output=str(tmp_path)), [])
    assert (tmp_path / "thesis.doc").read_text() == "precious"


def test_a_single_file_artifact_keeps_its_manifest_beside_it(tmp_path: Path) -> None:
    config = CopyConfig(output=str(tmp_path / "runs" / "base.trec"))

    def work(workspace: Workspace) -> None:
        workspace.location.write_text("q1 Q0 d1 1 0.5 tag\n")

    artifacts.produce("search", config, inputs={}, work=work)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["base.trec", "base.trec.manifest.json"]
    assert artifacts.open_artifact(config.output, "search").manifest.stage == "search"


def test_a_broken_manifest_is_named(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"stage": "copy", ')
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
    time.sleep(60)

artifacts.produce("copy", CopyConfig(output=sys.argv[1]), inputs={}, work=work)
"""


def test_a_killed_writer_is_followed_and_a_living_one_is_not(tmp_path: Path) -> None:
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
        building = artifacts.read_building(output)
        assert building is not None
        assert leases.is_alive(building)
        with pytest.raises(ArtifactConflictError, match=f"process {writer.pid}"):
            artifacts.produce("copy", CopyConfig(output=output), inputs={}, work=lambda w: None)
    finally:
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
    assert not leases.is_alive(building)
    seen = []
    started = time.monotonic()
    artifacts.produce(
        "copy", CopyConfig(output=output), inputs={}, work=lambda w: seen.append((w.location / "part-0").read_text())
    )
    assert seen == ["kept"]
    assert time.monotonic() - started < 10


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


def test_going_on_removes_what_killed_writers_left(tmp_path: Path) -> None:
    def fail(workspace: Workspace) -> None:
        (workspace.location / "deep" / "part").write_text("whole")
        workspace.location.local_path.joinpath("deep", ".tmp-1-part").write_text("half")
        raise RuntimeError("power cut")

    config = CopyConfig(output=str(tmp_path / "a"))
    with pytest.raises(RuntimeError):
        artifacts.produce("copy", config, inputs={}, work=fail)
    artifacts.produce("copy", config, inputs={}, work=lambda w: None)
    assert [path.name for path in (tmp_path / "a" / "deep").iterdir()] == ["part"]
