"""Exchange records between tasks through files sorted by partition, so that each task reads only its partition.

A file has a header of offsets, and the records. A task that dies leaves no file, so it is run again. Keys are digests of
128 bits. Among ten billion passages, the chance that any two collide (and one is lost) is 1.5 in 10^19.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from readapt_ray.storage import Location

_THREADS = 16
_OFFSET_BYTES = 8

ID = np.dtype([("key", "<u8", 2), ("row", "<u8"), ("line", "<u8"), ("partition", "<u4"), ("size", "<u4")])
"""A passage keyed by the digest of its doc_id. `partition` is the partition of its content, `size` its bytes."""
CONTENT = np.dtype([("key", "<u8", 2), ("row", "<u8"), ("size", "<u4")])
"""A passage keyed by the digest of its title and text."""
ROW = np.dtype([("row", "<u8")])
MOVE = np.dtype([("row", "<u8"), ("kept", "<u8")])
"""The row of a dropped passage, and the row of the passage that is kept instead."""
ROW_BITS = 40
"""A row number is the number of the piece times 2^40, plus the index of the passage in the piece."""


def pieces_of(rows: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return the piece number of each row: int64 [N] for rows uint64 [N]."""
    return (rows >> np.uint64(ROW_BITS)).astype(np.int64)


def partition_of(keys: NDArray[np.uint64], num_partitions: int) -> NDArray[np.uint32]:
    """Return the partition of each digest: uint32 [N] for keys uint64 [N, 2]."""
    return (keys[:, 1] % np.uint64(num_partitions)).astype(np.uint32)


def write_partitions(
    location: Location, records: NDArray[np.void], partitions: NDArray[np.integer], num_partitions: int
) -> None:
    """Write records so that each partition can be read alone. Within a partition, records keep their order.

    Args:
        location: the file to write.
        records: structured array [N].
        partitions: the partition of each record, from 0 to num_partitions - 1: integers [N].
        num_partitions: number of partitions.
    """
    order = np.argsort(partitions, kind="stable")
    offsets = np.searchsorted(partitions[order], np.arange(num_partitions + 1)).astype("<u8")
    with location.open_output() as file:
        file.write(offsets.tobytes())
        file.write(records[order].tobytes())


def write_copies(location: Location, records: NDArray[np.void], places: Sequence[NDArray[np.int64]]) -> None:
    """Write, for each partition, the records at its indices in `places`. A record may go to several partitions.

    Args:
        location: the file to write.
        records: structured array [N].
        places: for each partition, indices of records: int64 [any].
    """
    with location.open_output() as file:
        file.write(np.cumsum([0, *map(len, places)]).astype("<u8").tobytes())
        for each in places:
            file.write(records[each].tobytes())


def read_partition(
    files: Iterable[Location], number: int, num_partitions: int, dtype: np.dtype[np.void]
) -> NDArray[np.void]:
    """Return the records of one partition from all files, in the order of the files; an empty array if there are none.

    Args:
        files: files of `write_partitions` or `write_copies`.
        number: the partition.
        num_partitions: the number of partitions that the files were written with.
        dtype: the type of a record.
    """
    return np.concatenate([np.empty(0, dtype), *read_parts(files, number, num_partitions, dtype)])


def read_parts(
    files: Iterable[Location], number: int, num_partitions: int, dtype: np.dtype[np.void]
) -> list[NDArray[np.void]]:
    """Return the records of one partition, one array per file. See `read_partition` for the arguments."""

    def read(location: Location) -> NDArray[np.void]:
        with location.open_input() as file:
            file.seek(number * _OFFSET_BYTES)
            start, end = np.frombuffer(file.read(2 * _OFFSET_BYTES), "<u8").tolist()
            file.seek((num_partitions + 1) * _OFFSET_BYTES + start * dtype.itemsize)
            return np.frombuffer(file.read((end - start) * dtype.itemsize), dtype)

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(read, files))


def read_records(location: Location, num_partitions: int, dtype: np.dtype[np.void]) -> NDArray[np.void]:
    """Return all records of a file, ordered by partition."""
    return np.frombuffer(location.read_bytes(), dtype, offset=(num_partitions + 1) * _OFFSET_BYTES)


def repeats(records: NDArray[np.void]) -> tuple[NDArray[np.void], NDArray[np.uint64]]:
    """Find the records whose key already occurs in an earlier row.

    The smallest row number of each key is kept, so the result does not depend on the order in which tasks ended.

    Returns:
        The repeated records in the order of rows, and for each the row that is kept.
    """
    ordered = records[np.lexsort((records["row"], records["key"][:, 1], records["key"][:, 0]))]
    begins = np.ones(len(ordered), bool)
    begins[1:] = (ordered["key"][1:] != ordered["key"][:-1]).any(axis=1)
    first = ordered["row"][begins][np.cumsum(begins) - 1]
    lost, kept = ordered[~begins], first[~begins]
    order = np.argsort(lost["row"])
    return lost[order], kept[order]
