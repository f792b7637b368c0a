"""Estimate the memory of a training worker from the model's shape, and refuse a run that does not fit.

No weight is read. `readapt plan` uses the same estimate. Weights, gradients and Adam's moments are exact (Rajbhandari
et al., 2020, say what each ZeRO stage divides by the number of workers). Activations are estimated from what autograd
keeps in a transformer layer, within a factor of two. A measured run corrects them for the next start in its folder.
"""

import math
from dataclasses import dataclass, replace
from typing import get_args

import torch

from readapt_ray import hardware
from readapt_ray.catalog.shapes import BaseDtype, ModelShape, is_in_layer
from readapt_ray.errors import PlacementError
from readapt_ray.nn.quantized import stored_bytes
from readapt_ray.training.dora import AdapterShape
from readapt_ray.training.gradients import BUCKET_BYTES

_PROCESS_BYTES = {"cpu": 7 << 27, "cuda": hardware.GPU_PROCESS_BYTES}
_LOSS_BYTES = {"cpu": 1 << 24, "cuda": 3 << 28}


@dataclass(frozen=True, kw_only=True)
class WorkerSetup:
    """The options that decide how much memory a worker needs."""

    adapter: AdapterShape | None
    """The adapter that is trained; None trains all weights."""
    num_workers: int
    """All workers of the run, which ZeRO partitions over."""
    zero_stage: int
    micro_batch_tokens: int
    """Tokens of one forward and backward pass of a worker."""
    dtype: torch.dtype
    """Type of the frozen weights and of the activations; trained weights are float32."""
    gradient_checkpointing: bool
    device_type: str
    """cpu or cuda."""
    base_dtype: BaseDtype = "auto"
    """Type that the frozen linear layers are stored in; auto stores them in `dtype`."""


@dataclass(frozen=True)
class MemoryEstimate:
    """The memory of one worker in bytes, by part, with an explanation of each part."""

    parts: dict[str, int]
    """Bytes by part, such as activations."""
    reasons: dict[str, str]
    """What each part is computed from, as text."""

    @property
    def total_bytes(self) -> int:
        """Bytes of all parts together."""
        return sum(self.parts.values())

    def arithmetic(self) -> str:
        """Write the sum out as text, part by part, for an error message."""
        terms = [f"{name} {_gigabytes(size)} ({self.reasons[name]})" for name, size in self.parts.items()]
        return f"{' + '.join(terms)} = {_gigabytes(self.total_bytes)}"

    def corrected(self, measured_bytes: int) -> float:
        """Return the ratio of measured to estimated activations, at least 0.1, for `estimate_memory`'s `correction`.

        Args:
            measured_bytes: peak memory of a worker with this setup. All other parts are taken to be exact. The estimate
                must have been made without a correction.
        """
        fixed = self.total_bytes - self.parts["activations"]
        return max(0.1, (measured_bytes - fixed) / max(1, self.parts["activations"]))


def estimate_memory(shape: ModelShape, setup: WorkerSetup, *, correction: float = 1.0) -> MemoryEstimate:
    """Estimate the bytes of memory that one training worker needs.

    Args:
        shape: shape of the model that is trained, with its language-model head if it has one.
        setup: the options.
        correction: factor of the activations, from a measured run; see `MemoryEstimate.corrected`.

    Raises:
        ModelError: a target of the adapter matches no layer.
    """
    workers, stage = setup.num_workers, setup.zero_stage
    trained = num_trained(shape, setup.adapter)
    frozen_bytes, frozen_text = _frozen(shape, setup)

    def shared(from_stage: int) -> int:
        return workers if stage >= from_stage else 1

    def where(from_stage: int) -> str:
        return f"over {workers} workers" if stage >= from_stage else f"whole on each at zero_stage {stage}"

    kept = "kept for one" if setup.gradient_checkpointing else "kept for all"
    return MemoryEstimate(
        parts={
            "frozen weights": frozen_bytes // shared(3),
            "trained weights": 4 * trained // shared(3),
            "gradients": 4 * trained // shared(2) + (2 * BUCKET_BYTES if stage else 0),
            "optimizer": (8 if stage == 0 else 12) * trained // shared(1),
            "activations": int(_activations(shape, setup) * correction),
            "loss": _LOSS_BYTES.get(setup.device_type, _LOSS_BYTES["cuda"]),
            "process": process_bytes(setup.device_type),
        },
        reasons={
            "frozen weights": f"{frozen_text}, {where(3)}",
            "trained weights": f"{trained:,} x 4 bytes, {where(3)}",
            "gradients": where(2) + (", and two buckets that are sent" if stage else ""),
            "optimizer": where(1),
            "activations": f"{setup.micro_batch_tokens:,} tokens, {shape.num_layers} layers, {kept}"
            + (f", times {correction:.2f} as measured before" if correction != 1.0 else ""),
            "loss": "logits of a chunk",
            "process": "Python, torch, Ray",
        },
    )


