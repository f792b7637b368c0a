"""Verify the checksum of a local file once per node: marks in the cache say which files were verified.

A mark identifies the file by device, inode, size and modification time, so a hard link to it in another artifact is not
read again. Processes that want the same file wait for the one that reads it. A mark is a file of one letter, and is
removed after a month without use.
"""

import fcntl
import hashlib
import logging
import time
from pathlib import Path

from readapt_ray import environment
from readapt_ray.errors import CorruptFileError

logger = logging.getLogger("readapt_ray")

_FOLDER = "whole-files"
_KEPT_S = 30 * 86_400


def check_whole(file: Path, sha256: str, *, name: str = "") -> None:
    """Check the SHA-256 of a file, whose content is read once per node.

    If the cache folder cannot be written, each process reads it, and a warning is logged.

    Args:
        file: on this machine.
        sha256: of its content.
        name: name of the original, for errors, if the file is a copy.

    Raises:
        CorruptFileError: the file is gone, cut short or altered.
    """
    try:
        state = file.stat()
    except FileNotFoundError as error:
        raise CorruptFileError(f"{name or file} is gone; run `readapt index` again") from error
    key = f"{state.st_dev}:{state.st_ino}:{state.st_size}:{state.st_mtime_ns}:{sha256}"
    mark = environment.cache_folder() / _FOLDER / hashlib.sha256(key.encode()).hexdigest()[:32]
    try:
        _check_once(file, sha256, mark, name)
    except OSError as error:
        logger.warning("the checksum of %s is computed again by each process: %s", file, error)
        _check(file, sha256, name)


def _check_once(file: Path, sha256: str, mark: Path, name: str) -> None:
    mark.parent.mkdir(parents=True, exist_ok=True)
    with mark.open("a+") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        stream.seek(0)
        if not stream.read():
            _check(file, sha256, name)
            stream.write("w")
            _remove_old(mark.parent)
    mark.touch()


def _check(file: Path, sha256: str, name: str) -> None:
    with file.open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != sha256:
            raise CorruptFileError(
                f"{name or file} was cut short or altered: its checksum is not the one in the manifest; run `readapt index` again"
            )


def _remove_old(folder: Path) -> None:
    for each in folder.iterdir():
        if each.stat().st_mtime < time.time() - _KEPT_S:
            each.unlink(missing_ok=True)
