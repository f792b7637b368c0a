"""Add the language-model head of a pretrained model to a retriever. Training on text needs a head; retrievers have none.

In: a model folder without a head, and the pretrained model that it was made from. Out: a folder that
`AutoModelForCausalLM` loads completely. It costs a copy of the weights.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save

from readapt_ray.artifacts import produce
from readapt_ray.catalog.models import open_model
from readapt_ray.config import StageConfig
from readapt_ray.model_file_names import INDEX_NAME
from readapt_ray.storage import Location
from readapt_ray.weights.weight_files import Checkpoint, read_header

_HEAD_FILE = "head.safetensors"


def add_head(headless: Location, pretrained: Path, target: Location) -> Location:
    """Write a model that has the body of one model and the head of another.

    Args:
        headless: local folder of the model without a head.
        pretrained: local folder of the model with the head. The head's tensors keep their names.
        target: the folder to write, an artifact.

    Returns:
        The target. If the pretrained model stores no head (it is tied to the embeddings), `headless` itself.

    Raises:
        ModelError: one of the folders holds no model.
        ArtifactConflictError: the target holds something else.
    """
    heads = Checkpoint(pretrained).heads
    if not heads:
        return headless
    models = {"headless": headless.uri, "pretrained": str(pretrained)}
    produce(
        "headed",
        StageConfig(output=target.uri),
        inputs={role: open_model(folder).fingerprint for role, folder in models.items()},
        work=lambda workspace: _write(headless, pretrained, heads, workspace.location),
    )
    return target


def _write(headless: Location, pretrained: Path, heads: tuple[str, ...], target: Location) -> None:
    weight_map = dict.fromkeys(heads, _HEAD_FILE)
    for name, _ in headless.listing():
        if name.endswith(".safetensors"):
            # Rename it: transformers would take a file `model.safetensors` for the whole model and ignore the index.
            (headless / name).copy_to(target / f"body-{name}")
            weight_map |= dict.fromkeys(read_header((headless / name).local_path), f"body-{name}")
        elif name not in (INDEX_NAME, "manifest.json") and (headless / name).is_file():
            (headless / name).copy_to(target / name)
    (target / _HEAD_FILE).write_bytes(save(_read(pretrained, heads)))
    index = {"metadata": {}, "weight_map": weight_map}
    (target / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def _read(folder: Path, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    stored = {name: each for file in sorted(folder.glob("*.safetensors")) for name, each in read_header(file).items()}
    return {name: stored[name].read() for name in names}
