"""Adapters that are trained: LoRA and DoRA layers around frozen linear layers, saved as PEFT saves them.

DoRA (Liu et al., 2024): y = d * (W x + s B A x) + bias, d = m / ||W + s B A|| per output row, the norm
outside the gradient (section 4.3). PEFT builds B A for the norm in every forward pass; here the norm
comes from factors (arXiv 2603.22276), r^2 instead of O * I work, and once an optimizer step:

    ||W + s B A||^2 = ||W||^2 + 2 s sum(W A^T * B) + s^2 sum(B (A A^T) * B)      row by row

Dropout acts on the input of A alone: the mean of the output is PEFT's, without its second matmul of W.

Under ZeRO-3 a worker holds a part of each weight: the base layer is called as a module, so that
DeepSpeed's hooks fetch it, and the norm gathers one layer's weight at a time.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from torch.nn import functional

from readapt_ray.errors import ModelError
from readapt_ray.storage import Location

AdapterMethod = Literal["dora", "lora"]
_KEY_PREFIX = "base_model.model."


@dataclass(frozen=True, kw_only=True)
class AdapterShape:
    """What an adapter is made of. `targets` are the last parts of layer names."""

    method: AdapterMethod
    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]


class AdaptedLinear(nn.Module):
    """A frozen linear layer with a trained low-rank update; with a magnitude it is DoRA, without LoRA.

    Factors and magnitude are float32 whatever the base is: a magnitude in bfloat16 stops moving.
    `base` has given its bias away: it is added after the magnitude.
    """

    base_norm_squared: Tensor
    norm: Tensor

    def __init__(self, base: nn.Linear, shape: AdapterShape) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.bias = base.bias
        base.register_parameter("bias", None)
        rank = shape.rank
        self.scaling = shape.alpha / rank
        self.dropout = shape.dropout
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.magnitude: nn.Parameter | None = None
        if shape.method == "dora":
            with gathered([base.weight]):
                norm = torch.linalg.vector_norm(base.weight.detach().float(), dim=1)
            self.magnitude = nn.Parameter(norm.clone())
            self.register_buffer("base_norm_squared", norm**2, persistent=False)
            self.register_buffer("norm", norm, persistent=False)

    @torch.no_grad()
    def refresh_norm(self) -> None:
        """Compute ||W + s B A|| anew; to be called after every change of the factors. Collective under ZeRO-3."""
        if self.magnitude is None:
            return
        weight_OI, A, B, s = self.base.weight, self.lora_A, self.lora_B, self.scaling
        with gathered([weight_OI, A, B]):
            cross_O = ((weight_OI @ A.T.to(weight_OI.dtype)).to(B.dtype) * B).sum(1)
            square_O = ((B @ (A @ A.T)) * B).sum(1)
        self.norm.copy_((self.base_norm_squared + 2 * s * cross_O + s * s * square_O).clamp_min(0).sqrt())

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, [..., I] to [..., O], in the dtype of the base layer's output."""
        base = self.base(x)
        dropped, kept = dropout(x, self.dropout if self.training else 0.0)
        low_rank = functional.linear(dropped, self.lora_A.to(x.dtype))
        scaled_B = (self.lora_B * (self.scaling / kept)).to(base.dtype)
        base_NO, low_rank_NR = base.flatten(0, -2), low_rank.flatten(0, -2)
        if self.magnitude is None:
            y = torch.addmm(base_NO, low_rank_NR, scaled_B.T)
        else:
            share_O = self.magnitude / self.norm.clamp_min(torch.finfo(self.norm.dtype).tiny)
            if torch.compiler.is_compiling():  # the compiler fuses this, and cannot trace a change in place
                y = torch.addmm(base_NO, low_rank_NR, scaled_B.T) * share_O.to(base.dtype)
            else:
                y = _DoraOutput.apply(  # type: ignore[no-untyped-call]
                    base_NO, low_rank_NR, scaled_B, self.magnitude, share_O.detach().to(base.dtype)
                )
        y = y.view_as(base)
        return y if self.bias is None else y + self.bias


class _DoraOutput(torch.autograd.Function):
    """(base + low_rank scaled_B^T) * share, row-wise, in place of `base`; share is m / norm, the norm constant."""

    @staticmethod
    def forward(  # noqa: PLR0917 -- autograd passes them by place
        ctx: Any, base_NO: Tensor, low_rank_NR: Tensor, scaled_B_OR: Tensor, magnitude_O: Tensor, share_O: Tensor
    ) -> Tensor:
        ctx.mark_dirty(base_NO)
        base_NO.addmm_(low_rank_NR, scaled_B_OR.T).mul_(share_O)
        ctx.save_for_backward(base_NO, low_rank_NR, scaled_B_OR, share_O, magnitude_O)
        return base_NO

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        y_NO, low_rank_NR, scaled_B_OR, share_O, magnitude_O = ctx.saved_tensors
        gradient_NO = gradients[0]
        along_O = (gradient_NO * y_NO).sum(0, dtype=magnitude_O.dtype)
        magnitude_grad = along_O / torch.where(magnitude_O == 0, 1.0, magnitude_O)
        shared_NO = gradient_NO * share_O
        return shared_NO, shared_NO @ scaled_B_OR, shared_NO.T @ low_rank_NR, magnitude_grad, None


