"""A readapted model as a Hugging Face folder: shards of safetensors, written as they fill.

In: a `Readapter` and scales. Out: `model.safetensors`, or `model-00001-of-0000N.safetensors` with
their index, on any filesystem, and what the cast to the output type lost. All cores make slices of
rows, one writes them in order, so the bytes are the same whatever the number of cores. The plan of
shards follows from shapes alone, so a merge that was killed writes the missing shards and no other.
Memory: some slices of rows for each core.
"""

import contextlib
import functools
import json
import math
import queue
from collections.abc import Callable
from dataclasses import dataclass

import torch

from readapt_ray.errors import ModelError
from readapt_ray.hardware import num_cores
from readapt_ray.model_file_names import INDEX_NAME, SINGLE_NAME
from readapt_ray.storage import Location
from readapt_ray.weights.cast_loss import CastLoss
from readapt_ray.weights.merging import Readapter, Scales, TensorRows
from readapt_ray.weights.ordered_map import ordered_map
from readapt_ray.weights.reused_buffers import ScratchBuffers
from readapt_ray.weights.stored_names import StoredWeights
from readapt_ray.weights.weight_files import file_header, is_finite

OUTPUT_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_LOSS_SUFFIX = ".cast.json"
_SLICE_COPIES = 10
"""Slices in float32 that a core holds at most: inputs, sums, and results that wait to be written."""


@dataclass(frozen=True)
class WeightShard:
    """One file of the output and the tensors in it, in file order."""

    file_name: str
    tensors: tuple[StoredWeights, ...]
    num_bytes: int
    """Bytes of tensors, without the header."""

    @property
    def names(self) -> tuple[str, ...]:
        """The weights in it, in file order."""
        return tuple(weight for tensor in self.tensors for weight in tensor.weights)


@dataclass(frozen=True)
class WeightPlan:
    """Which tensor goes where, in which type."""

    shards: tuple[WeightShard, ...]
    dtypes: dict[str, torch.dtype]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def main_dtype(self) -> str:
        """The type that most tensors have, by its name in config.json."""
        kinds = list(self.dtypes.values())
        return str(max(kinds, key=kinds.count)).removeprefix("torch.")


def plan_shards(readapter: Readapter, *, dtype: str, max_shard_bytes: int) -> WeightPlan:
    """Cut the output into shards.

    Args:
        readapter: what is written.
        dtype: float32, float16, bfloat16, or retriever: for each tensor what the retriever has.
        max_shard_bytes: bound of a shard; a tensor that is larger has a shard of its own.
    """
    tensors = readapter.pretrained.name_table.stored(readapter.names())
    dtypes = {name: _output_dtype(readapter, tensor, dtype) for tensor in tensors for name in tensor.weights}
    sizes = {
        tensor: sum(math.prod(readapter.shape(name)) * dtypes[name].itemsize for name in tensor.weights)
        for tensor in tensors
    }
    groups: list[list[StoredWeights]] = [[]]
    for tensor in tensors:
        if groups[-1] and sum(sizes[each] for each in groups[-1]) + sizes[tensor] > max_shard_bytes:
            groups.append([])
        groups[-1].append(tensor)
    count = len(groups)
    shards = []
    for number, group in enumerate(groups, start=1):
        file_name = SINGLE_NAME if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        # Wider types first, as safetensors itself does, so that every tensor is aligned.
        ordered = sorted(group, key=lambda tensor: -dtypes[tensor.weights[0]].itemsize)
        shards.append(WeightShard(file_name, tuple(ordered), sum(sizes[tensor] for tensor in group)))
    return WeightPlan(tuple(shards), dtypes)


def _output_dtype(readapter: Readapter, tensor: StoredWeights, dtype: str) -> torch.dtype:
    """Return the type of a tensor: of the weights in it, the widest."""
    if dtype != "retriever":
        return OUTPUT_DTYPES[dtype]
    chosen = max(map(readapter.dtype, tensor.weights), key=lambda each: each.itemsize)
    return torch.float32 if chosen == torch.float64 else chosen


def write_weights(
    readapter: Readapter,
    scales: Scales,
    plan: WeightPlan,
    target: Location,
    *,
    report: Callable[[int], None],
    num_threads: int | None = None,
) -> CastLoss:
    """Write the shards that are not there, then the index, on this machine.

    Args:
        readapter: what is written.
        scales: how much of each difference.
        plan: from `plan_shards`.
        target: the folder.
        report: called with the bytes done so far, shards that were there included.
        num_threads: how many cores work; all, or as many as three times the largest tensor has room for.

    Returns:
        What the cast lost, in all shards.

    Raises:
        ModelError: an input holds NaN or infinity, or a value is too large for the output type.
    """
    done = 0
    for shard in plan.shards:
        write_shard(
            readapter,
            scales,
            plan,
            shard,
            target,
            report=functools.partial(_report_after, report, done),
            num_threads=num_threads,
        )
        done += shard.num_bytes
        report(done)
    return finish_weights(plan, target)


