"""The model cache stays within its limit: the models that were not used for longest go, and nothing else does."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from readapt_ray import environment
from readapt_ray.catalog import models
from readapt_ray.errors import InputError, StorageError
from tests import factories

REPOSITORY = Path(__file__).parent.parent.parent
FIND = "import sys\nfrom readapt_ray.catalog import models\nprint(models.open_model(sys.argv[1]).folder, flush=True)\n"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds some two tiny models."""
    monkeypatch.setenv("READAPT_CACHE", str(tmp_path / "cache"))
    one = sum(path.stat().st_size for path in factories.tiny_decoder(tmp_path / "measured").iterdir())
    monkeypatch.setenv("READAPT_CACHE_GB", str(2.5 * one / 1e9))
    return tmp_path / "cache"


def made(folder: Path, *, pickled: bool, seed: int) -> str:
    """A model as it is named: by the URI of safetensors, or by the folder of pickled weights."""
    factories.tiny_decoder(folder, seed=seed)
    if not pickled:
        return f"file://{folder}"
    torch.save(factories.read_tensors(folder), folder / "pytorch_model.bin")
    for path in folder.glob("model*"):
        path.unlink()
    return str(folder)


@contextlib.contextmanager
def used_elsewhere(name: str) -> Iterator[Path]:
    """The folder of a model that another process found and uses."""
    command = [sys.executable, "-c", FIND + "sys.stdin.read()\n", name]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    assert process.stdout is not None
    try:
        yield Path(process.stdout.readline().strip())
    finally:
        process.communicate(timeout=300)


def used_before(name: str, *, seconds_ago: int) -> Path:
    """The folder of a model that a process found that has ended."""
    with used_elsewhere(name) as folder:
        pass
    use = folder.with_name(f"{folder.name}.use")
    at_s = use.stat().st_mtime - seconds_ago
    os.utime(use, (at_s, at_s))
    return folder


@pytest.mark.parametrize("pickled", [False, True])
def test_what_was_not_used_for_longest_makes_room(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture, pickled: bool
) -> None:
    names = [made(tmp_path / f"m{seed}", pickled=pickled, seed=seed) for seed in range(3)]
    older = used_before(names[0], seconds_ago=100)
    newer = used_before(names[1], seconds_ago=200)
    assert used_before(names[0], seconds_ago=100) == older  # found again, so newer than the other
    with caplog.at_level("INFO", "readapt_ray"):
        found = models.open_model(names[2]).folder
    assert (older.exists(), newer.exists(), found.exists()) == (True, False, True)
    assert f"removed {newer} (0.0 GB) from the cache" in caplog.text
    assert not [path for path in newer.parent.glob(f"{newer.name}*") if path.suffix != ".lock"]
    assert used_before(names[1], seconds_ago=0) == newer  # it is fetched again
    assert factories.read_tensors(newer)
    assert not older.exists()


def test_a_model_in_use_stays_however_long_ago_it_was_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = [made(tmp_path / f"m{seed}", pickled=False, seed=seed) for seed in range(4)]
    with used_elsewhere(names[0]) as used:
        os.utime(used.with_name(f"{used.name}.use"), (0, 0))
        other = used_before(names[1], seconds_ago=100)
        third = models.open_model(names[2]).folder
        assert (used.exists(), other.exists()) == (True, False)
        with caplog.at_level("INFO", "readapt_ray"):
            models.open_model(names[3])
        assert used.exists()
        assert third.exists()
        assert "more than READAPT_CACHE_GB" in caplog.text


def test_files_that_we_did_not_write_stay(tmp_path: Path, cache: Path) -> None:
    names = [made(tmp_path / f"m{seed}", pickled=False, seed=seed) for seed in range(3)]
    folders = [used_before(name, seconds_ago=100) for name in names[:2]]
    strangers = [
        folders[0] / "notes.txt",
        folders[0] / "mine/a.safetensors",
        cache / "models" / ("0" * 32) / "model.bin",
    ]
    for stranger in strangers:
        stranger.parent.mkdir(exist_ok=True)
        stranger.write_text("mine")
    (cache / "models/mine.json").write_text('{"a": {"size_bytes": 1000000000}}')
    models.open_model(names[2])
    assert [stranger.read_text() for stranger in strangers] == ["mine"] * 3
    assert (cache / "models/mine.json").exists()
    assert sorted(path.name for path in folders[0].iterdir()) == ["mine", "notes.txt"]


def test_a_fetch_that_was_killed_is_removed_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [made(tmp_path / f"m{seed}", pickled=False, seed=seed) for seed in range(3)]
    killed = used_before(names[0], seconds_ago=100)
    kept = used_before(names[1], seconds_ago=0)
    (killed / ".tmp-0123456789ab-model.safetensors").write_bytes(b"half")
    models.open_model(names[2])
    assert not killed.exists()
    assert kept.exists()


def test_a_removal_that_was_killed_is_no_whole_model(tmp_path: Path) -> None:
    name = made(tmp_path / "m", pickled=True, seed=0)
    folder = used_before(name, seconds_ago=0)
    (folder / "converted_from").unlink()
    (folder / "model.safetensors").unlink()
    assert models.open_model(name).folder == folder
    assert factories.read_tensors(folder)


@pytest.mark.parametrize("value", ["much", "-1", "inf"])
def test_a_limit_of_wrong_form_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("READAPT_CACHE_GB", value)
    name = made(tmp_path / "m", pickled=False, seed=0)
    with pytest.raises(InputError, match=f"READAPT_CACHE_GB = '{value}': must be a number of 0 or more, in gigabytes"):
        models.open_model(name)


def test_a_cache_that_cannot_be_written_is_named_with_the_variable_that_moves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = made(tmp_path / "m", pickled=True, seed=0)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("READAPT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(
        StorageError, match=r"file/cache cannot be written \(Not a directory\); set READAPT_CACHE to a folder"
    ):
        models.open_model(name)


def test_a_user_without_a_home_folder_is_told_to_set_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: int) -> None:
        raise KeyError

    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.delenv("READAPT_CACHE")
    with pytest.raises(InputError, match=r"'~/\.cache/readapt' is in a home folder.*set READAPT_CACHE to a folder"):
        environment.cache_folder()
    monkeypatch.setenv("READAPT_CACHE", "~nobody-of-this-name/cache")
    with pytest.raises(InputError, match="'~nobody-of-this-name/cache' is in a home folder"):
        environment.cache_folder()
    monkeypatch.setenv("READAPT_CACHE", str(tmp_path))
    assert environment.cache_folder() == tmp_path
