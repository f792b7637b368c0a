"""Add LoRA and DoRA adapters to the linear layers of a model, train them, and save them in PEFT's format.

DoRA (Liu et al., 2024): y = d * (W x + s B A x) + bias, with d = m / ||W + s B A|| per output row. No gradient goes
through the norm (section 4.3). PEFT builds B A for the norm in every forward pass. Here the norm is computed from the
factors (arXiv 2603.22276), without the O * I product, and only once per optimizer step:

    ||W + s B A||^2 = ||W||^2 + 2 s sum(W A^T * B) + s^2 sum(B (A A^T) * B)      row by row

Dropout acts only on the input of A. The mean output is the same as PEFT's, without its second product with W.
adapted_output.py computes the output and its gradients.

Under ZeRO-3 a worker holds a part of each weight. So the base layer is called as a module, which lets DeepSpeed's hooks
fetch its weight, and the norms gather the weight of one layer at a time.
"""

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from torch.nn import functional

from readapt_ray.catalog.shapes import matching_layers
from readapt_ray.errors import ModelError
from readapt_ray.model_file_names import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME
from readapt_ray.nn.quantized import LINEAR_LAYERS, QuantizedLinear, row_norms, weight_of
from readapt_ray.storage import Location
from readapt_ray.training.adapted_output import AdaptedOutput, CastFactor, adapted_output
from readapt_ray.training.partitioned import gathered, is_partitioned

AdapterMethod = Literal["dora", "lora"]
_KEY_PREFIX = "base_model.model."
_PEFT_DEFAULTS: dict[str, Any] = {
    "peft_type": "LORA",
    "auto_mapping": None,
    "revision": None,
    "inference_mode": True,
    "fan_in_fan_out": False,
    "bias": "none",
    "use_rslora": False,
    "modules_to_save": None,
    "init_lora_weights": True,
    "layers_to_transform": None,
    "layers_pattern": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "loftq_config": {},
}
"""Fields in the config of every PEFT since 0.9, the first with DoRA. They are listed since importing PEFT takes 2 s."""


@dataclass(frozen=True, kw_only=True)
class AdapterShape:
    """The settings of an adapter: method, rank, scale, dropout and target layers."""

    method: AdapterMethod
    rank: int
    """Rows of A and columns of B."""
    alpha: float
    """Scale of the update: s = alpha / rank."""
    dropout: float
    """Probability with which an input of A is set to zero."""
    targets: tuple[str, ...]
    """Ends of the names of the layers that get an adapter, such as q_proj."""


