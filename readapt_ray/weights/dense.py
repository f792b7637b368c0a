"""Load the Dense layers that some retrievers apply after pooling (`catalog/dense_layers.py`), or copy them to a folder.

Only the retriever has them. The pretrained model has none, so a merge copies them unchanged. They compute in float32,
for any type of the model; EmbeddingGemma's two take 19 MB.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from readapt_ray.catalog.dense_layers import DenseLayer, dense_layers
from readapt_ray.catalog.models import OpenModel
from readapt_ray.errors import ModelError
from readapt_ray.model_file_names import CONFIG_NAME, SINGLE_NAME
from readapt_ray.storage import Location
from readapt_ray.weights.weight_files import read_header

FIRST_NUMBER = 2
"""Number of the first Dense layer among sentence-transformers modules: 0 is Transformer, 1 is Pooling."""


class DenseHead(nn.Sequential):
    """The Dense layers of a retriever, in order. `width` is the length of the output vectors."""

    def __init__(self, parts: Sequence[nn.Module], width: int) -> None:
        super().__init__(*parts)
        self.width = width


def load_dense(model: OpenModel, *, device: str) -> DenseHead | None:
    """Load the Dense layers that a model applies to pooled vectors, frozen, in float32; None if it has none.

    Raises:
        ModelError: a layer cannot be read, or its weights have other shapes than its config says.
    """
    layers = dense_layers(model)
    if not layers:
        return None
    head = DenseHead([part for layer in layers for part in _load(model, layer)], layers[-1].out_features)
    return head.eval().requires_grad_(False).to(device)


def _load(model: OpenModel, layer: DenseLayer) -> tuple[nn.Module, nn.Module]:
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.has_bias)
    file = model.folder / layer.path / SINGLE_NAME
    stored = read_header(file)
    due = {f"linear.{name}": list(each.shape) for name, each in linear.state_dict().items()}
    found = {name: list(each.shape) for name, each in stored.items()}
    if found != due:
        raise ModelError(f"{file} holds the tensors {found} where {due} are expected; fetch {model.name!r} again")
    linear.load_state_dict({name.removeprefix("linear."): each.read().float() for name, each in stored.items()})
    activation: Any = getattr(nn, layer.activation)()
    return linear, activation


def copy_dense(model: OpenModel, target: Location) -> list[str]:
    """Copy the Dense layers of a model into the folders 2_Dense, 3_Dense ... of another folder.

    Args:
        model: the model with the layers; nothing is copied if it has none.
        target: the other folder. Files of the same name in it are replaced.

    Returns:
        "Dense" once per layer, to be put after Transformer and Pooling in the argument of `modules_of`.
    """
    layers = dense_layers(model)
    for number, layer in enumerate(layers, start=FIRST_NUMBER):
        for file in (CONFIG_NAME, SINGLE_NAME):
            Location(str(model.folder / layer.path / file)).copy_to(target / f"{number}_Dense" / file)
    return ["Dense"] * len(layers)


def modules_of(kinds: Sequence[str]) -> list[dict[str, Any]]:
    """Return the content of modules.json for modules of these kinds, such as Transformer, Pooling and Normalize.

    The first has no subfolder; the others have one with number and kind, such as 1_Pooling.
    """
    return [
        {
            "idx": number,
            "name": str(number),
            "path": f"{number}_{kind}" if number else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for number, kind in enumerate(kinds)
    ]
