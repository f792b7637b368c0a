"""Read and write small objects of an object store with one request each.

If a stream into S3 ends early, the part that was sent becomes a complete object. So writes are made atomic: an object
of up to 4 MB is collected in memory and put with one request. A larger one is written under a temporary name, and the
caller renames it, which takes some six requests. A small file is also read with one request, because reading a single
column of it would take several requests of 25 ms.
"""

import contextlib
import io
from typing import IO, Any, TypeGuard

import pyarrow as pa
import pyarrow.fs as pafs

_MAX_HELD_BYTES = 4 << 20
"""The largest object that is put with one request. S3 takes parts of at least 5 MB."""
_MAX_READ_BYTES = 512 << 10
"""The largest object that is read whole. For a larger one, the transfer takes longer than more requests for ranges."""
MAX_SCANNED_BYTES = 4 << 20
"""The largest object to read whole if two columns of all rows are needed: a Parquet file has a range per column and row
group."""
_CHUNK_BYTES = 8 << 20


class Upload(io.RawIOBase):
    """A writable stream that keeps up to 4 MB in memory, and writes a larger object to a temporary path.

    Args:
        filesystem: the store.
        temporary: the path for a large object.
    """

    def __init__(self, filesystem: pafs.FileSystem, temporary: str) -> None:
        self._filesystem, self._temporary = filesystem, temporary
        self._held = bytearray()
        self._stream: IO[bytes] | None = None
        self._num_bytes = 0

    @property
    def is_small(self) -> bool:
        """Whether all written bytes are in memory and none are in the store yet."""
        return self._stream is None

    def put(self, path: str) -> None:
        """Write a small object (see `is_small`) from memory to its final path, with one request."""
        with self._filesystem.open_output_stream(path, compression=None) as stream:
            stream.write(bytes(self._held))  # sent when the stream is closed

    def writable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return how many bytes were written."""
        return self._num_bytes

    def write(self, data: Any, /) -> int:
        """Write bytes, and return how many."""
        view = memoryview(data).cast("B")
        self._num_bytes += len(view)
        if self._stream is None and self._num_bytes <= _MAX_HELD_BYTES:
            self._held += view
            return len(view)
        if self._stream is None:
            self._stream = self._filesystem.open_output_stream(self._temporary, compression=None)
            self._stream.write(bytes(self._held))
            self._held.clear()
        self._stream.write(view)
        return len(view)

    def close(self) -> None:
        """Complete the temporary object of a large upload. A small one stays in memory."""
        if not self.closed and self._stream is not None:
            self._stream.close()
        super().close()


def open_upload(filesystem: pafs.FileSystem, temporary: str) -> Any:
    """Open a stream that writes to a temporary path. On S3 the first 4 MB are kept in memory (see `Upload`)."""
    if filesystem.type_name == "s3":
        return Upload(filesystem, temporary)
    return filesystem.open_output_stream(temporary, compression=None)


def is_held(stream: object) -> TypeGuard[Upload]:
    """Return whether a stream has a small object in memory that must be written with `put`."""
    return isinstance(stream, Upload) and stream.is_small


def read_if_small(file: Any, max_bytes: int = 0) -> Any:
    """Read an open file of an object store into memory if it is small (up to 512 KB); return a large one as it is.

    A file that is read is closed, and a stream of its bytes is returned.

    Args:
        file: the file, open for reading.
        max_bytes: read files up to this size as well, for callers that need most of the file.
    """
    if file.size() > max(_MAX_READ_BYTES, max_bytes):
        return file
    with file:
        return pa.BufferReader(file.read_buffer())


def move_through(filesystem: pafs.FileSystem, source: str, target: str) -> None:
    """Move a large object by copying it through this machine. If killed, it leaves no partial object at `target`."""
    try:
        with (
            filesystem.open_input_stream(source, compression=None) as read,
            filesystem.open_output_stream(target, compression=None) as written,
        ):
            while chunk := read.read(_CHUNK_BYTES):
                written.write(chunk)
    except BaseException:
        with contextlib.suppress(OSError):
            filesystem.delete_file(target)
        raise
    filesystem.delete_file(source)
