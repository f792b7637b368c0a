"""Fill, keep and evict entries of this machine's cache of models, texts and index shards.

One process at a time fills an entry. An entry is kept while a process uses it, and can be evicted afterwards.

In: the folder of an entry and the files that it will hold. Out: room for them, if other entries can be evicted. Beside
the folder NAME are NAME.json (its files, with `size_bytes`), NAME.lock (locked while the entry is filled or removed)
and NAME.use (locked by each process that uses the entry; its modification time is the time of last use). If the cache
is larger than READAPT_CACHE_GB, the least recently used entries are evicted. Of a folder, only the files that NAME.json
lists and unfinished writes are removed.
"""

import contextlib
import fcntl
import json
import logging
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from readapt_ray import environment
from readapt_ray.errors import StorageError
from readapt_ray.storage import Location, name_when_whole

logger = logging.getLogger("readapt_ray")

_GB = 1e9
_KINDS = ("models", "converted", "passages", "shards")
_NAME = re.compile(r"[0-9a-f]{32}")
_in_use: dict[Path, IO[str]] = {}
"""The open `.use` files of this process. Their locks end when the process ends, even if it is killed."""
_room = threading.RLock()


def folder_of(kind: str) -> Path:
    """Return the cache folder of a kind of entries. It may not exist yet.

    Args:
        kind: `models`, `converted` (pickled weights, GGUF), `passages` or `shards`.

    Raises:
        InputError: READAPT_CACHE is not a folder.
    """
    return environment.cache_folder() / kind


def files_record(entry: Path) -> Path:
    """Return the path of the JSON file (NAME.json) that lists the files of an entry; it may not exist yet."""
    return _beside(entry, ".json")


