"""Disks, shared memory, the root and models of one machine."""

import errno
import functools
import importlib.util
import shutil
import threading
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from readapt_ray import cli
from readapt_ray.cluster import software
from readapt_ray.cluster.doctor import disks, here, machine
from readapt_ray.cluster.doctor.machine import CheckOptions, check_machine
from readapt_ray.cluster.doctor.root import Probe, check_root
from readapt_ray.errors import ModelError, StorageError
from readapt_ray.storage import Location
from tests import factories, object_store, small_disk

Usage = namedtuple("Usage", "total used free")
GB = 10**9


def usage(monkeypatch: pytest.MonkeyPatch, *, total: float, free: float) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(int(total), int(total - free), int(free)))


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests may write at the same time."""
    monkeypatch.setattr(disks, "_SLOW_BYTES_PER_S", 0.0)


def test_a_small_disk_that_is_full_and_one_that_may_not_be_written(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with small_disk.mounted(disk, 4 << 20) as is_there:
        if not is_there:
            pytest.skip("no right to mount")
        small_disk.fill(disk)
        found = disks.check_disks([disk / "ray", disk / "cache"])
        assert [problem.fails for problem in found.problems] == [True, True]
        assert f"{disk} has 0.0 of 0.0 GB free, too little to work; free some" in found.problems[0].text
        assert "cannot be written" in found.problems[1].text and str(errno.ENOSPC) in found.problems[1].text
        small_disk.free(disk)
        with small_disk.read_only(disk), pytest.raises(StorageError, match="mounted read-only; give a folder"):
            check_root(Location(str(disk / "run")), None)


@pytest.mark.parametrize(
    ("space", "text", "fails"),
    [
        ((1000 * GB, 30 * GB), "30.0 of 1000.0 GB free, too little", True),  # Ray does not spill above 95%
        ((100 * GB, 0.5 * GB), "0.5 of 100.0 GB free, too little", True),
        ((100 * GB, 15 * GB), "15 GB free; models of 7 billion", False),
    ],
)
def test_little_space(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, space: tuple[float, float], text: str, fails: bool
) -> None:
    usage(monkeypatch, total=space[0], free=space[1])
    (problem,) = disks.check_disks([tmp_path]).problems
    assert text in problem.text and problem.fails is fails


def test_a_slow_disk_is_no_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage(monkeypatch, total=1000 * GB, free=900 * GB)
    monkeypatch.setattr(disks, "_SLOW_BYTES_PER_S", 1e15)
    (problem,) = disks.check_disks([tmp_path, tmp_path / "not/there/yet"]).problems
    assert "use a local SSD" in problem.text and not problem.fails


def test_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    usage(monkeypatch, total=64 << 20, free=64 << 20)  # Docker's
    (problem,) = disks.check_shared_memory(0, num_gpus=8).problems
    assert problem.fails and "67 MB, and NCCL needs more between 8 GPUs; start the container" in problem.text
    (problem,) = disks.check_shared_memory(2 * GB, num_gpus=0).problems
    assert not problem.fails and "Ray's objects may take 2.0 GB" in problem.text
    assert not disks.check_shared_memory(0, num_gpus=0).problems


def test_a_root_is_written_read_and_left_as_it_was(tmp_path: Path) -> None:
    root = Location(str(tmp_path / "some" / "run"))
    assert check_root(root, None).shown.startswith("ok, ")
    assert not list(tmp_path.iterdir())
    probe = Probe(root)
    assert not probe.place().problems
    assert check_root(root, probe.name).shown.startswith("ok, ")
    (problem,) = check_root(Location(str(tmp_path)), probe.name).problems
    assert "is not on a disk that all nodes share" in problem.text
    probe.remove()
    assert not list(tmp_path.iterdir())


def test_a_root_on_an_object_store_and_a_bucket_that_is_not_there() -> None:
    with object_store.running() as store:
        before = set(store.names())
        probe = Probe(Location(f"s3://{object_store.BUCKET}/run"))
        assert not probe.place().problems
        assert not check_root(probe.root, probe.name).problems
        probe.remove()
        assert set(store.names()) - before <= {"run/"}  # the mark of a folder
        (problem,) = check_root(Location("s3://no-such-bucket/run"), None).problems
        assert "check the name of the bucket, and give the nodes' role" in problem.text


def test_models_that_are_here_missing_or_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = factories.tiny_decoder(tmp_path / "base")
    found = machine.check_models((str(base), "quickstart-retriever"), 300.0)
    assert found == machine.Finding("2 of 2")
    hang = threading.Event()
    with pytest.raises(ModelError) as missing:
        machine.check_reachable("no-such-model")

    def reach(name: str) -> int:
        if name == "a/b":
            hang.wait()
        if name == "no-such-model":
            raise missing.value
        return 0

    monkeypatch.setattr(machine, "check_reachable", reach)
    found = machine.check_models(("quickstart-retriever", "no-such-model", "a/b"), 3.0)
    assert found.shown == "1 of 3"
    said = [problem.text for problem in found.problems]
    assert said[0].startswith("no model 'no-such-model': not a folder") and "'a/b' was not found by then" in said[1]
    hang.set()


def test_models_for_which_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "check_reachable", lambda name: 15 * GB)
    usage(monkeypatch, total=1000 * GB, free=20 * GB)
    (problem,) = machine.check_models(("a/b", "c/d"), 300.0).problems
    assert "models to fetch take 30.0 GB and" in problem.text and "20.0 GB free; free some" in problem.text


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "PACKAGES", ("torch", "no_such_module"))
    (problem,) = machine.check_packages().problems
    assert problem.text.startswith("no_such_module cannot be imported; install")


def test_a_head_that_lacks_what_its_autoscaler_imports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not machine.check_packages().problems
    (tmp_path / "ray_bootstrap_config.yaml").write_text("provider: {type: aws}\n")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "boto3" else find_spec(name))
    (problem,) = machine.check_packages().problems
    assert problem.text.startswith("boto3 cannot be imported, so the autoscaler starts no nodes; build")
    (tmp_path / "ray_bootstrap_config.yaml").write_text("provider: {type: local}\n")
    assert not machine.check_packages().problems


def test_all_checks_of_a_machine_by_their_columns(tmp_path: Path) -> None:
    options = CheckOptions(root=str(tmp_path), models=("quickstart-retriever",), limit_s=300.0)
    found = check_machine(options)
    assert list(found) == ["packages", "GPUs", "shared memory", "disk", "root", "models"]


def run_file(folder: Path, retriever: str) -> Path:
    file = folder / "run.yaml"
    file.write_text(f"source: x\nroot: {folder / 'run'}\npretrained: quickstart-pretrained\nretriever: {retriever}\n")
    return file


@pytest.mark.parametrize(("retriever", "code"), [("quickstart-retriever", 0), ("no-such-model", 1)])
def test_the_command_takes_root_and_models_of_a_run_and_ends_with_1_if_something_will_fail(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, retriever: str, code: int
) -> None:
    usage(monkeypatch, total=1000 * GB, free=900 * GB)
    monkeypatch.setattr(here, "CheckOptions", functools.partial(CheckOptions, limit_s=300.0))
    assert cli.main(["doctor", "--config", str(run_file(tmp_path, retriever))]) == code
    said = capsys.readouterr()
    assert f"{2 - code} of 2" in said.out
    assert ("no model 'no-such-model'" in said.out) is bool(code)
    assert ("readapt: error: will fail: 1; fix what is listed" in said.err) is bool(code)
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]