def dropout(x: Tensor, probability: float) -> tuple[Tensor, float]:
    """Zero elements at random, without the scaling that keeps the mean.

    On a CPU a mask of 16-bit pieces of NumPy's fastest generator, seeded by torch's, takes a third of the time of
    torch's Bernoulli draws; the probability is then the nearest multiple of 2^-16.

    Returns:
        The input with zeros, and the share of elements that is kept in the mean: divide by it.
    """
    if probability == 0:
        return x, 1.0
    if x.device.type != "cpu":
        return functional.dropout(x, probability), 1.0
    dropped_of_65536 = round(probability * 65536)
    generator = np.random.SFC64(int(torch.randint(2**62, ())))
    pieces = torch.from_numpy(generator.random_raw(-(-x.numel() // 4)).view(np.int16))[: x.numel()].view(x.shape)
    # Compared into the type of x: a product with booleans converts them, forward and backward.
    is_kept = torch.ge(pieces, dropped_of_65536 - 32768, out=torch.empty(x.shape, dtype=x.dtype))
    return x * is_kept, 1 - dropped_of_65536 / 65536


@contextlib.contextmanager
def gathered(parameters: Sequence[Tensor], *, changed_by_rank: int | None = None) -> Iterator[None]:
    """Whole parameters inside the block, where ZeRO-3 partitions them; elsewhere they are whole already.

    Args:
        changed_by_rank: the worker whose changes all others take over.
    """
    partitioned = [each for each in parameters if hasattr(each, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=changed_by_rank):
        yield


def add_adapters(model: nn.Module, shape: AdapterShape) -> list[str]:
    """Freeze a model and wrap every linear layer whose name ends with one of the targets.

    Returns:
        The full names of the wrapped layers.

    Raises:
        ModelError: a target matches no linear layer; the message lists what there is.
    """
    model.requires_grad_(False)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    matched = {name for name in linear for target in shape.targets if name == target or name.endswith(f".{target}")}
    missing = [target for target in shape.targets if not any(n == target or n.endswith(f".{target}") for n in matched)]
    if missing:
        there = sorted({name.rsplit(".", 1)[-1] for name in linear})
        raise ModelError(f"target modules {missing} match no linear layer; the model has {there}")
    for name in sorted(matched):
        parent, _, child = name.rpartition(".")
        layer = AdaptedLinear(linear[name], shape)
        setattr(model.get_submodule(parent), child, layer)
    return sorted(matched)


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLinear]]:
    """The wrapped layers of a model by name."""
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            yield name, module


def refresh_norms(model: nn.Module) -> None:
    """Bring every DoRA norm up to date; once after each optimizer step."""
    for _, layer in adapted_layers(model):
        layer.refresh_norm()


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The trained tensors under the names that PEFT gives them, float32 on the CPU. Collective under ZeRO-3."""
    state = {}
    for name, layer in adapted_layers(model):
        parts = {"lora_A.weight": layer.lora_A, "lora_B.weight": layer.lora_B}
        if layer.magnitude is not None:
            parts["lora_magnitude_vector"] = layer.magnitude
        with gathered(list(parts.values())):
            for part, tensor in parts.items():
                state[f"{_KEY_PREFIX}{name}.{part}"] = tensor.detach().float().cpu().clone()
    return state


def save_adapter(
    location: Location, state: dict[str, Tensor], shape: AdapterShape, *, base: str, task_type: str
) -> None:
    """Write a PEFT adapter folder that plain PEFT loads.

    Args:
        location: the folder.
        state: as `adapter_state` gives it.
        base: name, folder or hub id of the model underneath.
        task_type: PEFT's: `CAUSAL_LM` for a model with its head, `FEATURE_EXTRACTION` for a headless one.
    """
    from peft import LoraConfig

    config = LoraConfig(
        r=shape.rank,
        lora_alpha=shape.alpha,
        lora_dropout=shape.dropout,
        target_modules=sorted(shape.targets),
        use_dora=shape.method == "dora",
        base_model_name_or_path=base,
        task_type=task_type,
        inference_mode=True,
    ).to_dict()
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    (location / "adapter_model.safetensors").write_bytes(to_safetensors(state, metadata={"format": "pt"}))
    (location / "adapter_config.json").write_text(json.dumps(plain, indent=2, sort_keys=True, default=str) + "\n")
