"""The quickstart's job for a cluster: its pair of models, adapted to the documentation of one small package."""

from pathlib import Path

import yaml

from readapt_ray.recipes import quickstart

SOURCE = "python-docs:safetensors,peft"


def write(folder: Path) -> Path:
    """Write its run file, of the quickstart's own options, and return it."""
    recipe = quickstart.recipe("unused")
    train = {name: value for name, value in recipe.train.items() if name != "only"}
    values = {
        "source": SOURCE,
        "pretrained": recipe.pretrained,
        "retriever": recipe.retriever,
        "train": {**train, "checkpoint_every_s": 0},
        "merge": recipe.merge,
    }
    (folder / "quickstart.yaml").write_text(yaml.safe_dump(values))
    return folder / "quickstart.yaml"
