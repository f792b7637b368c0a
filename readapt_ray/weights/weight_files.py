"""Read the safetensors files of a model, some rows of a tensor at a time.

In: a local folder of safetensors, one file or shards with an index. Out: shapes, types and rows of
tensors under the names of the model without its head (`layers.0...`), for any naming in the files.
Opening reads headers only (kilobytes). Reading holds only the requested rows and uses no memory map,
so that the memory of a merge does not grow with the model.
"""

import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from readapt_ray.errors import ModelError
from readapt_ray.model_file_names import INDEX_NAME, SINGLE_NAME
from readapt_ray.progress import amount
from readapt_ray.weights.deltas import Whole
from readapt_ray.weights.reused_buffers import ScratchBuffers
from readapt_ray.weights.stored_names import NameTable, table_in

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DTYPE_CODES = {dtype: code for code, dtype in _DTYPES.items()}
"""The name of each torch type in safetensors headers."""

_BASE_PREFIXES = (
    "model.",
    "bert.",
    "roberta.",
    "transformer.",
    "gpt_neox.",
    "distilbert.",
    "electra.",
    "mpnet.",
    "deberta.",
    "albert.",
    "camembert.",
    "nomic_bert.",
    "gte.",
    "new.",
)
_HEAD = re.compile(
    r"(lm_head|cls|score|classifier|pre_classifier|qa_outputs|predictions|embed_out|mlm_head|lm_predictions"
    r"|generator_predictions|generator_lm_head|discriminator_predictions|vocab_transform|vocab_layer_norm"
    r"|vocab_projector)\.|head\.(dense|norm)\.|decoder\.(weight|bias)$"
)
_BUFFER = re.compile(r"(^|\.)(position_ids|rotary_emb\.inv_freq|masked_bias|attn\.bias)$|^embeddings\.token_type_ids$")
_OLD_NORM = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """The file, position, type and shape of one stored tensor."""

    stored_name: str
    """Its name in the file."""
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Position of its first byte in the file."""
    num_bytes: int

    def read(
        self, start: int = 0, stop: int | None = None, scratch: ScratchBuffers | None = None, role: str = ""
    ) -> torch.Tensor:
        """Read rows `start` to `stop` along the first axis, or all, as a CPU tensor in the type on disk.

        Args:
            start: first row.
            stop: end of the rows, exclusive; None reads to the last row. A scalar counts as one row.
            scratch: buffers to read into; None makes a new tensor.
            role: name of the buffer in `scratch`.

        Raises:
            ModelError: the file is shorter than its header says.
            IndexError: the tensor has fewer rows.
        """
        num_rows = self.shape[0] if self.shape else 1
        stop = num_rows if stop is None else stop
        if stop > num_rows:
            raise IndexError(f"rows {start} to {stop} of {self.stored_name!r}, which has {num_rows}")
        row_bytes = self.num_bytes // self.shape[0] if self.shape and self.shape[0] else self.num_bytes
        shape = (stop - start, *self.shape[1:]) if self.shape else ()
        rows = (scratch or ScratchBuffers()).empty(role, shape, self.dtype, torch.device("cpu"))
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset + row_bytes * start)
            _fill(file, rows.reshape(-1).view(torch.uint8), self.path)
        return rows


def _fill(file: io.FileIO, content: torch.Tensor, path: Path) -> None:
    """Read until the buffer is full. It takes a loop, since one read returns at most 2 GiB."""
    view = content.numpy().data
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise ModelError(f"{path} is cut short; fetch or copy it again")
        done += count


def read_header(path: Path) -> dict[str, StoredTensor]:
    """List the tensors of one safetensors file by stored name; only the header is read.

    Raises:
        ModelError: the file is not safetensors, or is shorter than its header says.
    """
    num_file_bytes = path.stat().st_size
    with path.open("rb") as file:
        num_header_bytes = int.from_bytes(file.read(8), "little")
        if num_file_bytes < 8 or num_header_bytes > min(_MAX_HEADER_BYTES, num_file_bytes - 8):
            raise ModelError(f"{path} is not safetensors, or is cut short; fetch or copy it again")
        try:
            header = json.loads(file.read(num_header_bytes))
            found = {
                name: StoredTensor(
                    stored_name=name,
                    path=path,
                    dtype=_DTYPES[value["dtype"]],
                    shape=tuple(value["shape"]),
                    offset=8 + num_header_bytes + value["data_offsets"][0],
                    num_bytes=value["data_offsets"][1] - value["data_offsets"][0],
                )
                for name, value in header.items()
                if name != "__metadata__"
            }
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ModelError(f"{path} has no valid safetensors header: {error}") from error
    end = max((tensor.offset + tensor.num_bytes for tensor in found.values()), default=0)
    if end > num_file_bytes:
        raise ModelError(f"{path} is cut short: {num_file_bytes:,} bytes of {end:,}; fetch or copy it again")
    return found


def refuse_empty_tensors(stored: Mapping[str, StoredTensor], what: str) -> None:
    """Refuse empty tensors, which a ZeRO-3 worker leaves if it saves a model without gathering its weights.

    Args:
        stored: the tensors by name.
        what: the model or adapter that holds them, as the error should name it.

    Raises:
        ModelError: some are empty; the error names the first.
    """
    empty = [f"{name} {list(each.shape)}" for name, each in stored.items() if 0 in each.shape]
    if empty:
        raise ModelError(
            f"{what} has {amount(len(empty), 'empty tensors')}, such as {empty[0]}: it was saved under ZeRO-3 without "
            f"gathering its weights. Save it again with stage3_gather_16bit_weights_on_model_save, or make it "
            f"from the checkpoint with DeepSpeed's zero_to_fp32.py"
        )


def file_header(entries: Iterable[tuple[str, torch.dtype, Sequence[int]]]) -> bytes:
    """Return the header of a safetensors file: its length in 8 bytes, then JSON padded to a multiple of 8 bytes.

    Args:
        entries: name, type and shape of each tensor, in the order in which their data follow the header.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape in entries:
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class Checkpoint:
    """The weight files of a model without its head, under the names that `AutoModel` gives the weights.

    LM heads, classifiers and buffers that the model computes by itself are left out. `heads` and `buffers`
    list their names, so that nothing is dropped silently.
    """

    def __init__(self, folder: Path, *, name: str | None = None) -> None:
        """Read the headers of all weight files in a folder.

        Args:
            folder: a local model folder.
            name: what the user calls the model; used in errors. None uses the folder.

        Raises:
            ModelError: the folder has no safetensors, a shard is missing or cut short, or two tensors have one name.
        """
        self.folder = folder
        self.name = name or str(folder)
        stored = stored_tensors(folder, self.name)
        refuse_empty_tensors(stored, f"the model {self.name!r}")
        self.heads = tuple(sorted(each for each in stored if _HEAD.match(each)))
        backbone = [each for each in stored if not _HEAD.match(each)]
        prefix = base_prefix(backbone)
        headless = {each: modern_name(each.removeprefix(prefix)) for each in backbone}
        self.buffers = tuple(sorted(each for each, short in headless.items() if _BUFFER.search(short)))
        self.name_table = table_in(folder)
        """Translates names in the files to names of weights; it depends on the model's family."""
        self._tensors: dict[str, StoredTensor] = {}
        for each in backbone:
            if each in self.buffers:
                continue
            for weight, tensor in by_weight(headless[each], stored[each], self.name_table).items():
                if weight in self._tensors:
                    raise ModelError(f"{self.name!r} holds {weight!r} twice, once as {each!r}; its files are mixed up")
                self._tensors[weight] = tensor
        if not self._tensors:
            raise ModelError(f"{self.name!r} holds no weights: its safetensors in {folder} are empty but for heads")

    def names(self) -> list[str]:
        """List all weights, sorted with numbers in names compared as numbers. The split into files does not matter."""
        return sorted(self._tensors, key=natural_order)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a weight, by its name from `names`."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of a weight on disk."""
        return self._tensors[name].dtype

    def read(
        self, name: str, start: int = 0, stop: int | None = None, scratch: ScratchBuffers | None = None, role: str = ""
    ) -> torch.Tensor:
        """Read a weight, or its rows `start` to `stop`, in its type on disk; see `StoredTensor.read`."""
        return self._tensors[name].read(start, stop, scratch, role)

    def term(self, name: str, start: int, stop: int, scratch: ScratchBuffers, role: str) -> Whole:
        """Read rows `start` to `stop` of this tuned weight; a merge subtracts the pretrained rows from them.

        Args:
            name: name of the weight.
            start: first row.
            stop: the row after the last one.
            scratch: gives the buffer for the rows.
            role: name of that buffer. The rows are valid until the same role is requested again.
        """
        return Whole(rows=self.read(name, start, stop, scratch, role))

    def weight_named(self, stored_name: str) -> str | None:
        """Return the name here of a weight that another file may call `model.layers.0...`; None if it is unknown.

        A base prefix (`model.`, `bert.` ...) is removed if needed, and old names of norms are translated.
        """
        candidates = [stored_name, *(stored_name.removeprefix(prefix) for prefix in _BASE_PREFIXES)]
        return next((each for each in map(modern_name, candidates) if each in self._tensors), None)


