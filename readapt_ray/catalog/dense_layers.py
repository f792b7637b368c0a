"""Read which linear layers follow the pooling of a sentence-transformers model (its Dense modules).

In: a folder with `modules.json`. Out: size, activation and subfolder of each layer; no weight is read. LaBSE has one
such layer, EmbeddingGemma two.
"""

import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from readapt_ray.catalog.model_folder import ModelFolder
from readapt_ray.errors import ModelError
from readapt_ray.model_file_names import MODULES_NAME, SINGLE_NAME

_ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "SiLU", "Sigmoid")
_SUBFOLDER = re.compile(r"\d+_\w+")
_VECTOR = "sentence_embedding"


@dataclass(frozen=True, kw_only=True)
class DenseLayer:
    """One linear layer after the pooling: a matrix, an optional bias, and an activation."""

    path: str
    """Its subfolder, such as `2_Dense`."""
    in_features: int
    out_features: int
    has_bias: bool
    activation: str
    """Name of a class of torch.nn, such as Tanh."""


def read_modules(model: ModelFolder) -> list[tuple[str, str]]:
    """Return kind and subfolder of each module in modules.json, in order; empty if the folder has no such file.

    The kind is the name of the class, such as Transformer or Dense.

    Raises:
        ModelError: the file is not a list of modules.
    """
    path = model.folder / MODULES_NAME
    if not path.is_file():
        return []
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        return [(str(module["type"]).rsplit(".", 1)[-1], str(module["path"])) for module in listed]
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{path} is not a list of modules with type and path: {error!r}") from error


def dense_layers(model: ModelFolder) -> tuple[DenseLayer, ...]:
    """Return the linear layers that are applied to a pooled vector, in order; empty if there are none.

    Raises:
        ModelError: a file of a layer is missing, or a layer has a feature that is not supported.
    """
    layers = tuple(_layer(model, path) for kind, path in read_modules(model) if kind == "Dense")
    for one, other in itertools.pairwise(layers):
        if one.out_features != other.in_features:
            raise ModelError(
                f"{model.name!r}: {one.path} gives {one.out_features} numbers, and {other.path} takes {other.in_features}; "
                f"fetch the model again"
            )
    return layers


def _layer(model: ModelFolder, path: str) -> DenseLayer:
    if not _SUBFOLDER.fullmatch(path):
        raise ModelError(f"{model.name!r}: {MODULES_NAME} names {path!r}, which is not a subfolder such as '2_Dense'")
    for file in ("config.json", SINGLE_NAME):
        if not (model.folder / path / file).is_file():
            raise ModelError(
                f"{path}/{file} is missing in {model.folder}, though {MODULES_NAME} names {path!r}: fetch the whole folder of "
                f"{model.name!r} again; where its weights are pickled (.bin), load it once with sentence-transformers and save it"
            )
    config = model.read_json(f"{path}/config.json")
    check_reads_vector(model, path, config)
    activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    module, _, name = activation.rpartition(".")
    if not module.startswith("torch.nn") or name not in _ACTIVATIONS or config.get("use_residual"):
        also = " with use_residual" * bool(config.get("use_residual"))
        raise ModelError(
            f"{path} of {model.name!r} has the activation {activation!r}{also}; understood are {', '.join(_ACTIVATIONS)} of "
            f"torch.nn, without use_residual"
        )
    return DenseLayer(
        path=path,
        in_features=int(config["in_features"]),
        out_features=int(config["out_features"]),
        has_bias=bool(config.get("bias", True)),
        activation=name,
    )


def check_reads_vector(model: ModelFolder, path: str, config: Mapping[str, Any]) -> None:
    """Refuse a module that reads or writes something other than the vector of the text.

    Args:
        model: the model of the module.
        path: subfolder of the module.
        config: config.json of the module; empty if it has none.

    Raises:
        ModelError: the module reads or writes another value.
    """
    read = config.get("module_input_name") or _VECTOR
    written = config.get("module_output_name") or read
    if (read, written) != (_VECTOR, _VECTOR):
        raise ModelError(
            f"{path} of {model.name!r} reads {read!r} and writes {written!r}; supported is {_VECTOR!r} for both "
            f"(module_input_name and module_output_name in {path}/config.json)"
        )
