"""Adapters that are trained: LoRA and DoRA layers around frozen linear layers, saved as PEFT saves them.

DoRA (Liu et al., 2024): y = d * (W x + s B A x) + bias, d = m / ||W + s B A|| per output row, the norm
outside the gradient (section 4.3). PEFT builds B A for the norm in every forward pass; here the norm
comes from factors (arXiv 2603.22276), r^2 instead of O * I work, and once an optimizer step:

    ||W + s B A||^2 = ||W||^2 + 2 s sum(W A^T * B) + s^2 sum(B (A A^T) * B)      row by row

Dropout acts on the input of A alone: the mean of the output is PEFT's, without its second matmul of W.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

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
    """

    base_norm_squared: Tensor
    norm: Tensor

    def __init__(self, base: nn.Linear, shape: AdapterShape) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        rank = shape.rank
        self.scaling = shape.alpha / rank
        self.dropout = shape.dropout
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.magnitude: nn.Parameter | None = None
        if shape.method == "dora":
            norm = torch.linalg.vector_norm(base.weight.detach().float(), dim=1)
            self.magnitude = nn.Parameter(norm.clone())
            self.register_buffer("base_norm_squared", norm**2, persistent=False)
            self.register_buffer("norm", norm, persistent=False)

    @torch.no_grad()
    def refresh_norm(self) -> None:
        """Compute ||W + s B A|| anew; to be called after every change of the factors."""
        if self.magnitude is None:
            return
        weight_OI, A, B, s = self.base.weight, self.lora_A, self.lora_B, self.scaling
        cross_O = ((weight_OI @ A.T.to(weight_OI.dtype)).to(B.dtype) * B).sum(1)
        square_O = ((B @ (A @ A.T)) * B).sum(1)
        self.norm.copy_((self.base_norm_squared + 2 * s * cross_O + s * s * square_O).clamp_min(0).sqrt())

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, [..., I] to [..., O], in the dtype of the base layer's output."""
        base = functional.linear(x, self.base.weight)
        dropped = functional.dropout(x, self.dropout, self.training)
        low_rank = functional.linear(dropped, self.lora_A.to(x.dtype))
        scaled_B = (self.lora_B * self.scaling).to(base.dtype)
        y = torch.addmm(base.flatten(0, -2), low_rank.flatten(0, -2), scaled_B.T).view_as(base)
        if self.magnitude is not None:
            y = y * (self.magnitude / self.norm).to(y.dtype)
        return y if self.base.bias is None else y + self.base.bias


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
    """The trained tensors under the names that PEFT gives them, float32 on the CPU."""
    state = {}
    for name, layer in adapted_layers(model):
        state[f"{_KEY_PREFIX}{name}.lora_A.weight"] = layer.lora_A
        state[f"{_KEY_PREFIX}{name}.lora_B.weight"] = layer.lora_B
        if layer.magnitude is not None:
            state[f"{_KEY_PREFIX}{name}.lora_magnitude_vector"] = layer.magnitude
    return {name: tensor.detach().float().cpu().contiguous() for name, tensor in state.items()}


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