def _report_after(report: Callable[[int], None], before: int, made: int) -> None:
    report(before + made)


def is_written(shard: WeightShard, target: Location) -> bool:
    """Return whether a shard is there: a file appears under its name only when it is whole."""
    return (target / shard.file_name).is_file() and _loss_record(target, shard).is_file()


def finish_weights(plan: WeightPlan, target: Location) -> CastLoss:
    """Write the index of shards that are all there.

    Returns:
        What the cast lost, in all shards.
    """
    losses = CastLoss()
    for shard in plan.shards:
        losses.add(CastLoss.from_json(_loss_record(target, shard).read_text()))
    if len(plan.shards) > 1:
        weight_map = {
            name: shard.file_name for shard in plan.shards for name in sorted(tensor.name for tensor in shard.tensors)
        }
        index = {"metadata": {"total_size": plan.num_bytes}, "weight_map": weight_map}
        (target / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
    return losses


def forget_progress(plan: WeightPlan, target: Location) -> None:
    """Remove the records that a merge needs to resume."""
    for shard in plan.shards:
        _loss_record(target, shard).delete()


def _loss_record(target: Location, shard: WeightShard) -> Location:
    return target / (shard.file_name + _LOSS_SUFFIX)


def _affordable_threads(readapter: Readapter) -> int:
    largest = max(math.prod(readapter.shape(name)) for name in readapter.names())
    slice_elements = max(
        (stop - start) * math.prod(readapter.shape(name)[1:])
        for name in readapter.names()
        for start, stop in readapter.slices(name)
    )
    return max(1, min(num_cores(), 2 * largest // (_SLICE_COPIES * slice_elements)))


@dataclass(frozen=True)
class _Slice:
    name: str
    start: int
    stop: int


def write_shard(
    readapter: Readapter,
    scales: Scales,
    plan: WeightPlan,
    shard: WeightShard,
    target: Location,
    *,
    report: Callable[[int], None],
    num_threads: int | None = None,
) -> None:
    """Write one shard, unless it is there; the arguments are as in `write_weights`."""
    if is_written(shard, target):
        return
    num_threads = num_threads or _affordable_threads(readapter)
    done, losses = 0, CastLoss()
    slices = (_Slice(name, start, stop) for name in shard.names for start, stop in readapter.slices(name))
    # One for each slice that is being made, plus one that is being written.
    idle: queue.SimpleQueue[ScratchBuffers] = queue.SimpleQueue()
    for _ in range(num_threads + 2):
        idle.put(ScratchBuffers())

    def make(each: _Slice) -> tuple[ScratchBuffers, torch.Tensor, CastLoss]:
        scratch = idle.get()
        rows = readapter.rows(each.name, each.start, each.stop, scales, scratch)
        cast, loss = _cast(each.name, rows, plan.dtypes[each.name], scratch)
        return scratch, cast.reshape(-1).view(torch.uint8), loss

    with (target / shard.file_name).open_output() as stream:
        stream.write(file_header(_entry(readapter, plan, tensor) for tensor in shard.tensors))
        with contextlib.closing(ordered_map(make, slices, num_threads=num_threads, num_waiting=1)) as made:
            for scratch, content, loss in made:
                stream.write(content.numpy().data)
                idle.put(scratch)
                losses.add(loss)
                done += content.nbytes
                report(done)
        _loss_record(target, shard).write_text(losses.to_json())


def _entry(readapter: Readapter, plan: WeightPlan, tensor: StoredWeights) -> tuple[str, torch.dtype, tuple[int, ...]]:
    """Return name, type and shape of a tensor; the rows of its weights follow each other."""
    shapes = [readapter.shape(name) for name in tensor.weights]
    shape = (sum(each[0] for each in shapes), *shapes[0][1:]) if shapes[0] else ()
    return tensor.name, plan.dtypes[tensor.weights[0]], shape


def _cast(name: str, rows: TensorRows, dtype: torch.dtype, scratch: ScratchBuffers) -> tuple[torch.Tensor, CastLoss]:
    """Return a slice in the output type, and what that lost; it uses up `rows.pretrained`."""
    exact = rows.readapted
    cast = scratch.empty("cast", exact.shape, dtype, exact.device).copy_(exact)
    loss = CastLoss.of(name, rows, cast, scratch)
    # Sums that are finite speak for every value; others may come of values whose squares alone are too large.
    if not loss.is_finite() and not is_finite(cast):
        largest = exact.abs().max().item()
        raise ModelError(
            f"tensor {name!r} reaches {largest:.3g}, beyond {str(dtype).removeprefix('torch.')}; "
            f"give a wider dtype (float32), or smaller scales"
        )
    return cast, loss
