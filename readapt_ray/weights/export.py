"""A readapted model as a Hugging Face folder: shards of safetensors, written as they fill.

In: a `Readapter` and scales. Out: `model.safetensors`, or `model-00001-of-0000N.safetensors` with
their index, on any filesystem. The plan of shards follows from shapes alone, so a merge that was
killed writes the missing shards and no other, and the bytes are the same. Memory: a slice of rows.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from readapt_ray.errors import ModelError
from readapt_ray.storage import Location
from readapt_ray.weights.checkpoint import DTYPE_CODES, INDEX_NAME, SINGLE_NAME, is_finite
from readapt_ray.weights.readapter import Readapter, Scales

OUTPUT_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class WeightShard:
    """One file of the output and the tensors in it, in the order in which they lie there."""

    file_name: str
    names: tuple[str, ...]
    num_bytes: int
    """Bytes of tensors, without the header."""


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
    dtypes = {name: _output_dtype(readapter, name, dtype) for name in readapter.names()}
    sizes = {name: math.prod(readapter.shape(name)) * dtypes[name].itemsize for name in dtypes}
    groups: list[list[str]] = [[]]
    for name in dtypes:
        if groups[-1] and sum(sizes[each] for each in groups[-1]) + sizes[name] > max_shard_bytes:
            groups.append([])
        groups[-1].append(name)
    count = len(groups)
    shards = []
    for number, group in enumerate(groups, start=1):
        file_name = SINGLE_NAME if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        # Wider types first, as safetensors itself does, so that every tensor is aligned.
        ordered = sorted(group, key=lambda name: -dtypes[name].itemsize)
        shards.append(WeightShard(file_name, tuple(ordered), sum(sizes[name] for name in group)))
    return WeightPlan(tuple(shards), dtypes)


def _output_dtype(readapter: Readapter, name: str, dtype: str) -> torch.dtype:
    chosen = readapter.dtype(name) if dtype == "retriever" else OUTPUT_DTYPES[dtype]
    return torch.float32 if chosen == torch.float64 else chosen


def write_weights(
    readapter: Readapter,
    scales: Scales,
    plan: WeightPlan,
    target: Location,
    *,
    report: Callable[[int], None],
) -> None:
    """Write the shards that are not there, then the index.

    Args:
        readapter: what is written.
        scales: how much of each difference.
        plan: from `plan_shards`.
        target: the folder.
        report: called with the bytes done so far, those of shards that were there included.

    Raises:
        ModelError: an input holds NaN or infinity, or a value is too large for the output type.
    """
    done = 0
    for shard in plan.shards:
        file = target / shard.file_name
        # A file appears under its name only when it is whole, so one that is there needs no second look.
        if not file.is_file():
            with file.open_output() as stream:
                stream.write(_header(readapter, plan, shard))
                for part in _contents(readapter, scales, plan, shard):
                    stream.write(part.numpy().data)
                    done += part.nbytes
                    report(done)
        else:
            done += shard.num_bytes
            report(done)
    if len(plan.shards) > 1:
        weight_map = {name: shard.file_name for shard in plan.shards for name in sorted(shard.names)}
        index = {"metadata": {"total_size": plan.num_bytes}, "weight_map": weight_map}
        (target / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def _contents(readapter: Readapter, scales: Scales, plan: WeightPlan, shard: WeightShard) -> Iterator[torch.Tensor]:
    """The bytes of a shard behind its header, a slice at a time."""
    for name in shard.names:
        for rows in readapter.rows(name, scales):
            yield _cast(name, rows, plan.dtypes[name])


def _header(readapter: Readapter, plan: WeightPlan, shard: WeightShard) -> bytes:
    """The header of the safetensors format: its length in 8 bytes, then JSON padded to whole words."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in shard.names:
        dtype, shape = plan.dtypes[name], readapter.shape(name)
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _cast(name: str, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The bytes of a slice in the output type."""
    cast = rows.to(dtype).contiguous()
    if not is_finite(cast):
        largest = rows.abs().max().item()
        raise ModelError(
            f"tensor {name!r} reaches {largest:.3g}, beyond {str(dtype).removeprefix('torch.')}; "
            f"give a wider dtype (float32), or smaller scales"
        )
    return cast.reshape(-1).view(torch.uint8)
