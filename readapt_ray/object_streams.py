"""Read and write small objects of a store by one request each.

What a stream into S3 sent when it ends early is seen as a whole object. So a small object is gathered in memory and put
at once: it is seen whole or not at all. One of more than 4 MB goes to a temporary name while it is written, and the caller
renames it, some six requests. Reading one column of a small file would take several requests of 25 ms, so it is read whole.
"""

import contextlib
import io
from typing import IO, Any, TypeGuard

import pyarrow as pa
import pyarrow.fs as pafs

_MAX_HELD_BYTES = 4 << 20
"""S3 takes parts of 5 MB at least, so up to there a stream is one request."""
_MAX_READ_BYTES = 512 << 10
"""A larger object is read in ranges: sending it whole would take longer than another request."""
MAX_SCANNED_BYTES = 4 << 20
"""An object up to this size is read whole for two columns of all its rows: a Parquet file has a range per column and row group."""
_CHUNK_BYTES = 8 << 20


class Upload(io.RawIOBase):
    """A writable stream that holds what is written until it is too much for one request.

    Args:
        filesystem: the store.
        temporary: where a large object goes.
    """

    def __init__(self, filesystem: pafs.FileSystem, temporary: str) -> None:
        self._filesystem, self._temporary = filesystem, temporary
        self._held = bytearray()
        self._stream: IO[bytes] | None = None
        self._num_bytes = 0

    @property
    def is_small(self) -> bool:
        """Whether all written bytes are still in memory and none are in the store."""
        return self._stream is None

    def put(self, path: str) -> None:
        """Write a small object."""
        with self._filesystem.open_output_stream(path, compression=None) as stream:
            stream.write(bytes(self._held))  # it is sent when the stream is closed

    def writable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return how many bytes were written."""
        return self._num_bytes

    def write(self, data: Any, /) -> int:
        """Take bytes."""
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
        """End the temporary object, if there is one."""
        if not self.closed and self._stream is not None:
            self._stream.close()
        super().close()


def open_upload(filesystem: pafs.FileSystem, temporary: str) -> Any:
    """Open a stream to write to a temporary name; into S3 only if it becomes large."""
    if filesystem.type_name == "s3":
        return Upload(filesystem, temporary)
    return filesystem.open_output_stream(temporary, compression=None)


def is_held(stream: object) -> TypeGuard[Upload]:
    """Return whether a stream holds a small object that is to be put."""
    return isinstance(stream, Upload) and stream.is_small


def read_if_small(file: Any, max_bytes: int = 0) -> Any:
    """Return a file of an object store as it is, or a small one from memory.

    Args:
        file: open for reading.
        max_bytes: a larger one, up to so many bytes, is small, too: for who reads something in all of it.
    """
    if file.size() > max(_MAX_READ_BYTES, max_bytes):
        return file
    with file:
        return pa.BufferReader(file.read_buffer())


def move_through(filesystem: pafs.FileSystem, source: str, target: str) -> None:
    """Move a large object through this machine; killed, it leaves nothing, since an upload ends with its last part."""
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
