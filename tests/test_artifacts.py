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
