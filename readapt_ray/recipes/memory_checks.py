"""Check before a run that each stage that will run fits in memory.

In: options, the shapes of the models, and the size of the corpus if it is ingested already. No weights are read. The
memory of this machine or its GPUs counts; on a cluster without GPUs, the memory of each node. On a cluster with GPUs
nothing is checked here: its workers check their own memory when they train.

Training is estimated with the estimate that training itself uses. For embed and index, only memory that they certainly
need is counted, so that no run is refused that would work.
"""

import os
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from readapt_ray import environment, hardware
from readapt_ray.catalog.models import OpenModel
from readapt_ray.catalog.shapes import shape_of
from readapt_ray.cluster import connection, nodes, placement
from readapt_ray.errors import PlacementError
from readapt_ray.progress import size_text
from readapt_ray.recipes.option_checks import index_kind
from readapt_ray.recipes.problems import Problems
from readapt_ray.retrieval.encoder_sizes import MIN_SHARD_ROWS, resident_bytes
from readapt_ray.retrieval.index_kinds import shard_rows, vector_bytes

_STAGES = {"train", "merge", "embed", "index"}
_INDEX_COPIES = 2
"""A task holds its shard of the index twice while it writes it."""
_SVD_COPIES = 4
"""Memory of a factorization, in copies of the matrix: the matrix, its two factors, and temporary memory."""


class _Node(NamedTuple):
    """A machine on which workers run."""

    num_cpus: int
    free_bytes: int