def _frozen(shape: ModelShape, setup: WorkerSetup) -> tuple[int, str]:
    """Return the bytes of all frozen weights, before ZeRO-3 divides them, and an explanation."""
    num, width = 0 if setup.adapter is None else shape.num_parameters, setup.dtype.itemsize
    if setup.base_dtype == "auto":
        return num * width, f"{num:,} x {width} bytes"
    layers = [(inputs, outputs) for name, inputs, outputs in shape.linears if is_in_layer(name)]
    num_quantized, largest = sum(map(math.prod, layers)), max(map(math.prod, layers), default=0)
    stored = sum(stored_bytes(setup.base_dtype, *each) for each in layers)
    text = (
        f"{num_quantized:,} in {setup.base_dtype}, {num - num_quantized:,} x {width} bytes, the largest layer decoded"
    )
    return stored + width * (num - num_quantized + largest), text


def process_bytes(device_type: str) -> int:
    """Return the bytes of a worker that has only imported its libraries: host memory for "cpu", else GPU memory."""
    return _PROCESS_BYTES.get(device_type, _PROCESS_BYTES["cuda"])


def num_trained(shape: ModelShape, adapter: AdapterShape | None) -> int:
    """Count the trained parameters of the model, not divided over workers: of the adapter, or all if it is None.

    Raises:
        ModelError: a target of the adapter matches no layer.
    """
    if adapter is None:
        return shape.num_parameters
    magnitudes = 1 if adapter.method == "dora" else 0
    return sum(
        adapter.rank * (inputs + outputs) + magnitudes * outputs for inputs, outputs in shape.adapted(adapter.targets)
    )


def _activations(shape: ModelShape, setup: WorkerSetup) -> int:
    """Estimate the bytes of activations that are kept for the backward pass."""
    token_bytes = setup.micro_batch_tokens * setup.dtype.itemsize
    layer_bytes = round(token_bytes * kept_numbers(shape, setup.device_type))
    if setup.gradient_checkpointing:
        return shape.num_layers * token_bytes * shape.hidden + layer_bytes
    return shape.num_layers * layer_bytes


def kept_numbers(shape: ModelShape, device_type: str) -> float:
    """Estimate how many numbers per token autograd keeps in a layer with DoRA and dropout, in the type of the products.

    On a GPU these are: the outputs of linear layers; the inputs of attention (with rotated queries and keys) and of the
    feed-forward part; inputs and outputs of both norms. benchmarks/step_traffic.py counts the same within 15%, compiled
    or not. A CPU also keeps dropout masks and results that a GPU would fuse.
    """
    if device_type == "cpu":
        return 16 * shape.hidden + 6 * shape.intermediate
    outputs = sum(each for name, _, each in shape.linears if is_in_layer(name)) / shape.num_layers
    return outputs + 4 * shape.hidden + 3 * shape.attention_width + shape.intermediate


def advice_that_fits(shape: ModelShape, setup: WorkerSetup, free_bytes: float, *, section: str = "") -> str:
    """Find options with which a worker fits, `gradient_checkpointing` or a smaller `base_dtype`; return advice as text.

    The options are tried in order of cost: each next one computes longer or rounds more. The text is empty if none
    fits, or if the setup fits as it is. Example: "set train.base_dtype int8, which needs 9.31 GB".

    Args:
        shape: as for `estimate_memory`.
        setup: the options that do not fit.
        free_bytes: memory of the worker in bytes.
        section: prefix of the names of options: `train.` in a run file.
    """
    kinds: tuple[BaseDtype, ...] = get_args(BaseDtype)
    if setup.adapter is None or setup.zero_stage == 3:
        kinds = kinds[:1]
    for kind in kinds[kinds.index(setup.base_dtype) :]:
        for checkpoints in sorted({setup.gradient_checkpointing, True}):
            smaller = replace(setup, base_dtype=kind, gradient_checkpointing=checkpoints)
            needed = estimate_memory(shape, smaller).total_bytes
            if needed <= free_bytes:
                named = [f"{section}base_dtype {kind}"] if kind != setup.base_dtype else []
                named += (
                    [f"{section}gradient_checkpointing true"] if checkpoints != setup.gradient_checkpointing else []
                )
                return f"set {' and '.join(named)}, which needs {_gigabytes(needed)}" if named else ""
    return ""


def check_fits(shape: ModelShape, setup: WorkerSetup, *, free_bytes: int, correction: float = 1.0) -> None:
    """Refuse a training run whose worker would not fit into memory.

    Args:
        shape: as for `estimate_memory`, as are `setup` and `correction`.
        free_bytes: free memory of the worker's device in bytes.

    Raises:
        PlacementError: the worker does not fit; the message shows the arithmetic.
    """
    found = estimate_memory(shape, setup, correction=correction)
    if found.total_bytes > free_bytes:
        advice = advice_that_fits(shape, setup, free_bytes) or "set gradient_checkpointing"
        raise PlacementError(
            f"a worker would need about {_gigabytes(found.total_bytes)} and has {_gigabytes(free_bytes)}: {found.arithmetic()}. "
            f"Lower micro_batch_tokens, {advice}, raise zero_stage with more workers, or start anyway with check_memory false"
        )


def free_bytes(device: torch.device, num_workers_here: int) -> int:
    """Return the bytes that a worker may use: free GPU memory, or its share of the free memory of the machine.

    Args:
        device: device of the worker. A GPU's free memory is not divided.
        num_workers_here: workers on this machine, which share its memory equally.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return hardware.free_memory_bytes() // num_workers_here


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