class AdaptedLinear(nn.Module):
    """A frozen linear layer with a trained low-rank update: DoRA with a magnitude, LoRA without.

    The trained parameters are `lora_A` [R, I], `lora_B` [O, R] (zeros at first) and, for DoRA, `magnitude` [O] (the
    norms of the base's rows at first; None for LoRA). They are float32 for any type of the base: in bfloat16 a
    magnitude would stop changing. I = inputs, O = outputs, R = rank.

    Args:
        base: the layer to wrap, weight [O, I]. It is frozen, and its bias moves to this layer, to be added after the
            magnitude. If it is quantized, norms are those of the decoded weight, which its products use.
        shape: method, rank, scale and dropout.
    """

    bias: nn.Parameter | None
    base_norm_squared: Tensor
    norm: Tensor
    cast_scaled_a: Tensor | None
    """s A in the type of the products; None unless `keep_casts` was called."""
    cast_b: Tensor | None
    """B in the type of the products; None unless `keep_casts` was called."""

    def __init__(self, base: nn.Linear | QuantizedLinear, shape: AdapterShape) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.bias = base.bias
        base.register_parameter("bias", None)
        rank = shape.rank
        self.scaling = shape.alpha / rank
        self.dropout = shape.dropout
        self.is_on = True
        """Whether the adapter is applied; see `without_adapters`."""
        self.register_buffer("cast_scaled_a", None, persistent=False)
        self.register_buffer("cast_b", None, persistent=False)
        device = (base.full_norm if isinstance(base, QuantizedLinear) else base.weight).device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.magnitude: nn.Parameter | None = None
        if shape.method == "dora":
            with gathered(list(base.parameters())):
                norm = row_norms(weight_of(base).detach())
            self.magnitude = nn.Parameter(norm.clone())
            self.register_buffer("base_norm_squared", norm**2, persistent=False)
            self.register_buffer("norm", norm.clamp_min(torch.finfo(norm.dtype).tiny), persistent=False)

    def saved_share(self) -> Tensor | None:
        """Return the factor [O] by which the magnitude is multiplied when it is saved; None if there is none to apply.

        Quantization changes the norms of rows, and an adapter is saved for the base in full precision. The factor keeps
        m / norm as it was trained. Without it, an adapter that learned nothing would scale the rows.
        """
        if self.magnitude is None or not isinstance(self.base, QuantizedLinear):
            return None
        full_squared = self.norm**2 - self.base_norm_squared + self.base.full_norm**2
        return full_squared.clamp_min(0).sqrt().clamp_min(torch.finfo(self.norm.dtype).tiny) / self.norm

    def keep_casts(self) -> None:
        """Cast the factors once per step instead of in each pass; this saves two kernels in compiled passes.

        Only compiled passes use the casts. Nothing changes if the base has the type of the factors.
        """
        weight: Any = self.base if isinstance(self.base, QuantizedLinear) else self.base.weight
        if weight.dtype != self.lora_A.dtype:
            self.cast_scaled_a = torch.empty_like(self.lora_A, dtype=weight.dtype, requires_grad=False)
            self.cast_b = torch.empty_like(self.lora_B, dtype=weight.dtype, requires_grad=False)
            self.refresh()

    def drop_casts(self) -> None:
        """Undo `keep_casts`: cast the factors in each pass."""
        self.cast_scaled_a = self.cast_b = None

    @torch.no_grad()
    def refresh(self) -> None:
        """Recompute ||W + s B A|| and the casts; call it after every change of the factors. Collective under ZeRO-3."""
        A, B, s = self.lora_A, self.lora_B, self.scaling
        if self.cast_scaled_a is not None and self.cast_b is not None:
            torch.mul(A, s, out=self.cast_scaled_a)
            self.cast_b.copy_(B)
        if self.magnitude is None:
            return
        precise = torch.autocast(A.device.type, enabled=False)
        with gathered([*self.base.parameters(), A, B]), precise:
            weight_OI = weight_of(self.base)
            cross_O = ((weight_OI @ A.T.to(weight_OI.dtype)).to(B.dtype) * B).sum(1)
            square_O = ((B @ (A @ A.T)) * B).sum(1)
        square_O = self.base_norm_squared + 2 * s * cross_O + s * s * square_O
        self.norm.copy_(square_O.clamp_min(0).sqrt().clamp_min(torch.finfo(square_O.dtype).tiny))

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., I] to [..., O], in the dtype of the base layer's output, with dropout in train mode.

        If `is_on` is False, it computes as the base layer with its bias.
        """
        probability = self.dropout if self.training else 0.0
        if not self.is_on:
            y: Tensor = self.base(x)
        elif torch.compiler.is_compiling():  # the compiler fuses these operations, but cannot trace in-place changes
            share = None if self.magnitude is None else self.magnitude / self.norm
            dropped = functional.dropout(x, probability) if probability else x
            if self.cast_scaled_a is None:
                scaled_A, B = self.lora_A * self.scaling, self.lora_B
            else:
                scaled_A = CastFactor.apply(self.lora_A, self.cast_scaled_a, self.scaling)  # type: ignore[no-untyped-call]
                B = CastFactor.apply(self.lora_B, self.cast_b, 1.0)  # type: ignore[no-untyped-call]
            y = adapted_output(self.base(x), dropped, scaled_A, B, share)
        else:
            norm = None if self.magnitude is None else self.norm
            weight: Any = self.base if isinstance(self.base, QuantizedLinear) else self.base.weight
            base_and_weight = (self.base(x), None) if is_partitioned(weight) else (None, weight)
            y = AdaptedOutput.apply(  # type: ignore[no-untyped-call]
                *base_and_weight, x, self.lora_A, self.lora_B, self.magnitude, norm, self.scaling, probability
            )
        return y if self.bias is None else y + self.bias


def add_adapters(model: nn.Module, shape: AdapterShape) -> list[str]:
    """Freeze a model and wrap every linear layer whose name ends with one of the targets, in place.

    A target is one or more whole parts of a dotted name: "q_proj" matches "layers.0.q_proj", not "layers.0.my_q_proj".

    Returns:
        The full names of the wrapped layers.

    Raises:
        ModelError: a target matches no linear layer; the message lists the names that exist.
    """
    model.requires_grad_(False)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, LINEAR_LAYERS)}
    matched = matching_layers(linear, shape.targets)
    for name in matched:
        parent, _, child = name.rpartition(".")
        layer = AdaptedLinear(linear[name], shape)
        setattr(model.get_submodule(parent), child, layer)
    return matched


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLinear]]:
    """Yield name and layer of each layer of a model that has an adapter, in the order of `named_modules`."""
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            yield name, module


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Switch adapters, dropout and gradients off during a `with` block, so that the model computes like its base.

    After the block all adapters are on, and the model is in the mode (train or eval) in which it was before.
    """
    layers, was_training = [layer for _, layer in adapted_layers(model)], model.training
    try:
        model.eval()
        for layer in layers:
            layer.is_on = False
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
        for layer in layers:
            layer.is_on = True