@dataclass(frozen=True)
class _Machines:
    """The machines on which workers run, with their CPUs and free memory."""

    device_type: str
    nodes: tuple[_Node, ...]
    """The nodes that have CPUs. On a machine with GPUs, `free_bytes` is the memory of one GPU."""
    name: str

    @property
    def num_cpus(self) -> int:
        """The number of CPUs of all nodes."""
        return sum(node.num_cpus for node in self.nodes)

    def share(self, num_workers: int, num_cpus: int = 1) -> int:
        """Return how many bytes each of `num_workers` workers can have at most, for the best placement by Ray.

        If a node has k workers, each gets 1/k of the node's memory.
        """
        if self.device_type == "cuda":
            return self.nodes[0].free_bytes
        most = [max(1, node.num_cpus // num_cpus, num_workers if len(self.nodes) == 1 else 0) for node in self.nodes]
        shares = [node.free_bytes // k for node, room in zip(self.nodes, most, strict=True) for k in range(1, room + 1)]
        return sorted(shares, reverse=True)[min(num_workers, len(shares)) - 1]

    def refuse(self, what: str, num_workers: int, needed: float, advice: str, num_cpus: int = 1) -> None:
        """Raise an error if one of `num_workers` workers needs more bytes (`needed`) than it can have."""
        if needed > self.share(num_workers, num_cpus):
            times = f"{num_workers} x " if num_workers > 1 else ""
            counts = Counter(size_text(node.free_bytes) for node in self.nodes)
            have = " and ".join(f"{count} x {size}" if count > 1 else size for size, count in counts.items())
            raise PlacementError(
                f"{what} would need about {times}{size_text(needed)}, and {self.name} {have}; {advice}"
            )


def check_memory(
    due: Mapping[str, Any],
    every: Mapping[str, Any],
    models: Mapping[str, OpenModel],
    problems: Problems,
    *,
    dimension: int | None,
    num_passages: int | None,
) -> None:
    """Check that each stage that will run fits in memory, and add an error to `problems` for each that does not.

    A stage is skipped if a model, config or number that its check needs is missing.

    Args:
        due: configs of the steps that will run, by stage.
        every: configs of all steps with valid options, by stage.
        models: the models that could be opened: pretrained, retriever.
        problems: collects the errors.
        dimension: numbers per vector; None if not known.
        num_passages: passages of the corpus; None if it is not ingested yet.
    """
    # Joining a cluster may mean waiting for its nodes, so do it only if no other problem was found.
    if not due.keys() & _STAGES or (problems and os.environ.get("RAY_ADDRESS")) or (machines := _machines()) is None:
        return
    pretrained, retriever = models.get("pretrained"), models.get("retriever")
    if "train" in due and "pack" in every and pretrained is not None:
        with problems.collecting():
            _check_train(due["train"], every["pack"].block_tokens, pretrained, machines)
    if "merge" in due and pretrained is not None:
        with problems.collecting():
            _check_merge(due["merge"], pretrained, machines)
    if "embed" in due and retriever is not None:
        with problems.collecting():
            _check_embed(due["embed"], retriever, num_passages, machines)
    if "index" in due and "embed" in every and dimension is not None and num_passages is not None:
        with problems.collecting():
            _check_index(due["index"], every["embed"].vector_dtype, dimension, num_passages, machines)


def _machines() -> _Machines | None:
    """Return the machines on which workers will run; None for a cluster with GPUs."""
    import torch

    from readapt_ray.training import memory

    ray = sys.modules.get("ray")
    if os.environ.get("RAY_ADDRESS") or (ray and ray.is_initialized()):
        total = connection.connect()
        up = [node["Resources"] for node in nodes.alive()]
        if os.environ.get("RAY_ADDRESS") and total.num_gpus:
            return None
        if len(up) > 1:
            found = (_Node(int(each.get("CPU", 0)), int(each.get("memory", 0))) for each in up)
            return _Machines("cpu", tuple(each for each in found if each.num_cpus), "the nodes of the cluster have")
    if torch.cuda.is_available():
        free = memory.free_bytes(torch.device("cuda"), 1)
        return _Machines("cuda", (_Node(hardware.num_cores(), free),), "a GPU of this machine has")
    num_cores = environment.num_cpus() or hardware.num_cores()
    here = _Node(num_cores, memory.free_bytes(torch.device("cpu"), 1))
    return _Machines("cpu", (here,), "this machine has")


def _is_16_bit(dtype: str, machines: _Machines) -> bool:
    return dtype in ("bfloat16", "float16") or (
        dtype == "auto" and (machines.device_type == "cuda" or hardware.has_bfloat16_units())
    )


def _check_train(options: Any, block_tokens: int, pretrained: OpenModel, machines: _Machines) -> None:
    """Check a training step with the memory estimate that training itself uses."""
    if not options.check_memory:
        return
    import torch

    from readapt_ray.cluster.optimization import adapter_shape, worker_setup
    from readapt_ray.stages.train import resolve
    from readapt_ray.training import memory

    _, options = resolve(options, pretrained)
    on_gpu = machines.device_type == "cuda"
    num_workers, share = placement.workers_and_cpus(options.num_workers, [node.num_cpus for node in machines.nodes])
    if on_gpu:
        num_workers = options.num_workers or torch.cuda.device_count()
    setup = worker_setup(
        options,
        adapter_shape(options, options.target_modules),
        num_workers=num_workers,
        micro_batch_tokens=max(options.micro_batch_tokens, block_tokens),
        dtype=torch.bfloat16 if _is_16_bit(options.dtype, machines) else torch.float32,
        device_type=machines.device_type,
    )
    shape = shape_of(pretrained.config, pretrained.name, options.objective)
    memory.check_fits(shape, setup, free_bytes=machines.share(num_workers, options.num_cpus_per_worker or share))


def _check_merge(options: Any, pretrained: OpenModel, machines: _Machines) -> None:
    """Check that the largest matrix can be factored. Without low_rank, a merge holds only some rows at a time."""
    if options.low_rank is None or machines.device_type == "cuda":
        return
    from readapt_ray.weights.weight_files import Checkpoint

    weights = Checkpoint(pretrained.folder, name=pretrained.name)
    matrices = [shape for shape in map(weights.shape, weights.names()) if len(shape) == 2]
    rows, columns = max(matrices, key=lambda shape: shape[0] * shape[1], default=(0, 0))
    machines.refuse(
        f"merge with low_rank (a matrix of {rows:,} x {columns:,})",
        1,
        4.0 * rows * columns * _SVD_COPIES,
        "leave merge.low_rank out, or take a machine with more memory",
    )


def _check_embed(options: Any, retriever: OpenModel, num_passages: int | None, machines: _Machines) -> None:
    """Check that each worker has enough memory for the retriever's weights."""
    holder = retriever.base if retriever.is_adapter else retriever
    shape = shape_of(holder.config, holder.name)
    num_workers, num_cpus = 1, options.num_cpus_per_worker or 1
    if machines.device_type == "cpu":
        most = sum(node.num_cpus // num_cpus for node in machines.nodes)
        pieces = -(-num_passages // MIN_SHARD_ROWS) if num_passages else 1
        num_workers = options.num_workers or max(1, min(most, pieces))
    from readapt_ray.nn import packed_linear

    packed_dtypes = packed_linear.faster_dtypes() if machines.device_type == "cpu" else ()
    is_16_bit = _is_16_bit(options.dtype, machines)
    weights, copies = resident_bytes(shape, options.dtype, is_16_bit=is_16_bit, packed_dtypes=packed_dtypes)
    fewer = "lower embed.num_workers" if num_workers > 1 else "set embed.dtype to bfloat16"
    machines.refuse(
        f"embed (the {shape.num_parameters:,} weights of {retriever.name!r} in each worker)",
        num_workers,
        weights + copies,
        f"{fewer}, or take more memory",
        num_cpus,
    )


def _check_index(options: Any, vector_dtype: str, dimension: int, num_passages: int, machines: _Machines) -> None:
    """Check that the index shards that are built in parallel fit in memory."""
    kind = index_kind(options, vector_dtype, dimension, num_passages)
    if kind.factory is not None or machines.device_type == "cuda":
        return
    rows = min(num_passages, options.rows_per_shard or shard_rows(kind, num_passages, dimension))
    at_once = min(machines.num_cpus, -(-num_passages // max(1, rows)))
    machines.refuse(
        f"index (shards of {rows:,} vectors, one per core)",
        at_once,
        _INDEX_COPIES * rows * vector_bytes(kind, dimension),
        "lower index.rows_per_shard, or take more memory",
    )
