"""Read, write and list files and folders on any filesystem that `pyarrow.fs` opens by URI.

A `Location` is a local path or a URI (`s3://bucket/folder`, `gs://...`). Writes are atomic: a file is written under a
temporary name, then renamed (`object_streams.py`), so a reader never sees half a file. Requests that an object store
throttles are retried. A full disk or a missing permission raises an error that names the folder.
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow.fs as pafs

from readapt_ray import object_streams, ranged_reads
from readapt_ray.errors import InputError, StorageError
from readapt_ray.filesystems import check_uri, extended, listed, open_filesystem, sibling

_CHUNK_BYTES = 8 << 20
_TEMPORARY = ".tmp-"
_TEMPORARY_NAME = re.compile(rf"{re.escape(_TEMPORARY)}[0-9a-f]{{12}}-(.+)")
_MAX_COPY_BYTES = 5 << 30
"""The largest object that S3 copies in one request."""
_MAX_REPLACED = 2
"""How often an object that does not parse as JSON is read again."""
_FULL = {errno.ENOSPC: "no space is left on its disk", errno.EDQUOT: "the quota of its disk is used up"}
_FORBIDDEN = {
    errno.EACCES: "this user may not write there",
    errno.EPERM: "this user may not change it",
    errno.EROFS: "its disk is mounted read-only",
}


@dataclass(frozen=True)
class Location:
    """A file or folder, given by a local path or a URI. Two locations are equal if their `uri` texts are equal."""

    uri: str

    def __post_init__(self) -> None:
        check_uri(self.uri)

    @property
    def _opened(self) -> tuple[pafs.FileSystem, str]:
        """The filesystem and the path in it. A forked process opens it again, because connections cannot be shared."""
        pid, filesystem, path = self.__dict__.get("_opened_by", (None, None, ""))
        if filesystem is None or (pid != os.getpid() and not isinstance(filesystem, pafs.LocalFileSystem)):
            filesystem, path = open_filesystem(self.uri)
            self.__dict__["_opened_by"] = (os.getpid(), filesystem, path)
        return filesystem, path

    def __getstate__(self) -> dict[str, str]:
        return {"uri": self.path if self.is_local else self.uri}  # a worker has another current folder

    def __setstate__(self, state: dict[str, str]) -> None:
        object.__setattr__(self, "uri", state["uri"])

    def __str__(self) -> str:
        return self.uri

    @property
    def filesystem(self) -> pafs.FileSystem:
        """The pyarrow filesystem of this location."""
        return self._opened[0]

    @property
    def path(self) -> str:
        """The path inside `filesystem`."""
        return self._opened[1]

    @property
    def is_local(self) -> bool:
        """Whether the location is on this machine's disk."""
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    @property
    def local_path(self) -> Path:
        """The path on this machine.

        Raises:
            InputError: the location is not on this machine's disk.
        """
        if not self.is_local:
            raise InputError(f"{self.uri!r} is not on a local disk; copy it to one first")
        return Path(self.path)

    @property
    def name(self) -> str:
        """The last component of the path."""
        return self.path.rstrip("/").rsplit("/", 1)[-1]

    def __truediv__(self, part: str) -> "Location":
        return Location(extended(self.uri, f"/{part}"))

    def sibling(self, name: str) -> "Location":
        """Return the location of `name` in the same folder."""
        return Location(sibling(self.uri, name))

    def beside(self, suffix: str) -> "Location":
        """Return the location whose name is this one plus a suffix."""
        return Location(extended(self.uri, suffix))

    def exists(self) -> bool:
        """Return whether there is a file or folder."""
        return bool(self.info().type != pafs.FileType.NotFound)

    def is_file(self) -> bool:
        """Return whether there is a file."""
        return bool(self.info().type == pafs.FileType.File)

    def is_folder(self) -> bool:
        """Return whether there is a folder."""
        return bool(self.info().type == pafs.FileType.Directory)

    def size_bytes(self) -> int:
        """Return the length of the file in bytes; FileNotFoundError if there is no file."""
        if (size := self.info().size) is None:
            raise FileNotFoundError(errno.ENOENT, "there is no file", self.uri)
        return int(size)

    def info(self) -> pafs.FileInfo:
        """Return type (NotFound if there is nothing), size and modification time, as the filesystem reports them."""
        return self.filesystem.get_file_info(self.path)

    def files(self, suffix: str = "", *, recursive: bool = False) -> list["Location"]:
        """Return the files in this folder, sorted by name; an empty list if the folder does not exist.

        `recursive` adds the files of its subfolders. Temporary files of unfinished writes are left out.
        """
        return [self / relative for relative, _ in self.listing(suffix, recursive=recursive)]

    def listing(self, suffix: str = "", *, recursive: bool = False) -> list[tuple[str, pafs.FileInfo]]:
        """List the same files as `files`, each as its path relative to this folder and its `pafs.FileInfo`."""
        selector = pafs.FileSelector(self.path, allow_not_found=True, recursive=recursive)
        found = []
        for info in listed(self.filesystem, selector):
            relative = info.path[len(self.path.rstrip("/")) + 1 :]
            is_temporary = info.base_name.startswith(_TEMPORARY)
            if info.type == pafs.FileType.File and relative.endswith(suffix) and not is_temporary:
                found.append((relative, info))
        return sorted(found, key=lambda pair: pair[0])

    def children(self) -> tuple[list[str], list[str]]:
        """Return the names of the files, and those of the folders, directly in this folder, without temporary ones."""
        selector = pafs.FileSelector(self.path, allow_not_found=True)
        infos = [each for each in listed(self.filesystem, selector) if not each.base_name.startswith(_TEMPORARY)]
        files = [each.base_name for each in infos if each.type == pafs.FileType.File]
        folders = [each.base_name for each in infos if each.type == pafs.FileType.Directory]
        return sorted(files), sorted(folders)

    def entries(self, *, recursive: bool = True) -> tuple[list[str], list[str]]:
        """List everything in this folder, temporary files too: relative paths of files, and of folders, each sorted.

        Links are not followed and count as files. Both lists are empty if the folder does not exist.
        """
        files: list[str] = []
        folders: list[str] = []
        start = len(self.path.rstrip("/")) + 1
        if self.is_local:
            for parent, inner, names in os.walk(self.path):
                paths = [os.path.join(parent, name) for name in inner]
                links = [path for path in paths if os.path.islink(path)]
                files += [path[start:] for path in (*links, *(os.path.join(parent, name) for name in names))]
                folders += [path[start:] for path in paths if path not in links]
                if not recursive:
                    break
        else:
            selector = pafs.FileSelector(self.path, allow_not_found=True, recursive=recursive)
            for info in listed(self.filesystem, selector):
                (folders if info.type == pafs.FileType.Directory else files).append(info.path[start:])
        return sorted(files), sorted(folders)

    def read_bytes(self) -> bytes:
        """Return the content of the file.

        Raises:
            FileNotFoundError: there is none.
        """
        if not self.is_local:
            return b"".join(ranged_reads.pieces(*self._opened))
        with self.open_input() as file:
            return bytes(file.read())

    def read_text(self) -> str:
        """Return the content of the file, decoded as UTF-8."""
        return self.read_bytes().decode("utf-8")

    def read_json(self) -> Any:
        """Return the content of a JSON file that other processes may replace.

        An object is read up to the length that it had when it was opened. If a longer one replaces it meanwhile, the JSON
        is cut off and does not parse. Then it is read again, at most twice.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is not JSON.
        """
        for _ in range(0 if self.is_local else _MAX_REPLACED):
            with contextlib.suppress(ValueError):
                return json.loads(self.read_bytes())
        return json.loads(self.read_bytes())

    def open_input(self, *, max_bytes: int = 0) -> IO[bytes]:
        """Open a seekable binary file to read. A small object, or one of up to `max_bytes`, is fetched at once.

        Raises:
            FileNotFoundError: there is none.
            IsADirectoryError: the location is a folder.
        """
        try:
            file: IO[bytes] = self.filesystem.open_input_file(self.path)
        except OSError as error:  # pyarrow has no special error for a folder
            if self.is_local and self.local_path.is_dir():
                raise IsADirectoryError(errno.EISDIR, "it is a folder", self.path) from error
            raise
        return file if self.is_local else object_streams.read_if_small(file, max_bytes)

    def write_bytes(self, data: bytes) -> None:
        """Write the whole file, replacing an existing one.

        Raises:
            StorageError: the disk is full, or this user may not write there.
        """
        with self.open_output() as stream:
            stream.write(data)

    def write_text(self, text: str) -> None:
        """Write the whole file as UTF-8, replacing an existing one."""
        self.write_bytes(text.encode("utf-8"))

    def create_text(self, text: str) -> bool:
        """Create the file on a local disk unless it exists, and return whether it was created.

        If several processes try, only one gets True. This write is not atomic: a reader may see half of the text.

        Raises:
            StorageError: the disk is full, or this user may not write there.
        """
        file = self.local_path
        with self._refusals_named(_FULL | _FORBIDDEN):
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                stream = file.open("x", encoding="utf-8")
            except FileExistsError:
                return False
            try:
                with stream:
                    stream.write(text)
            except BaseException:
                file.unlink()
                raise
        return True

    @contextlib.contextmanager
    def open_output(self) -> Iterator[IO[bytes]]:
        """Open a binary file to write. It gets its final name, replacing a file there, if the block ends without error.

        Raises:
            StorageError: the disk is full, or this user may not write there.
        """
        parent, _, name = self.path.rpartition("/")
        temporary = f"{parent}/{_TEMPORARY}{uuid.uuid4().hex[:12]}-{name}"
        with self._refusals_named(_FULL | _FORBIDDEN):
            if self.is_local:
                self.filesystem.create_dir(parent, recursive=True)
            opened = object_streams.open_upload(self.filesystem, temporary)
        try:
            # A permission error here may come from a read in the caller's block; a full disk can only come from our write.
            with self._refusals_named(_FULL), opened as stream:
                yield stream
            with self._refusals_named(_FULL | _FORBIDDEN):
                if object_streams.is_held(opened):
                    opened.put(self.path)
                else:
                    self._publish(temporary)
        except BaseException:
            if not object_streams.is_held(opened):
                with contextlib.suppress(OSError):
                    self.filesystem.delete_file(temporary)
            raise

    @contextlib.contextmanager
    def _refusals_named(self, refusals: dict[int, str]) -> Iterator[None]:
        """Turn these operating system errors into a StorageError that names the folder."""
        try:
            yield
        except OSError as error:
            if error.errno not in refusals:
                raise
            full = error.errno in _FULL
            advice = "free some, or give another output" if full else "give a folder that can be written"
            again = "; run the same command again, it resumes where it stopped" if full else ""
            folder = self.uri.rpartition("/")[0]
            raise StorageError(f"cannot write to {folder}: {refusals[error.errno]}; {advice}{again}") from error

    def _publish(self, temporary: str) -> None:
        """Rename a written file to its final name."""
        if self.is_local:
            with Path(temporary).open("rb") as written:
                os.fsync(written.fileno())
        elif self.filesystem.get_file_info(temporary).size > _MAX_COPY_BYTES:
            object_streams.move_through(self.filesystem, temporary, self.path)
            return
        self.filesystem.move(temporary, self.path)

    def delete(self) -> None:
        """Remove the file, if it exists. Of a link, only the link is removed, not its target.

        Folders are never removed with their content: see `remove_if_empty`.

        Raises:
            StorageError: this user may not remove it.
        """
        with self._refusals_named(_FORBIDDEN), contextlib.suppress(FileNotFoundError):
            if self.is_local:
                os.unlink(self.path)
            else:
                self.filesystem.delete_file(self.path)

    def remove_if_empty(self) -> None:
        """Remove a local folder if it is empty. Does nothing on an object store, which has no empty folders."""
        if self.is_local:
            with contextlib.suppress(OSError):
                os.rmdir(self.path)

    def copy_to(self, target: "Location") -> None:
        """Copy the file, or the files of the folder, to `target`. The bytes go through this machine.

        Files of the same name are replaced; other files of a target folder stay. A file appears only when it is
        complete, but the files of a folder appear one by one.
        """
        if self.is_folder():
            for relative, _ in self.listing(recursive=True):
                (self / relative).copy_to(target / relative)
            return
        with target.open_output() as sink:
            for piece in self._pieces():
                sink.write(piece)

    def _pieces(self) -> Iterator[bytes]:
        """Yield the content of the file in order, in pieces of some megabytes."""
        if not self.is_local:
            yield from ranged_reads.pieces(*self._opened)
            return
        with self.filesystem.open_input_stream(self.path, compression=None) as source:
            while chunk := source.read(_CHUNK_BYTES):
                yield chunk

    def sha256(self) -> str:
        """Return the SHA-256 of the file as hex. The digest of an unchanged local file is cached in this process."""
        if not self.is_local:
            return self._sha256()
        state = Path(self.path).stat()
        return _sha256_of(self, (state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns))

    def _sha256(self) -> str:
        digest, chunk = hashlib.sha256(), memoryview(bytearray(_CHUNK_BYTES))
        with self.filesystem.open_input_stream(self.path, compression=None) as stream:
            while count := stream.readinto(chunk):
                digest.update(chunk[:count])
        return digest.hexdigest()

    def content_fingerprint(self, suffixes: tuple[str, ...] = ("",)) -> dict[str, str]:
        """Return a digest per file, by relative name: SHA-256 on a local disk, size and time on an object store.

        Of a folder, files with these suffixes count. Objects are not downloaded, because a corpus may have terabytes.
        """
        if self.is_file():
            infos = [(self.name, self, self.info())]
        else:
            listed = self.listing(recursive=True)
            infos = [(name, self / name, info) for name, info in listed if name.endswith(suffixes)]
        return {name: location.sha256() if self.is_local else state_of(info) for name, location, info in infos}


@functools.lru_cache(maxsize=4096)
def _sha256_of(location: Location, state: tuple[int, ...]) -> str:
    del state  # part of the cache key: a file that was written again has another state
    return location._sha256()


def state_of(info: pafs.FileInfo) -> str:
    """Return a file's size and modification time as text, to notice that it was written again."""
    return f"{info.size}:{info.mtime_ns}"


def name_when_whole(name: str) -> str | None:
    """Return the final name of a temporary file of `open_output`; None for any other file."""
    found = _TEMPORARY_NAME.fullmatch(name)
    return found[1] if found else None
