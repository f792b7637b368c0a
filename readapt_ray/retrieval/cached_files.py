"""Copy files of an object store to this node's disk, by the hash of their content, so that processes can map them.

In: a file of a store and its SHA-256. Out: its copy in the node's cache (`catalog/cache_entries.py`, kind `shards`). A
file is downloaded and verified once per node, for all indexes, versions and processes. If the disk has no room for it,
the reader loads the file from the store into memory.
"""

import logging

from readapt_ray.catalog import cache_entries
from readapt_ray.errors import CorruptFileError, StorageError
from readapt_ray.retrieval.whole_files import check_whole
from readapt_ray.storage import Location

logger = logging.getLogger("readapt_ray")

_FILE = "content"


def local_copy(file: Location, sha256: str, *, is_mapped: bool = True) -> Location:
    """Return a copy of a file on this node's disk; make the copy first if needed.

    A local file is returned as it is, unverified. The file itself is also returned, with a warning, if there is no room
    for a copy or the cache cannot be written.

    Args:
        file: local, or on an object store.
        sha256: of its content.
        is_mapped: keep the copy until this process ends. Otherwise it may be removed as soon as others need the room.

    Raises:
        CorruptFileError: a file of an object store is gone, or its checksum is wrong.
    """
    if file.is_local:
        return file
    entry = cache_entries.folder_of("shards") / sha256[:32]
    copy = Location(str(entry / _FILE))
    try:
        with cache_entries.locked(entry):
            if not _is_whole(copy, sha256):
                _load(file, sha256, copy)
            if is_mapped:
                cache_entries.keep(entry)
            else:
                cache_entries.open_use_lock(entry).close()
    except (OSError, StorageError) as error:
        logger.warning("%s is read into memory, not mapped from a copy on this node: %s", file, error)
        return file
    return copy


def _is_whole(copy: Location, sha256: str) -> bool:
    if not copy.is_file():
        return False
    try:
        check_whole(copy.local_path, sha256)
    except CorruptFileError:
        logger.warning("%s was cut short or altered; it is loaded again", copy)
        return False
    return True


def _load(file: Location, sha256: str, copy: Location) -> None:
    """Fill a cache entry; remove it again if that fails. Call it inside `cache_entries.locked`."""
    entry, size_bytes = copy.local_path.parent, file.info().size
    cache_entries.remove_files(entry)
    if size_bytes is None:
        raise CorruptFileError(f"{file} is gone; run `readapt index` again")
    try:
        cache_entries.reserve(entry, {_FILE: size_bytes}, f"a copy of {file}", is_bounded=True)
        file.copy_to(copy)
        check_whole(copy.local_path, sha256, name=str(file))
    except BaseException:
        cache_entries.remove_files(entry)
        raise
