"""Run the real stages of a refresh without Ray: their tasks one after the other, in this process."""

from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from readapt_ray.cluster import compaction, connection, earlier_vectors, index_shards, on_worker, shard_runner
from readapt_ray.cluster.parallel_ingest import ParallelIngest
from readapt_ray.cluster.shard_encoder import ShardEncoder
from readapt_ray.cluster.shard_source import ShardSource
from readapt_ray.stages import index


def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace what starts tasks and actors; what they do stays."""
    monkeypatch.setattr(ray, "remote", lambda **_: _Task)
    monkeypatch.setattr(connection, "connect", lambda: SimpleNamespace(num_cpus=1, num_nodes=1, num_gpus=0))
    monkeypatch.setattr(connection, "check_seen_by_all", lambda _: None)
    monkeypatch.setattr(on_worker, "this_node", lambda: "")
    monkeypatch.setattr(on_worker, "check_node", lambda: None)
    monkeypatch.setattr(earlier_vectors, "connect", connection.connect)
    monkeypatch.setattr(index, "task_cpus", lambda *_: 1)
    monkeypatch.setattr(shard_runner, "_results", _encoded)
    monkeypatch.setattr(ParallelIngest, "_place", lambda _: None)
    monkeypatch.setattr(ParallelIngest, "_tasks", _in_turn)
    for module in (compaction, earlier_vectors, index_shards):
        monkeypatch.setattr(module, "run_bounded", _one_by_one)


class _Task:
    """What `ray.remote` makes of a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.remote = function


def _in_turn(ingest: Any, function: Callable[..., Any], items: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
    return (function(*item, job=ingest._job) for item in items)


def _one_by_one(start: Callable[[Any], Any], items: Iterable[Any], _: int) -> Iterator[Any]:
    return map(start, items)


def _encoded(pending: Any, job: Any, _: Any) -> Iterator[dict[str, Any]]:
    encoder = ShardEncoder(job)
    for task in ShardSource(pending, job, tokenizes=True).get_read_tasks():
        for row in task():
            figures = encoder(row).to_pylist()[0]
            assert not figures["error"], figures
            yield figures
