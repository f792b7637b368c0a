"""Find near duplicates on the cluster: run the tasks of `sources/near_pieces.py` in rounds."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from readapt_ray.sources import near_pieces
from readapt_ray.sources.bad_rows import NUM_NAMED
from readapt_ray.sources.piece_job import Lists, PieceJob

Tasks = Callable[[Callable[..., Any], Iterable[tuple[Any, ...]]], Iterator[Any]]


def drop_near(tasks: Tasks, job: PieceJob, num_rows: Sequence[int], lists: Lists) -> dict[str, Any]:
    """Find near duplicates among the passages that are left, and write lists of those to drop.

    The rounds repeat until every near duplicate is decided. No passage is removed yet.

    Args:
        tasks: runs a function on the cluster for each tuple of arguments, and adds the job; yields the results.
        job: options and folders that all tasks share.
        num_rows: number of passages of each piece.
        lists: the files that list passages that are dropped already, by kind.

    Returns:
        `count` and `num_bytes` of the dropped passages; `first`, pairs of a dropped and its kept passage, the first few
        in the order of the source; and `files`, the pair (piece, round) of each file that lists dropped passages.
    """
    rows = list(num_rows)
    partitions, pieces = range(job.num_near_partitions), range(job.num_pieces)
    total: dict[str, Any] = {"count": 0, "num_bytes": 0, "first": [], "files": []}
    _wait(tasks(near_pieces.near_buckets, ((number, rows) for number in partitions)))
    rounds, undecided = 0, True
    while undecided:
        _wait(tasks(near_pieces.near_send, ((piece, rows[piece], lists, rounds) for piece in pieces)))
        _wait(tasks(near_pieces.near_compare, ((number, rows, rounds) for number in partitions)))
        (found,) = tasks(near_pieces.near_decide, [(rounds,)])
        total["count"] += found["count"]
        total["num_bytes"] += found["num_bytes"]
        total["first"] = sorted([*total["first"], *map(tuple, found["first"])])[:NUM_NAMED]
        total["files"] += [(piece, rounds) for piece in found["pieces"]]
        rounds, undecided = rounds + 1, found["undecided"] > 0
    return total


def _wait(results: Iterable[None]) -> None:
    for _ in results:
        pass
