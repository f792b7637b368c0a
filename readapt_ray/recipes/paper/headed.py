"""Put the language-model head of one model on the body of another: training on text needs a head, retrievers have none.

In: a model folder without a head and the pretrained model that it came from. Out: a folder that
`AutoModelForCausalLM` loads whole. It costs a copy of the weights.
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
    """Write a model with the body of one model and the head of another.

    Args:
        headless: a local model folder.
        pretrained: local folder of the model whose head is taken, under the names that it has there.
        target: the folder to write, an artifact.

    Returns:
        The target; `headless` itself where the pretrained model stores no head, since it is tied to the embeddings.

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
            # Under its own name transformers would take a single file for the whole model, and not see the index.
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
