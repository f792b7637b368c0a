"""Model files on a node's disk: fetched once, locked, and fetched again where they are not what was fetched."""

import hashlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from readapt_ray.catalog import model_cache, models
from readapt_ray.errors import ModelError
from readapt_ray.storage import Location
from tests import factories

REPOSITORY = Path(__file__).parent.parent.parent
WEIGHTS = "model-00001-of-00002.safetensors"


@pytest.fixture
def uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model of two weight files, reached by a URI."""
    monkeypatch.setenv("READAPT_CACHE", str(tmp_path / "cache"))
    return f"file://{factories.tiny_decoder(tmp_path / 'model', shards=2)}"


def files(folder: Path) -> dict[str, tuple[tuple[int, int], bytes]]:
    """Which file on the disk each is, and what it holds."""
    return {each.name: ((each.stat().st_ino, each.stat().st_ctime_ns), each.read_bytes()) for each in folder.iterdir()}


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def alter_one_bit_and_the_clock(path: Path) -> None:
    times = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("spoil", [cut_short, alter_one_bit_and_the_clock, Path.unlink])
def test_a_cached_file_that_is_not_whole_is_fetched_again_and_no_other(
    uri: str, spoil: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    folder = models.open_model(uri).folder
    before = files(folder)
    spoil(folder / WEIGHTS)
    with caplog.at_level(logging.WARNING, "readapt_ray"):
        assert models.open_model(uri).folder == folder
    assert f"{WEIGHTS} was cut short, altered or removed; it is fetched again" in caplog.text
    after = files(folder)
    assert [name for name in before if after[name][0] != before[name][0]] == [WEIGHTS]
    assert {name: content for name, (_, content) in after.items()} == {n: content for n, (_, content) in before.items()}


def test_a_file_that_was_only_touched_is_kept(uri: str, caplog: pytest.LogCaptureFixture) -> None:
    path = models.open_model(uri).folder / WEIGHTS
    number = path.stat().st_ino
    os.utime(path)
    models.open_model(uri)
    assert path.stat().st_ino == number
    assert not caplog.records


def test_a_fetch_that_was_killed_goes_on_behind_the_last_whole_file(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[str] = []
    copy = Location.copy_to

    def interrupted(self: Location, target: Location) -> None:
        if len(copied) == 2:
            raise KeyboardInterrupt
        copied.append(self.name)
        copy(self, target)

    monkeypatch.setattr(Location, "copy_to", interrupted)
    with pytest.raises(KeyboardInterrupt):
        models.open_model(uri)
    first = list(copied)
    copied[:] = [""] * 3
    models.open_model(uri)
    assert not set(first) & set(copied)
    assert {*first, *copied[3:]} == {path.name for path in Path(uri.removeprefix("file://")).iterdir()}


def test_a_file_that_did_not_arrive_whole_is_an_error(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Location, "copy_to", lambda self, target: target.write_bytes(b"x"))
    with pytest.raises(
        ModelError, match=r"bytes and 1 arrived; it is being written, or the connection broke: run again"
    ):
        models.open_model(uri)


def test_processes_of_a_node_fetch_each_file_once(uri: str, tmp_path: Path) -> None:
    program = (
        "import sys, time\n"
        "from readapt_ray.catalog import models\n"
        "from readapt_ray.storage import Location\n"
        "copy = Location.copy_to\n"
        "def noted(self, target):\n"
        "    time.sleep(0.05)\n"
        "    print(self.name, flush=True)\n"
        "    copy(self, target)\n"
        "Location.copy_to = noted\n"
        "models.open_model(sys.argv[1])\n"
    )
    command = [sys.executable, "-c", program, uri]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) for _ in range(3)]
    fetched = "".join(process.communicate(timeout=300)[0] for process in processes).split()
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sorted(fetched) == sorted(path.name for path in (tmp_path / "model").iterdir())


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A snapshot as the hub's client lays it: links to files that are named by their content."""
    monkeypatch.setenv("READAPT_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "models--me--it" / "snapshots" / "0123abcd"
    blobs = tmp_path / "models--me--it" / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    small = json.dumps({"hidden_size": 8}).encode()
    for name, content, digest in (
        ("model.safetensors", b"weights", hashlib.sha256(b"weights").hexdigest()),
        ("config.json", small, hashlib.sha1(b"blob %d\0" % len(small) + small).hexdigest()),
    ):
        (blobs / digest).write_bytes(content)
        (folder / name).symlink_to(blobs / digest)
    return folder


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("spoil", [cut_short, alter_one_bit_and_the_clock])
def test_a_file_of_the_hubs_cache_that_is_not_its_name_is_fetched_again(
    snapshot: Path, name: str, spoil: Callable[[Path], None]
) -> None:
    asked: list[str] = []
    model_cache.checked_snapshot(snapshot, asked.append)
    blob, content = (snapshot / name).resolve(), (snapshot / name).read_bytes()
    spoil(blob)

    def fetch(file: str) -> None:
        asked.append(file)
        assert not (snapshot / file).exists()
        blob.write_bytes(content)
        (snapshot / file).symlink_to(blob)

    model_cache.checked_snapshot(snapshot, fetch)
    model_cache.checked_snapshot(snapshot, fetch)
    assert asked == [name]


def test_a_file_that_the_hub_gives_broken_twice_is_an_error(snapshot: Path) -> None:
    blob = (snapshot / "config.json").resolve()
    blob.write_bytes(b"{}")

    def fetch(file: str) -> None:
        blob.write_bytes(b"{}")
        (snapshot / file).symlink_to(blob)

    with pytest.raises(ModelError, match="is not what the hub has of it, fetched twice"):
        model_cache.checked_snapshot(snapshot, fetch)
