"""Read an object of an object store in several ranges in parallel, because one stream gives only 50 to 100 MB/s.

Failed requests are retried here too: pyarrow does not recognise, and does not retry, a 503 answer whose body is longer
than the object.
"""

import collections
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import pyarrow.fs as pafs

_RANGE_BYTES = 16 << 20
_RANGES_AT_ONCE = 16
MAX_HELD_BYTES = _RANGES_AT_ONCE * _RANGE_BYTES
"""The most bytes of an object that are in memory at once."""
_ATTEMPTS = 6
_BACKOFF_S = 0.25

T = TypeVar("T")


def pieces(filesystem: pafs.FileSystem, path: str) -> Iterator[bytes]:
    """Yield the content of an object in order. At most `MAX_HELD_BYTES` of it are in memory.

    Raises:
        FileNotFoundError: the object does not exist.
    """
    with _with_retries(lambda: filesystem.open_input_file(path)) as file, ThreadPoolExecutor(_RANGES_AT_ONCE) as pool:
        size = _with_retries(file.size)

        def read(start: int) -> bytes:
            return _with_retries(lambda: bytes(file.read_at(min(_RANGE_BYTES, size - start), start)))

        pending: collections.deque[Future[bytes]] = collections.deque()
        for start in range(0, size, _RANGE_BYTES):
            pending.append(pool.submit(read, start))
            if len(pending) == _RANGES_AT_ONCE:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _with_retries(ask: Callable[[], T]) -> T:
    attempt = 0
    while True:
        try:
            return ask()
        except OSError as error:
            attempt += 1
            if isinstance(error, FileNotFoundError) or attempt == _ATTEMPTS:
                raise
            time.sleep(_BACKOFF_S * 2**attempt)