def note_files(entry: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Write NAME.json, and replace an earlier one. Call it before the files are written.

    Args:
        entry: the folder of the entry.
        files: a record with at least `size_bytes` for each file, by its name relative to the folder.
    """
    Location(str(files_record(entry))).write_text(json.dumps(files, indent=2) + "\n")


def reserve(entry: Path, sizes_bytes: Mapping[str, int], what: str, *, is_bounded: bool = False) -> None:
    """Reserve room in the cache for the files of an entry, and evict others for it. Call it inside `locked`.

    It writes NAME.json with these sizes, and removes it again if there is no room.

    Args:
        entry: the folder of the entry.
        sizes_bytes: sizes by file name, as far as they are known.
        what: name of the files in the error.
        is_bounded: also refuse if the cache would stay larger than READAPT_CACHE_GB, not only if the disk is too small.

    Raises:
        StorageError: there is no room.
    """
    num_bytes = sum(sizes_bytes.values())
    with _room:  # so that a failed reservation of one thread does not make another fail
        note_files(entry, {name: {"size_bytes": size} for name, size in sizes_bytes.items()})
        is_within, free_bytes = make_room(), shutil.disk_usage(entry.parent).free
        if num_bytes <= free_bytes and (is_within or not is_bounded):
            return
        files_record(entry).unlink()
    raise StorageError(
        f"{what} takes about {num_bytes / _GB:,.1f} GB, and {entry.parent} has {free_bytes / _GB:,.1f} GB free; set READAPT_CACHE "
        f"to a folder of a larger disk"
        if num_bytes > free_bytes
        else f"{what} takes about {num_bytes / _GB:,.1f} GB, and of the {environment.cache_gb():g} GB that the cache may hold "
        f"(READAPT_CACHE_GB) the rest is in use"
    )


def noted_files(entry: Path) -> dict[str, dict[str, Any]]:
    """Return what `note_files` wrote, by file name; empty if nothing was written, or it cannot be read."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return dict(json.loads(files_record(entry).read_text(encoding="utf-8")))
    return {}


@contextlib.contextmanager
def locked(entry: Path) -> Iterator[None]:
    """Lock an entry, so that no other process fills or removes it; wait while another process holds the lock.

    The folder of the entry need not exist. Do not nest it for one entry: it would wait for itself.
    """
    with _opened(_beside(entry, ".lock")) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def keep(entry: Path) -> None:
    """Keep an entry until this process ends, and set its time of last use. Call it inside `locked`.

    A second call only sets the time.
    """
    if entry not in _in_use:
        _in_use[entry] = open_use_lock(entry)
    _beside(entry, ".use").touch()


def open_use_lock(entry: Path) -> IO[str]:
    """Open and lock the `.use` file of an entry, which is kept until this file is closed. Call it inside `locked`."""
    file = _opened(_beside(entry, ".use"))
    fcntl.flock(file, fcntl.LOCK_SH)
    _beside(entry, ".use").touch()
    return file


def remove_unused(kind: str) -> None:
    """Remove all entries of a kind (see `folder_of`) that no process fills or uses."""
    for record in folder_of(kind).glob("*.json"):
        if _NAME.fullmatch(record.stem):
            remove_unless_used(record.with_suffix(""))


def make_room() -> bool:
    """Evict least recently used entries until the cache is within READAPT_CACHE_GB; return whether it is.

    Entries in use are kept, so the cache may remain larger. Call `note_files` for a new entry first, so that its files
    count before they are written.

    Raises:
        InputError: READAPT_CACHE_GB is not a number of 0 or more.
    """
    limit_bytes = environment.cache_gb() * _GB
    with _room:
        entries = sorted(_entries(), key=lambda each: each.last_used_s)
        total_bytes = sum(each.num_bytes for each in entries)
        for each in entries:
            if total_bytes <= limit_bytes:
                return True
            if remove_unless_used(each.folder):
                total_bytes -= each.num_bytes
                logger.info(
                    "removed %s (%.1f GB) from the cache, which may hold %g GB (READAPT_CACHE_GB); it was the "
                    "least recently used entry",
                    each.folder,
                    each.num_bytes / _GB,
                    environment.cache_gb(),
                )
    if total_bytes > limit_bytes:
        logger.info(
            "the cache holds %.1f GB, more than READAPT_CACHE_GB = %g: all of it is in use",
            total_bytes / _GB,
            environment.cache_gb(),
        )
    return total_bytes <= limit_bytes


def remove_unless_used(entry: Path) -> bool:
    """Remove an entry unless a process, this one too, fills or uses it; return whether it was removed."""
    with contextlib.ExitStack() as stack, contextlib.suppress(BlockingIOError):
        for suffix in (".lock", ".use"):  # in this order, since `.use` is opened and removed only under `.lock`
            file = stack.enter_context(_opened(_beside(entry, suffix)))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        remove_files(entry)
        _beside(entry, ".use").unlink()
        return True
    return False


def remove_files(entry: Path) -> None:
    """Remove the listed files of an entry, unfinished writes, and NAME.json. Call it inside `locked`.

    NAME.json is removed last, so that a removal that was killed can be repeated. A file that we did not write is kept.
    """
    for name in noted_files(entry):
        if (entry / name).resolve().is_relative_to(entry.resolve()):
            (entry / name).unlink(missing_ok=True)
    for path in entry.rglob("*"):
        if name_when_whole(path.name) and path.is_file():
            path.unlink()
    folders = [path for path in entry.rglob("*") if path.is_dir() and not path.is_symlink()]
    for folder in [*sorted(folders, reverse=True), entry]:
        with contextlib.suppress(OSError):  # it holds a file that we did not write
            folder.rmdir()
    files_record(entry).unlink(missing_ok=True)


@dataclass(frozen=True)
class _Entry:
    folder: Path
    num_bytes: int
    last_used_s: float


def _entries() -> Iterator[_Entry]:
    """Yield the entries that have a NAME.json."""
    for kind in _KINDS:
        for record in folder_of(kind).glob("*.json"):
            entry = record.with_suffix("")
            if not _NAME.fullmatch(entry.name):
                continue
            with contextlib.suppress(FileNotFoundError):  # another process is removing it
                use = _beside(entry, ".use")
                last_used_s = (use if use.exists() else record).stat().st_mtime
                num_bytes = sum(int(each["size_bytes"]) for each in noted_files(entry).values())
                yield _Entry(entry, num_bytes, last_used_s)


def _beside(entry: Path, suffix: str) -> Path:
    return entry.with_name(entry.name + suffix)


def _opened(path: Path) -> IO[str]:
    """Open a lock file, and make its folder.

    Raises:
        StorageError: the cache folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # On NFS a shared lock needs a file that can be read, and an exclusive one a file that can be written.
        return path.open("a+")
    except OSError as error:
        raise StorageError(
            f"the cache folder {environment.cache_folder()} cannot be written ({error.strerror or error}); set READAPT_CACHE to a "
            f"folder that this user may write"
        ) from error
