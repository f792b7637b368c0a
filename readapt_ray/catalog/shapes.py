"""Compute the shape of a model from its config: parameters, widths and layers, which decide memory and FLOPs.

No weight is read. Training and planning both use a `ModelShape`, so a plan never contradicts the check before training.
The configs of the catalog's pretrained models are in data/model_configs.json (copies of their published config.json),
so that a plan needs no network and no licence.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from readapt_ray.catalog import models, retrievers
from readapt_ray.catalog.retrievers import Objective
from readapt_ray.errors import ModelError
from readapt_ray.model_file_names import ADAPTER_CONFIG_NAME, CONFIG_NAME
from readapt_ray.quick_imports import import_for_models
from readapt_ray.storage import Location

BaseDtype = Literal["auto", "int8", "fp8", "nf4"]
"""Data type of the frozen weights in training; auto is the dtype of the matrix products."""

_CONFIGS_FILE: Final = Path(__file__).parent.parent / "data" / "model_configs.json"
_CLASSES: Final = {None: "AutoModel", "causal_lm": "AutoModelForCausalLM", "masked_lm": "AutoModelForMaskedLM"}


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a model that decide its memory and FLOPs."""

    name: str
    model_type: str
    hidden: int
    """Width of a hidden state."""
    intermediate: int
    """Inner width of the feed-forward part of a layer."""
    num_layers: int
    attention_width: int
    """Number of attention heads times the width of a head."""
    is_causal: bool
    num_parameters: int
    """All parameters. The language-model head counts only if the shape was computed with an objective."""
    num_matrix_parameters: int
    """Parameters that every token is multiplied with: all matrices but the embeddings. A tied head counts."""
    first_position: int
    """Position id of the first token of a text; positions below it are not usable."""
    linears: tuple[tuple[str, int, int], ...]
    """Full name, inputs and outputs of every linear layer."""

    @property
    def num_linear_parameters(self) -> int:
        """Return the number of weights in all linear layers, without biases."""
        return sum(inputs * outputs for _, inputs, outputs in self.linears)

    def forward_flops(self, tokens: float) -> float:
        """Return the FLOPs per token of one forward pass over passages of `tokens` tokens.

        That is two per matrix parameter, and the two products of attention over the tokens that a token attends to.
        """
        return 2 * self.num_matrix_parameters + 4 * self.num_layers * self.attention_width * self.attended(tokens)

    def attended(self, tokens: float) -> float:
        """Return how many tokens of a passage a token attends to on average: half if causal, else all."""
        return tokens / 2 if self.is_causal else tokens

    def adapted(self, targets: tuple[str, ...]) -> list[tuple[int, int]]:
        """Return inputs and outputs of the linear layers that an adapter with these target modules wraps.

        Args:
            targets: last parts of layer names, as in `matching_layers`.

        Raises:
            ModelError: a target matches no linear layer.
        """
        names = set(matching_layers([name for name, _, _ in self.linears], targets))
        return [(inputs, outputs) for name, inputs, outputs in self.linears if name in names]


def is_in_layer(name: str) -> bool:
    """Return whether a linear layer, by name, belongs to a numbered layer of a model, and not to its head.

    True for "model.layers.0.mlp.up_proj", False for "lm_head".
    """
    return any(part.isdigit() for part in name.split("."))


def matching_layers(names: Iterable[str], targets: tuple[str, ...]) -> list[str]:
    """Return the layer names whose last dotted parts are one of the target modules, sorted.

    "q_proj" matches "layers.0.q_proj" but not "layers.0.my_q_proj".

    Raises:
        ModelError: a target matches no name; the message lists the last parts of all names.
    """
    dotted = {f".{name}": name for name in names}
    missing = [target for target in targets if not any(name.endswith(f".{target}") for name in dotted)]
    if missing:
        there = sorted({name.rsplit(".", 1)[-1] for name in dotted})
        raise ModelError(f"target modules {missing} match no linear layer; the model has {there}")
    return sorted(name for key, name in dotted.items() if key.endswith(tuple(f".{target}" for target in targets)))


def model_shape(name: str, objective: Objective | None = None) -> ModelShape:
    """Return the shape of a model by name; for a retriever of the catalog, of its pretrained model.

    Only the config is fetched; a GGUF file is converted.

    Args:
        name: a catalog name, a folder, a GGUF file, a URI or a hub id.
        objective: also count the language-model head of this objective; None counts no head.

    Raises:
        ModelError: there is no model of that name, or transformers does not know its `model_type`.
    """
    return shape_of(_config(name), name, objective)


def pretrained_shape(name: str, objective: Objective | None = None) -> ModelShape:
    """Return the shape of a model with its language-model head: of `objective`, or by default the one its config names.

    If the config names none either, no head is counted.

    Args:
        name: as in `model_shape`.
        objective: objective of the head; None takes it from the config.

    Raises:
        ModelError: as in `model_shape`.
    """
    config = _config(name)
    return shape_of(config, name, objective or objective_of(config))


def longest_text(name: str) -> int | None:
    """Return the longest text, in tokens, that a model has positions for; None for no limit.

    Args:
        name: as in `model_shape`; for a retriever of the catalog, its pretrained model counts.

    Raises:
        ModelError: as in `model_shape`.
    """
    return usable_positions(_config(name), name)


def objective_of(config: dict[str, Any]) -> Objective | None:
    """Return the objective of the language-model head that a config.json names; None if it names none.

    `BertForMaskedLM` gives masked_lm, `LlamaForCausalLM` causal_lm, `BertModel` None.

    Args:
        config: the content of config.json.
    """
    for name in config.get("architectures") or []:
        if name.endswith(("ForMaskedLM", "ForPreTraining")):
            return "masked_lm"
        if name.endswith(("ForCausalLM", "LMHeadModel")):
            return "causal_lm"
    return None