def refresh(model: nn.Module) -> None:
    """Recompute the norms and casts of all adapters; call it after each optimizer step. Collective under ZeRO-3."""
    for _, layer in adapted_layers(model):
        layer.refresh()


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Copy the trained tensors to the CPU in float32, under PEFT's names. Collective under ZeRO-3.

    A model without adapters gives an empty dict. Magnitudes are those for the base in full precision, also if it is
    quantized here (`saved_share`).
    """
    state = {}
    for name, layer in adapted_layers(model):
        parts: dict[str, Tensor] = {"lora_A.weight": layer.lora_A, "lora_B.weight": layer.lora_B}
        if layer.magnitude is not None:
            share = layer.saved_share()
            parts["lora_magnitude_vector"] = layer.magnitude if share is None else layer.magnitude * share
        with gathered(list(parts.values())):
            for part, tensor in parts.items():
                state[f"{_KEY_PREFIX}{name}.{part}"] = tensor.detach().float().cpu().clone()
    return state


@torch.no_grad()
def load_adapter_state(model: nn.Module, state: dict[str, Tensor], *, name: str) -> None:
    """Set the trained tensors of a model to a state from `adapter_state`, and refresh norms. Collective under ZeRO-3.

    Args:
        model: a model with adapters of the same settings.
        state: the tensors under PEFT's names.
        name: name of the adapter, for errors.

    Raises:
        ModelError: the state belongs to other layers.
    """
    state = {key.replace("lora_magnitude_vector.weight", "lora_magnitude_vector"): state[key] for key in state}
    there = adapter_state(model)
    if differing := sorted(there.keys() ^ state.keys()):
        raise ModelError(f"the adapter {name!r} was not trained on the same layers: {', '.join(differing[:5])}")
    for path, layer in adapted_layers(model):
        parts = {"lora_A.weight": layer.lora_A, "lora_B.weight": layer.lora_B}
        if layer.magnitude is not None:
            parts["lora_magnitude_vector"] = layer.magnitude
        for part, tensor in parts.items():
            with gathered([tensor], changed_by_rank=0):
                tensor.copy_(state[f"{_KEY_PREFIX}{path}.{part}"])
        layer.refresh()
        if layer.magnitude is not None and (share := layer.saved_share()) is not None:
            layer.magnitude.div_(share)


def save_adapter(
    location: Location, state: dict[str, Tensor], shape: AdapterShape, *, base: str, task_type: str
) -> None:
    """Write a PEFT adapter folder (weights and config) that plain PEFT loads.

    Args:
        location: the folder. Its weights and config are replaced.
        state: the tensors, from `adapter_state`.
        shape: the settings of the adapter.
        base: name, folder or hub id of the base model.
        task_type: PEFT's task type: `CAUSAL_LM` for a model with its head, `FEATURE_EXTRACTION` without.
    """
    config = _PEFT_DEFAULTS | {
        "r": shape.rank,
        "lora_alpha": shape.alpha,
        "lora_dropout": shape.dropout,
        "target_modules": sorted(shape.targets),
        "use_dora": shape.method == "dora",
        "base_model_name_or_path": base,
        "task_type": task_type,
    }
    (location / ADAPTER_WEIGHTS_NAME).write_bytes(to_safetensors(state, metadata={"format": "pt"}))
    (location / ADAPTER_CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
