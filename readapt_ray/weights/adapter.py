"""Read the factors of a PEFT adapter (LoRA or DoRA) and check that they fit its base model.

In: a folder that PEFT saved. Out: for each adapted weight the factors A and B, the scaling and, for
DoRA, the magnitude. Opening reads only headers and checks every module against the model. The
factors of a weight are read when requested. An option or tensor that is not understood is refused.
"""

import functools
import json
import math
import re
from pathlib import Path
from typing import Any

from readapt_ray.errors import ModelError, WeightMismatchError
from readapt_ray.model_file_names import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME
from readapt_ray.weights.deltas import Factors
from readapt_ray.weights.reused_buffers import ScratchBuffers
from readapt_ray.weights.weight_files import (
    Checkpoint,
    StoredTensor,
    is_finite,
    is_head,
    natural_order,
    read_header,
    refuse_empty_tensors,
)

_PEFT_PREFIX = "base_model.model."
_KINDS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}
# Options that do not change what the factors mean; every other option must be off.
_HARMLESS = {
    "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "init_lora_weights",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size",
    "runtime_config", "eva_config", "ensure_weight_tying",
}  # fmt: skip
# These initialisations subtract the factors from the base weights, so the factors alone are not the update.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_NUM_LISTED = 10
_DEFAULT_ALPHA = 8
"""lora_alpha of a config without one, as in PEFT."""
# Weights whose factors are cached: the current one, and the next one that another core has begun.
_NUM_HELD = 2


class Adapter:
    """A LoRA or DoRA adapter, matched to the weights of the model that it changes."""

    def __init__(self, folder: Path, base: Checkpoint, *, name: str | None = None) -> None:
        """Read the config and headers, and find the weight that each module changes.

        Args:
            folder: a local PEFT folder; it may have been trained on the model with or without its LM head.
            base: the model that the adapter is applied to.
            name: what the user calls the adapter; used in errors. None uses the folder.

        Raises:
            ModelError: the folder holds no adapter, or one that does more than LoRA and DoRA on linear layers, has the
                factors of a weight twice or in part, or changes only the LM head.
            WeightMismatchError: the adapter has modules that `base` lacks or of other shapes; it is of another model.
        """
        self.folder = folder
        self.name = name or str(folder)
        self._config = _read_config(folder, self.name)
        self._modules: dict[str, dict[str, StoredTensor]] = {}
        self._paths: dict[str, str] = {}
        heads = []
        for path, parts in _modules(folder, self.name).items():
            if is_head(path):
                heads.append(path)
                continue
            weight = base.weight_named(f"{path}.weight") or path
            if weight in self._modules:
                raise ModelError(
                    f"the adapter {self.name!r} holds {path!r} and {self._paths[weight]!r}, one weight twice"
                )
            self._modules[weight], self._paths[weight] = parts, path
        self.heads = tuple(sorted(heads))
        """Adapted modules of the LM head. They are left out, since no vector depends on them."""
        self._check(base)
        self.factors = functools.lru_cache(maxsize=_NUM_HELD)(self._read_factors)
        """Return the factors of one weight, by its name, in float32; raise ModelError if one holds NaN or infinity."""

    def names(self) -> list[str]:
        """List the weights that the adapter changes, by their names in the model without its head, in layer order."""
        return sorted(self._modules, key=natural_order)

    def __contains__(self, name: str) -> bool:
        return name in self._modules

    @property
    def is_dora(self) -> bool:
        """Whether it is DoRA: it holds magnitudes besides A and B."""
        return bool(self._config.get("use_dora"))

    def term(self, name: str, start: int, stop: int, scratch: ScratchBuffers, role: str) -> Factors:
        """Return the factors of a whole weight. The other arguments are ignored; `Factors.add_to` selects the rows.

        Raises:
            KeyError: the adapter does not change the weight (`name in adapter` is False).
            ModelError: a factor holds NaN or infinity.
        """
        del start, stop, scratch, role
        return self.factors(name)

    def _read_factors(self, name: str) -> Factors:
        """Return the factors of one weight in float32, read from disk; `factors` caches the last weights.

        Raises:
            ModelError: a factor holds NaN or infinity.
        """
        parts = {}
        for kind, stored in self._modules[name].items():
            tensor = stored.read()
            if not is_finite(tensor):
                raise ModelError(
                    f"tensor {stored.stored_name!r} of the adapter {self.name!r} holds NaN or infinity; train it again"
                )
            parts[kind] = tensor.float()
        rank = parts["A"].shape[0]
        return Factors(
            A_rI=parts["A"], B_Or=parts["B"], magnitude=parts.get("magnitude"), scaling=self._scaling(name, rank)
        )

    def _scaling(self, name: str, rank: int) -> float:
        """Return alpha / rank, or alpha / sqrt(rank) for rank-stabilised LoRA; patterns are matched as in PEFT."""
        patterns = self._config.get("alpha_pattern") or {}
        matched = next(
            (each for each in patterns if re.match(rf"(.*\.)?({each})$", self._paths[name])), self._paths[name]
        )
        alpha = float(patterns.get(matched, self._config.get("lora_alpha", _DEFAULT_ALPHA)))
        return alpha / math.sqrt(rank) if self._config.get("use_rslora") else alpha / rank

    def _check(self, base: Checkpoint) -> None:
        problems = []
        for name in self.names():
            shapes = {kind: stored.shape for kind, stored in self._modules[name].items()}
            path = self._paths[name]
            wanted = {"A", "B", "magnitude"} if self.is_dora else {"A", "B"}
            if shapes.keys() != wanted:
                has, needs = ", ".join(sorted(shapes)), ", ".join(sorted(wanted))
                raise ModelError(
                    f"the adapter {self.name!r} holds {has} for {path!r} where {needs} are expected; save it again"
                )
            if name not in base:
                problems.append(f"{path}: no such weight")
                continue
            rank = shapes["A"][0]
            due = {
                "A": (rank, base.shape(name)[-1]),
                "B": (base.shape(name)[0], rank),
                "magnitude": base.shape(name)[:1],
            }
            if len(base.shape(name)) != 2 or any(shapes[kind] != due[kind] for kind in wanted):
                made_for = (shapes["B"][0], shapes["A"][-1])
                problems.append(f"{path}: made for a weight {list(made_for)}, which is {list(base.shape(name))}")
        if problems:
            linear = sorted({each.rsplit(".", 2)[-2] for each in base.names() if len(base.shape(each)) == 2})
            raise WeightMismatchError(
                f"the adapter {self.name!r} does not fit the model {base.name!r}: {listed(problems)}. It was trained on "
                f"{self._config.get('base_model_name_or_path')!r}; give that model, or an adapter trained on this one "
                f"(its modules are {', '.join(linear)})"
            )
        if not self._modules:
            raise ModelError(f"the adapter {self.name!r} changes no weight of the headless model; train it on others")