def by_weight(name: str, stored: StoredTensor, table: NameTable) -> dict[str, StoredTensor]:
    """Return the weights that a stored tensor holds, by module name; no weight is read.

    A tensor of joined weights (Q, K and V in one) is split into equal parts of its rows. Any other tensor is returned
    whole. The names have the prefix that `name` has.

    Args:
        name: the stored name, with or without the prefix of the file.
        stored: the tensor.
        table: maps stored names of this model family to module names.

    Raises:
        ModelError: the rows cannot be divided equally among the weights.
    """
    weights = table.weights_of(name)
    count = len(weights)
    if stored.shape and stored.shape[0] % count:
        raise ModelError(
            f"{stored.path} holds {stored.stored_name!r} with {stored.shape[0]} rows, and {count} weights of equal size are expected "
            f"in it ({', '.join(weights)}); fetch the model again"
        )
    num_bytes = stored.num_bytes // count
    shape = (stored.shape[0] // count, *stored.shape[1:]) if stored.shape else ()
    return {
        weight: replace(stored, shape=shape, offset=stored.offset + place * num_bytes, num_bytes=num_bytes)
        for place, weight in enumerate(weights)
    }


def base_prefix(backbone: Iterable[str]) -> str:
    """Return the known prefix of base models that all these names share (`model.`, `bert.` ...); empty if none is."""
    names = list(backbone)
    return next((prefix for prefix in _BASE_PREFIXES if names and all(each.startswith(prefix) for each in names)), "")


def is_head(stored_name: str) -> bool:
    """Return whether a tensor or module belongs to a language-model head or a classifier, by the start of its name."""
    return bool(_HEAD.match(f"{stored_name}."))


def is_buffer(name: str) -> bool:
    """Return, by its name, whether the model computes a tensor instead of loading it (old checkpoints store some)."""
    return bool(_BUFFER.search(name))


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether a tensor holds neither NaN nor infinity. It makes no mask, so it is 30 times as fast as
    isfinite().all().
    """
    if tensor.numel() == 0:
        return True
    if tensor.dtype == torch.float32 and tensor.is_contiguous():
        flat = tensor.view(-1)
        if math.isfinite(torch.dot(flat, flat)):  # a sum of squares is finite only if each square is
            return True
    return bool(torch.stack(torch.aminmax(tensor)).isfinite().all())  # aminmax returns NaN if any value is NaN


def natural_order(name: str) -> list[tuple[int, str]]:
    """Return a sort key by which numbers in names are compared as numbers: `layers.2` is before `layers.10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def modern_name(name: str) -> str:
    """Return a tensor's name as transformers writes it now: `LayerNorm.gamma` and `.beta` become `.weight` and `.bias`.

    Other names are returned as they are.
    """
    for old, new in _OLD_NORM.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def stored_tensors(folder: Path, name: str) -> dict[str, StoredTensor]:
    """List the tensors of a model folder by stored name, from its single file or from the shards in its index.

    Args:
        folder: a local model folder.
        name: what the user calls the model; used in errors.

    Raises:
        ModelError: the folder has no safetensors, the weights are there twice, or a shard is missing or cut short.
    """
    index = folder / INDEX_NAME
    if not index.is_file():
        single = folder / SINGLE_NAME
        if single.is_file():
            return read_header(single)
        raise ModelError(f"{name!r} has no weights: {folder} holds neither {SINGLE_NAME} nor {INDEX_NAME}")
    try:
        weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is not an index of weights: {error!r}") from error
    if (folder / SINGLE_NAME).is_file() and SINGLE_NAME not in shards:
        raise ModelError(
            f"{name!r} has its weights twice, in {SINGLE_NAME} and in the files of {INDEX_NAME}, and libraries differ in which "
            f"they read; remove one of the two from {folder}"
        )
    missing = [shard for shard in shards if "/" in shard or not (folder / shard).is_file()]
    if missing:
        raise ModelError(
            f"{name!r} lacks {len(missing)} of {len(shards)} weight files, first {missing[0]!r}; fetch it again"
        )
    stored = {each: tensor for shard in shards for each, tensor in read_header(folder / shard).items()}
    lost = sorted(each for each in weight_map if each not in stored)
    if lost:
        raise ModelError(
            f"{name!r} lacks {amount(len(lost), 'tensors')} of its index, first {lost[0]!r} of {weight_map[lost[0]]}; fetch it again"
        )
    return stored
