"""Real test collections, where they are at hand: nothing of them is in the repository."""

import os
import shutil
import tarfile
import tempfile
from pathlib import Path

import pytest

_REPOSITORY = Path(__file__).resolve().parent.parent


def data_folder() -> Path:
    """Where the archives lie: $READAPT_TEST_DATA, or shared/data beside the repository."""
    return Path(os.environ.get("READAPT_TEST_DATA") or _REPOSITORY.parent / "shared" / "data")


def collection(name: str) -> Path:
    """The unpacked folder of a collection, in a cache under the temporary folder; skips the test where it is absent."""
    archive = data_folder() / f"{name}.tar.xz"
    if not archive.is_file():
        pytest.skip(f"no {archive}: set READAPT_TEST_DATA to the folder with {archive.name}")
    stat = archive.stat()
    cache = Path(tempfile.gettempdir()) / f"readapt-test-data-{os.getuid()}"
    target = cache / f"{name}-{stat.st_size}-{stat.st_mtime_ns}"
    if not target.is_dir():
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        unpacked = Path(tempfile.mkdtemp(dir=cache))
        with tarfile.open(archive) as tar:
            tar.extractall(unpacked, filter="data")
        try:
            unpacked.rename(target)
        except OSError:  # another process was first
            shutil.rmtree(unpacked)
    return target / name


def case(name: str) -> Path:
    """A small input on which the product once failed, beside the archives; skips the test where it is absent."""
    path = data_folder().parent / "cases" / name
    if not path.exists():
        pytest.skip(f"no {path}: set READAPT_TEST_DATA to a folder that has cases/ beside it")
    return path