def listed(problems: list[str]) -> str:
    """Join at most ten items of a list with "; " for an error message; "and 3 more" at the end if there are more."""
    shown = "; ".join(problems[:_NUM_LISTED])
    return f"{shown}; and {len(problems) - _NUM_LISTED} more" if len(problems) > _NUM_LISTED else shown


def _read_config(folder: Path, name: str) -> dict[str, Any]:
    path = folder / ADAPTER_CONFIG_NAME
    if not path.is_file():
        raise ModelError(
            f"{name!r} is not an adapter: {folder} holds no {ADAPTER_CONFIG_NAME}; give a folder that PEFT saved"
        )
    try:
        config = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    kind = str(config.get("peft_type", "")).upper()
    if kind != "LORA":
        raise ModelError(f"the adapter {name!r} is of the type {kind or 'unknown'}; understood are LoRA and DoRA")
    init = str(config.get("init_lora_weights", True)).lower()
    if init.startswith(_BASE_CHANGING_INITS):
        raise ModelError(
            f"the adapter {name!r} began with init_lora_weights={init!r}, which also changes the base weights; convert it "
            f"with PEFT's path_initial_model_for_weight_conversion to a plain LoRA"
        )
    unknown = {
        option: value
        for option, value in config.items()
        if option not in _HARMLESS and value not in (None, False, {}, [], "none", "")
    }
    if unknown:
        named = ", ".join(f"{option}={value!r}" for option, value in sorted(unknown.items()))
        raise ModelError(
            f"the adapter {name!r} was trained with {named}, which cannot be applied as factors; train it without, or merge "
            f"it with PEFT and give the full model"
        )
    return config


def _modules(folder: Path, name: str) -> dict[str, dict[str, StoredTensor]]:
    """Find the stored factors by module path (without PEFT's prefix) and kind (A, B, magnitude)."""
    path = folder / ADAPTER_WEIGHTS_NAME
    if not path.is_file():
        raise ModelError(
            f"the adapter {name!r} has no {ADAPTER_WEIGHTS_NAME} in {folder}; fetch it again, or save it again with PEFT"
        )
    modules: dict[str, dict[str, StoredTensor]] = {}
    unknown = []
    found = read_header(path)
    refuse_empty_tensors(found, f"the adapter {name!r}")
    for stored_name, stored in found.items():
        suffix = next((each for each in _KINDS if stored_name.endswith(each)), None)
        if suffix is None or not stored_name.startswith(_PEFT_PREFIX):
            unknown.append(stored_name)
            continue
        module = stored_name.removeprefix(_PEFT_PREFIX).removesuffix(suffix)
        modules.setdefault(module, {})[_KINDS[suffix]] = stored
    if unknown:
        raise ModelError(
            f"the adapter {name!r} holds tensors that are neither LoRA nor DoRA factors of a linear layer: "
            f"{listed(sorted(unknown))}; train it without them, or merge it with PEFT and give the full model"
        )
    return modules
