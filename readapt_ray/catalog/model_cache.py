"""Fetch model files once per node into a cache on its disk, and verify them at each use.

In: files of a folder on an object store, or a snapshot in the hub's cache. Out: a local folder with the same bytes. A
record beside it has size, SHA-256 and modification times of each file. A file is fetched again if its size differs, or
if its times and its hash differ. One process at a time fetches; others on the node wait. A fetch that was killed
resumes after the last complete file. Hashing a file whose times changed takes a second per gigabyte. Least recently
used entries are evicted to make room (`cache_entries.py`).
"""

import hashlib
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from readapt_ray.catalog import cache_entries
from readapt_ray.errors import ModelError
from readapt_ray.storage import Location

logger = logging.getLogger("readapt_ray")

_SHA256 = re.compile(r"[0-9a-f]{64}")
_GIT_SHA1 = re.compile(r"[0-9a-f]{40}")
_PLANNED: dict[str, Any] = {"sha256": "", "times": []}
"""Record of a file that is not fetched yet."""


def fetched(source: Location, sizes_bytes: Mapping[str, int], key: str) -> Path:
    """Fetch files of a folder that are missing or damaged in the cache, and return the folder of the local copy.

    The copy is kept until this process ends.

    Args:
        source: the folder.
        sizes_bytes: sizes of the files to fetch, by relative name.
        key: identifies the content of the folder; the name of the copy.

    Raises:
        ModelError: a file arrived with another size.
    """
    target = cache_entries.folder_of("models") / key
    with cache_entries.locked(target):
        cache_entries.keep(target)
        record = _Record(target)
        missing = [name for name in sizes_bytes if not record.says_whole(target / name, name)]
        if missing:
            record.plan({name: sizes_bytes[name] for name in missing})
            cache_entries.make_room()
        for name in missing:
            size_bytes = sizes_bytes[name]
            if name in record:
                _say_broken(target / name)
            (source / name).copy_to(Location(str(target / name)))
            if (target / name).stat().st_size != size_bytes:
                raise ModelError(
                    f"{source / name} has {size_bytes:,} bytes and {(target / name).stat().st_size:,} arrived; it is being "
                    f"written, or the connection broke: run again"
                )
            record.note(target / name, name, _sha256(target / name))
    return target


def checked_snapshot(folder: Path, fetch_again: Callable[[str], object]) -> None:
    """Verify the files of a snapshot in the hub's cache by their hashes, and fetch damaged ones again.

    The hub's cache names a file by its content: SHA-256 of a large file, git's hash of a small one. Files that are no
    links, or whose name is no hash, are not verified.

    Args:
        folder: a snapshot: links to such files.
        fetch_again: function that fetches the file of a name, after the damaged one was removed.

    Raises:
        ModelError: a file is damaged even after it was fetched again.
    """
    entry = cache_entries.folder_of("models") / f"hub-{hashlib.sha256(str(folder).encode()).hexdigest()[:32]}"
    with cache_entries.locked(entry):
        record = _Record(entry)
        for link in sorted(path for path in folder.rglob("*") if path.is_symlink()):
            name = str(link.relative_to(folder))
            if record.says_whole(link, name) or _is_its_name(link, name, record):
                continue
            _say_broken(link)
            link.resolve().unlink(missing_ok=True)
            link.unlink()
            fetch_again(name)
            if not _is_its_name(link, name, record):
                raise ModelError(f"{link} is not what the hub has of it, fetched twice; check the disk and HF_ENDPOINT")


def _is_its_name(link: Path, name: str, record: "_Record") -> bool:
    """Return whether a file of the hub's cache has the hash that is its name. A file with another name is accepted."""
    path = link.resolve()
    if not path.is_file():
        return False
    sha256 = _sha256(path)
    if _SHA256.fullmatch(path.name) and sha256 != path.name:
        return False
    if _GIT_SHA1.fullmatch(path.name):  # a small file
        content = path.read_bytes()
        if hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest() != path.name:
            return False
    record.note(link, name, sha256)
    return True


class _Record:
    """A record of files by name: `size_bytes`, `sha256`, `times` (mtime, ctime in ns). Changes are written at once."""

    def __init__(self, entry: Path) -> None:
        self._entry = entry
        self._files: dict[str, dict[str, Any]] = cache_entries.noted_files(entry)

    def __contains__(self, name: str) -> bool:
        return bool(self._files.get(name, _PLANNED)["sha256"])

    def plan(self, sizes_bytes: Mapping[str, int]) -> None:
        """Record files before they are fetched, so that their bytes count and a killed fetch can be removed."""
        for name, size_bytes in sizes_bytes.items():
            self._files.setdefault(name, _PLANNED | {"size_bytes": size_bytes})
        cache_entries.note_files(self._entry, self._files)

    def says_whole(self, path: Path, name: str) -> bool:
        """Return whether a file agrees with its record; False if it has no record."""
        entry = self._files.get(name)
        if entry is None or name not in self or not path.is_file() or path.stat().st_size != entry["size_bytes"]:
            return False
        if _times(path) == entry["times"]:
            return True
        if _sha256(path) != entry["sha256"]:
            return False
        self.note(path, name, entry["sha256"])
        return True

    def note(self, path: Path, name: str, sha256: str) -> None:
        """Record size, hash and times of a complete file."""
        self._files[name] = {"size_bytes": path.stat().st_size, "sha256": sha256, "times": _times(path)}
        cache_entries.note_files(self._entry, self._files)


def _say_broken(path: Path) -> None:
    logger.warning("%s was cut short, altered or removed; it is fetched again", path)


def _times(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_mtime_ns, found.st_ctime_ns]


def _sha256(path: Path) -> str:
    return Location(str(path)).sha256()
