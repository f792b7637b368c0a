"""Does a training run fit? An estimate from the model's shapes, before any weight is read.

Exact are weights, gradients and Adam's moments (Rajbhandari et al., 2020: what each ZeRO stage divides by
the workers). Activations are counted from what autograd keeps in a transformer layer, within a factor of
two; a run that was measured corrects them for the next start in the same folder.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from readapt_ray.errors import PlacementError
from readapt_ray.training import dora

_PROCESS_BYTES = {"cpu": 7 << 27, "cuda": 1 << 30}
_LOSS_BYTES = {"cpu": 1 << 24, "cuda": 3 << 28}
_KEPT = {"cpu": (16, 6), "cuda": (15, 5), "compiled": (9, 3)}
"""Tensors of the hidden and of the intermediate size that autograd keeps in a layer, in the type of the products, counted on
Llama layers with DoRA and dropout; a compiler keeps what the backward pass cannot make again."""
_CGROUP = Path("/sys/fs/cgroup")
"""Of the container (version 2); what the kernel could drop of the file cache counts as free."""


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What the options ask of a worker."""

    num_workers: int
    zero_stage: int
    micro_batch_tokens: int
    dtype: torch.dtype
    gradient_checkpointing: bool
    device_type: str
    compile_layers: bool = False


@dataclass(frozen=True)
class Estimate:
    """Bytes a worker by part, and what each part is."""

    parts: dict[str, int]
    reasons: dict[str, str]

    @property
    def total_bytes(self) -> int:
        """Of all parts."""
        return sum(self.parts.values())

    def arithmetic(self) -> str:
        """The sum, part by part."""
        terms = [f"{name} {_gigabytes(size)} ({self.reasons[name]})" for name, size in self.parts.items()]
        return f"{' + '.join(terms)} = {_gigabytes(self.total_bytes)}"

    def corrected(self, measured_bytes: int) -> float:
        """By how much the activations of a measured run differ from the estimate; from 0.1 up."""
        fixed = self.total_bytes - self.parts["activations"]
        return max(0.1, (measured_bytes - fixed) / max(1, self.parts["activations"]))


def estimate(model: nn.Module, config: Any, demand: Demand, *, correction: float = 1.0) -> Estimate:
    """Bytes of one worker.

    Args:
        model: on the meta device, with its adapters; what is trained requires gradients.
        config: transformers' config of it.
        correction: of the activations, from a run that was measured.
    """
    workers, stage = demand.num_workers, demand.zero_stage
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    frozen = sum(each.numel() for each in model.parameters() if not each.requires_grad)
    width = demand.dtype.itemsize
    hidden = config.hidden_size
    intermediate = getattr(config, "intermediate_size", None) or 4 * hidden
    is_compiled = demand.compile_layers and demand.device_type == "cuda"
    kept_hidden, kept_intermediate = _KEPT["compiled" if is_compiled else demand.device_type]
    a_layer = demand.micro_batch_tokens * width * (kept_hidden * hidden + kept_intermediate * intermediate)
    layers = config.num_hidden_layers
    if demand.gradient_checkpointing:
        activations = layers * demand.micro_batch_tokens * hidden * width + a_layer
    else:
        activations = layers * a_layer

    def shared(from_stage: int) -> int:
        return workers if stage >= from_stage else 1

    def where(from_stage: int) -> str:
        return f"over {workers} workers" if stage >= from_stage else f"whole on each at zero_stage {stage}"

    kept = "kept for one" if demand.gradient_checkpointing else "kept for all"
    return Estimate(
        parts={
            "frozen weights": frozen * width // shared(3),
            "trained weights": 4 * trained // shared(3),
            "gradients": 4 * trained // shared(2),
            "optimizer": (8 if stage == 0 else 12) * trained // shared(1),
            "activations": int(activations * correction),
            "loss": _LOSS_BYTES.get(demand.device_type, _LOSS_BYTES["cuda"]),
            "process": _PROCESS_BYTES.get(demand.device_type, _PROCESS_BYTES["cuda"]),
        },
        reasons={
            "frozen weights": f"{frozen:,} x {width} bytes, {where(3)}",
            "trained weights": f"{trained:,} x 4 bytes, {where(3)}",
            "gradients": where(2),
            "optimizer": where(1),
            "activations": f"{demand.micro_batch_tokens:,} tokens, {layers} layers, {kept}"
            + (f", times {correction:.2f} as measured before" if correction != 1.0 else ""),
            "loss": "logits of a chunk",
            "process": "Python, torch, Ray",
        },
    )


def on_meta(auto_class: Any, config: Any, shape: dora.AdapterShape | None) -> nn.Module:
    """The model with its adapters and no weights.

    Raises:
        ModelError: the targets match no layer.
    """
    with torch.device("meta"):
        model: nn.Module = auto_class.from_config(config)
        if shape is None:
            model.requires_grad_(True)
        else:
            dora.add_adapters(model, shape)
    return model


def check_fits(found: Estimate, *, free_bytes: int) -> None:
    """Refuse what does not fit.

    Args:
        free_bytes: of the worker's device.

    Raises:
        PlacementError: it does not; the message shows the arithmetic.
    """
    if found.total_bytes > free_bytes:
        raise PlacementError(
            f"a worker would need about {_gigabytes(found.total_bytes)} and has {_gigabytes(free_bytes)}: {found.arithmetic()}. "
            f"Lower micro_batch_tokens, set gradient_checkpointing, raise zero_stage with more workers, or start anyway with "
            f"check_memory false"
        )


def free_bytes(device: torch.device, num_workers_here: int) -> int:
    """What a worker may take: of its GPU, or its share of this machine's memory, or of its container's."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    free = int(psutil.virtual_memory().available)
    limit = _CGROUP / "memory.max"
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        held = int((_CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        free = min(free, int(text) - held + int(stat.get("inactive_file", 0)))
    return free // num_workers_here


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
