"""Write the weights of a readapted model as a Hugging Face folder of safetensors shards.

In: a `Readapter` and scales. Out: `model.safetensors`, or `model-00001-of-0000N.safetensors` with
their index, on any filesystem, and a measure of what the cast to the output type lost. All cores
compute slices of rows and one thread writes them in order, so the bytes do not depend on the number
of cores. The plan of shards depends only on shapes and types, so a killed merge resumes with the
missing shards. Memory: some slices of rows per core.
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
"""Most float32 slices that a core holds in memory: inputs, sums, and results that wait to be written."""


@dataclass(frozen=True)
class WeightShard:
    """One file of the output and the tensors in it, in file order."""

    file_name: str
    tensors: tuple[StoredWeights, ...]
    num_bytes: int
    """Bytes of its tensors, without the header."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the weights in the file, in file order; the tensors that hold them may have other names."""
        return tuple(weight for tensor in self.tensors for weight in tensor.weights)


@dataclass(frozen=True)
class WeightPlan:
    """The shards of an output, and the type of each weight."""

    shards: tuple[WeightShard, ...]
    dtypes: dict[str, torch.dtype]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def main_dtype(self) -> str:
        """The type that most weights have, by its name in config.json, such as bfloat16."""
        kinds = list(self.dtypes.values())
        return str(max(kinds, key=kinds.count)).removeprefix("torch.")


def plan_shards(readapter: Readapter, *, dtype: str, max_shard_bytes: int) -> WeightPlan:
    """Divide the tensors of an output among shards. Equal shapes and types give the same plan everywhere.

    Args:
        readapter: the merge whose result will be written.
        dtype: output type: float32, float16, bfloat16, or "retriever" for the type that the retriever has per tensor
            (float32 if that is float64; the widest one for several weights that are stored as one tensor).
        max_shard_bytes: largest size of a shard; a larger tensor gets its own shard.
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
        # Wider types first, as the safetensors library does, so that every tensor is aligned.
        ordered = sorted(group, key=lambda tensor: -dtypes[tensor.weights[0]].itemsize)
        shards.append(WeightShard(file_name, tuple(ordered), sum(sizes[tensor] for tensor in group)))
    return WeightPlan(tuple(shards), dtypes)


def _output_dtype(readapter: Readapter, tensor: StoredWeights, dtype: str) -> torch.dtype:
    """Return the output type of a tensor; for several weights in one tensor, the widest of their types."""
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
    """Compute and write the shards that are missing, then the index, on this machine.

    A record is kept beside each shard; call `forget_progress` when the whole output is complete.

    Args:
        readapter: the merge to compute.
        scales: how much of each difference is added.
        plan: from `plan_shards`.
        target: the folder to write into.
        report: called with the bytes done so far; shards that already existed count.
        num_threads: cores to use. None takes all, or fewer, so that slices take about twice the largest tensor at most.

    Returns:
        What the cast to the output type lost, over all shards.

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
    """Return whether a shard is complete: a file gets its name only when all of it is written.

    It also needs the record beside the shard, so it returns False after `forget_progress`.
    """
    return (target / shard.file_name).is_file() and _loss_record(target, shard).is_file()


def finish_weights(plan: WeightPlan, target: Location) -> CastLoss:
    """Write the index (none for a single shard); call it when all shards are written, before `forget_progress`.

    Returns:
        What the cast to the output type lost, over all shards.

    Raises:
        FileNotFoundError: a shard is not written.
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
    """Remove the records beside the shards (*.cast.json), from which a killed merge would resume.

    Call it when the merge is complete. The shards stay.
    """
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
    """Compute and write one shard, unless it is complete already.

    Args and errors are as in `write_weights`; `report` gets the bytes of this shard that are done so far, and is not
    called if it is complete already.
    """
    if is_written(shard, target):
        return
    num_threads = num_threads or _affordable_threads(readapter)
    done, losses = 0, CastLoss()
    slices = (_Slice(name, start, stop) for name in shard.names for start, stop in readapter.slices(name))
    # One per slice that is being computed, one per slice that waits, and one that is being written.
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
    """Return name, type and shape of a stored tensor; it holds the rows of its weights one after the other."""
    shapes = [readapter.shape(name) for name in tensor.weights]
    shape = (sum(each[0] for each in shapes), *shapes[0][1:]) if shapes[0] else ()
    return tensor.name, plan.dtypes[tensor.weights[0]], shape


def _cast(name: str, rows: TensorRows, dtype: torch.dtype, scratch: ScratchBuffers) -> tuple[torch.Tensor, CastLoss]:
    """Cast a slice to the output type and measure the loss; this overwrites `rows.pretrained` and `rows.retrieval`."""
    exact = rows.readapted
    cast = scratch.empty("cast", exact.shape, dtype, exact.device).copy_(exact)
    loss = CastLoss.of(name, rows, cast, scratch)
    # If the sums of squares are finite, so is every value. If not, perhaps only the squares were too large.
    if not loss.is_finite() and not is_finite(cast):
        largest = exact.abs().max().item()
        raise ModelError(
            f"tensor {name!r} reaches {largest:.3g}, beyond {str(dtype).removeprefix('torch.')}; "
            f"give a wider dtype (float32), or smaller scales"
        )
    return cast, loss