def usable_positions(config: dict[str, Any], name: str) -> int | None:
    """Return the longest text, in tokens, that a model has positions for, by its config.json; None for no limit.

    Args:
        config: the content of config.json.
        name: name of the model in errors.

    Raises:
        ModelError: transformers does not know its `model_type`.
    """
    positions = config.get("max_position_embeddings")
    return None if positions is None else int(positions) - shape_of(config, name).first_position


def refuse_quantized(config: Mapping[str, Any], name: str) -> None:
    """Refuse to train a model whose config.json has a quantization_config; else do nothing.

    Args:
        config: the content of config.json.
        name: name of the model in the error.

    Raises:
        ModelError: it has one.
    """
    if found := config.get("quantization_config"):
        method = found.get("quant_method", "unknown") if isinstance(found, Mapping) else found
        raise ModelError(
            f"{name!r} is quantized (quantization_config in its config.json: {method}), and cannot be trained; give its "
            f"weights in float32, float16 or bfloat16, with --base-dtype int8 or nf4 if memory is short"
        )


def shape_of(values: dict[str, Any], name: str, objective: Objective | None = None) -> ModelShape:
    """Return the shape of the model that a config.json describes.

    Args:
        values: the content of config.json.
        name: name of the model in errors.
        objective: also count the language-model head of this objective; None counts no head.

    Raises:
        ModelError: transformers does not know its `model_type`, or cannot build it.
    """
    import torch
    from transformers import AutoConfig

    if not values.get("model_type"):
        raise ModelError(f"{name!r} has no model_type in its config.json, so its memory and time cannot be estimated")
    try:
        config: Any = AutoConfig.for_model(**values)
        with torch.device("meta"):
            model = auto_class(objective).from_config(config)
        return measure_shape(model, name)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"transformers cannot make {name!r} from its config.json: {error}") from error


def measure_shape(model: Any, name: str) -> ModelShape:
    """Return the shape of a transformers model without adapters, which may be on the meta device.

    A language-model head counts if the model has one.

    Args:
        model: the model.
        name: name to store in the shape.
    """
    from torch import nn

    config = model.config
    heads = int(config.num_attention_heads)
    layers = dict(model.named_modules())
    linears = {path: layer for path, layer in layers.items() if isinstance(layer, nn.Linear)}
    multiplied = [layer for layer in layers.values() if not isinstance(layer, nn.Embedding)]
    return ModelShape(
        name=name,
        model_type=str(config.model_type),
        hidden=int(config.hidden_size),
        intermediate=int(getattr(config, "intermediate_size", None) or 4 * config.hidden_size),
        num_layers=int(config.num_hidden_layers),
        attention_width=heads * int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        is_causal=any(getattr(layer, "is_causal", False) for layer in layers.values()),
        num_parameters=sum(each.numel() for each in model.parameters()),
        num_matrix_parameters=sum(
            each.numel() for layer in multiplied for each in layer.parameters(recurse=False) if each.ndim >= 2
        ),
        first_position=first_position(model),
        linears=tuple((path, int(each.in_features), int(each.out_features)) for path, each in linears.items()),
    )


def first_position(network: Any) -> int:
    """Return the position id of the first token of a text: 0, or padding_idx + 1 for models like RoBERTa.

    Args:
        network: a transformers model, headless or with its head.
    """
    positions = getattr(
        getattr(getattr(network, "base_model", network), "embeddings", None), "position_embeddings", None
    )
    padding = getattr(positions, "padding_idx", None)
    return 0 if padding is None else int(padding) + 1


def auto_class(objective: Objective | None) -> Any:
    """Return transformers' auto class of an objective, with its language-model head; None gives the headless class."""
    import_for_models()
    import transformers

    return getattr(transformers, _CLASSES[objective])


def _config(name: str) -> dict[str, Any]:
    row = models.find_row(name)
    target = row.pretrained if row else name
    if models.own_folder(target) is None:
        target = retrievers.hub_id(target)
        known: dict[str, dict[str, Any]] = json.loads(_CONFIGS_FILE.read_text())
        if target in known:
            return known[target]
    if "://" in target:
        return _remote_config(name, Location(target))
    if target.startswith("builtin:") or models.own_folder(target) is not None:
        model = models.open_model(target, with_weights=False)
        return _config(model.base_reference) if model.is_adapter else model.config
    return _hub_config(name, target)


def _remote_config(name: str, folder: Location) -> dict[str, Any]:
    for file in (CONFIG_NAME, ADAPTER_CONFIG_NAME):
        if (folder / file).is_file():
            values: dict[str, Any] = json.loads((folder / file).read_text())
            return values if file == CONFIG_NAME else _config(str(values["base_model_name_or_path"]))
    raise ModelError(f"{name!r} is not a model: {folder} has neither {CONFIG_NAME} nor {ADAPTER_CONFIG_NAME}")


def _hub_config(name: str, hub_id: str) -> dict[str, Any]:
    """Fetch config.json from the hub, without the weights."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return dict(json.loads(Path(hf_hub_download(hub_id, CONFIG_NAME)).read_text(encoding="utf-8")))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        known = ", ".join(row.name for row in retrievers.RETRIEVERS)
        raise ModelError(
            f"the memory and time of {name!r} cannot be estimated: its config.json is neither in a folder of that name nor on the hub "
            f"({type(error).__name__}); give a local folder with config.json, or a model of the catalog ({known})"
        ) from error
