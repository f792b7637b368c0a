"""A real disk of a few megabytes, to be filled or made read-only; where mounting is not permitted there is none."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

_FILLER = "filler"
_CHUNK_BYTES = 1 << 12


@contextlib.contextmanager
def mounted(folder: Path, num_bytes: int) -> Iterator[bool]:
    """A disk of this size at a folder while the block runs; False where mounting is not permitted."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", folder]
    is_there = subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield is_there
    finally:
        if is_there:
            subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path, *, leave_bytes: int = 0) -> None:
    """Leave so many free bytes on a disk."""
    with (disk / _FILLER).open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while _free_bytes(disk) > leave_bytes or not leave_bytes:
            file.write(bytes(_CHUNK_BYTES))
    assert _free_bytes(disk) <= leave_bytes


def free(disk: Path) -> None:
    """Take back what `fill` took."""
    (disk / _FILLER).unlink()


@contextlib.contextmanager
def read_only(disk: Path) -> Iterator[None]:
    """While the block runs nobody may write there, not even root."""
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)


def _free_bytes(disk: Path) -> int:
    found = os.statvfs(disk)
    return found.f_bavail * found.f_frsize
