"""A disk that is really full, and one that nobody may write: one clear message, nothing lost, and the same command goes on."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from readapt_ray import cli, leases
from readapt_ray.artifacts import Workspace, produce
from readapt_ray.config import StageConfig
from readapt_ray.errors import StorageError
from readapt_ray.recipes import running
from readapt_ray.recipes.chain import RunConfig
from readapt_ray.retrieval.shard_ledger import LEDGER_NAME
from readapt_ray.storage import Location
from tests import factories, small_disk

DISK_BYTES = 8 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MB."""
    with small_disk.mounted(tmp_path / "disk", DISK_BYTES) as is_there:
        if not is_there:
            pytest.skip("mounting is not permitted")
        yield tmp_path / "disk"


def test_a_full_disk_keeps_the_old_file_and_is_named(disk: Path) -> None:
    file = Location(str(disk / "run")) / "a.bin"
    file.write_bytes(b"old")
    small_disk.fill(disk)
    with pytest.raises(StorageError, match=rf"cannot write to {disk}/run: no space is left on its disk; free some"):
        file.write_bytes(bytes(1 << 20))
    assert file.read_bytes() == b"old"
    assert [path.name for path in (disk / "run").iterdir()] == ["a.bin"]


def test_a_run_whose_disk_fills_up_ends_with_what_its_stage_says(
    disk: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Neither its log, which is on that disk, nor the note of what failed says anything of its own."""
    root = Location(str(disk / "root"))
    logger = logging.getLogger("readapt_ray")
    caplog.set_level("INFO", "readapt_ray")
    record = running._Record(root, RunConfig.model_construct(), [], {})
    with pytest.raises(StorageError, match="the stage says this"), running._logged(root), record.failures():
        logger.info("a line before")
        small_disk.fill(disk)
        for _ in range(1000):
            logger.info("a line that has no room")
        raise StorageError("the stage says this")
    said = capfd.readouterr()
    assert "Logging error" not in said.err and "Traceback" not in said.err
    small_disk.free(disk)
    with running._logged(root):
        logger.info("a line after")
    lines = (disk / "root" / running.LOG_NAME).read_text().splitlines()
    assert lines[0].endswith("a line before") and lines[-1].endswith("a line after")


def test_a_disk_that_may_not_be_written_is_named(disk: Path) -> None:
    file = Location(str(disk / "run")) / "a.bin"
    file.write_bytes(b"old")
    with small_disk.read_only(disk):
        for change in (lambda: file.write_bytes(b"new"), file.delete):
            with pytest.raises(StorageError, match=rf"cannot write to {disk}/run: its disk is mounted read-only"):
                change()
    assert file.read_bytes() == b"old"


class _Config(StageConfig):
    """Options of a stage that writes a file."""


def test_a_heartbeat_that_finds_the_disk_full_does_not_hide_what_went_wrong(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "_HEARTBEAT_S", 0.01)

    def work(workspace: Workspace) -> None:
        small_disk.fill(disk)
        raise RuntimeError("what went wrong")

    with pytest.raises(RuntimeError, match="what went wrong"):
        produce("merge", _Config(output=str(disk / "made")), inputs={}, work=work)
    small_disk.free(disk)
    made = produce("merge", _Config(output=str(disk / "made")), inputs={}, work=lambda workspace: None)
    assert made.manifest.stage == "merge"


@pytest.fixture
def stage(request: pytest.FixtureRequest) -> str:
    """A stage, with Ray where it needs it."""
    if request.param != "ingest":
        request.getfixturevalue("ray_session")
    return str(request.param)


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A source, a model with its contract, and a corpus on another disk."""
    folder = tmp_path_factory.mktemp("things")
    model = factories.write_contract(factories.tiny_decoder(folder / "model"))
    passages = factories.small_corpus(600)
    artifact = factories.ingest_artifact(folder / "corpus", passages, num_files=4)
    return {"source": str(artifact.location / "passages"), "model": str(model), "corpus": artifact.uri}


def commands(things: dict[str, str], root: Path) -> dict[str, list[str]]:
    model = ["--dtype", "float32", "--output"]
    packing = ["--pretrained", things["model"], "--corpus", things["corpus"], "--block-tokens", "64"]
    training = ["--num-cpus-per-worker", "1", "--batch-size", "64", "--checkpoint-every-s", "0", *model]
    return {
        "ingest": ["ingest", "--source", things["source"], "--rows-per-file", "100", "--output", str(root / "corpus")],
        "pack": ["pack", *packing, "--output", str(root / "blocks")],
        "embed": ["embed", "--retriever", things["model"], "--corpus", things["corpus"], *model, str(root / "vectors")],
        "train": ["train", *packing, *training, str(root / "adapter")],
    }  # fmt: skip


def content(root: Path) -> dict[str, Any]:
    """What a stage left, without what tells of times."""
    found: dict[str, Any] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.suffix == ".parquet":
            found[name] = pq.read_table(path).to_pydict()
        elif path.suffix == ".safetensors":
            found[name] = {key: tensor.tobytes() for key, tensor in load_file(path).items()}
        elif path.is_file():
            found[name] = ""
    return found


def refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one message of a command that must fail."""
    assert cli.main(command) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "readapt: " in line or "Traceback" in line]
    assert len(said) == 1, said
    return said[0]


@pytest.mark.parametrize(
    ("stage", "leave_bytes"),
    [
        ("ingest", 0),
        ("ingest", 24 << 10),
        ("pack", 40 << 10),
        pytest.param("embed", 0, marks=pytest.mark.slow),
        pytest.param("embed", 80 << 10, marks=pytest.mark.slow),
        pytest.param("train", 0, marks=pytest.mark.slow),
        pytest.param("train", 200 << 10, marks=pytest.mark.slow),
    ],
    indirect=["stage"],
)
def test_a_stage_on_a_full_disk_says_so_and_goes_on_when_there_is_room(
    stage: str, leave_bytes: int, disk: Path, things: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    calm = disk.parent / "calm"
    assert cli.main(commands(things, calm)[stage]) == 0
    capsys.readouterr()
    command = commands(things, disk / "run")[stage]
    small_disk.fill(disk, leave_bytes=leave_bytes)
    said = refused(command, capsys)
    assert f"cannot write to {disk}/run" in said
    assert "no space is left on its disk; free some" in said
    tables = {LEDGER_NAME, "blocks.parquet"}  # they grow with the files that they list
    written = {path: path.stat().st_mtime_ns for path in disk.rglob("*.parquet") if path.name not in tables}
    assert bool(written) == (leave_bytes > 0)
    assert not list(disk.rglob(".tmp-*"))
    small_disk.free(disk)
    assert cli.main(command) == 0
    assert content(disk / "run") == content(calm)
    assert {path: path.stat().st_mtime_ns for path in written} == written, "what was whole is not made again"


@pytest.mark.parametrize("stage", ["ingest", "embed", "train"], indirect=True)
def test_a_stage_on_a_disk_that_may_not_be_written_says_so(
    stage: str, disk: Path, things: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with small_disk.read_only(disk):
        said = refused(commands(things, disk / "run")[stage], capsys)
    assert f"cannot write to {disk}" in said
    assert "its disk is mounted read-only; give a folder that can be written" in said
