"""Read the JSON files of a model's folder."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from readapt_ray.errors import ModelError
from readapt_ray.model_file_names import ADAPTER_CONFIG_NAME, BUNDLE_NAME, CONFIG_NAME


@dataclass(frozen=True)
class ModelFolder:
    """The folder of a model or adapter on this machine's disk. `name` is the name that the user gave."""

    name: str
    folder: Path

    @property
    def is_adapter(self) -> bool:
        """Return whether it is a PEFT adapter, which is applied to the model that it was trained on."""
        return (self.folder / ADAPTER_CONFIG_NAME).is_file()

    @property
    def is_factors(self) -> bool:
        """Return whether it holds factors (from `readapt merge --factors`), which are added to their base model."""
        return (self.folder / BUNDLE_NAME).is_file()

    def read_json(self, file_name: str) -> dict[str, Any]:
        """Read a JSON file of the folder; return an empty dict if the file does not exist.

        Raises:
            ModelError: the file is not a JSON object.
        """
        path = self.folder / file_name
        if not path.is_file():
            return {}
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ModelError(f"{path} is not a JSON object: {error}") from error

    @property
    def config(self) -> dict[str, Any]:
        """Return the content of config.json; empty if the folder has none, such as that of an adapter."""
        return self.read_json(CONFIG_NAME)

    @property
    def adapter_config(self) -> dict[str, Any]:
        """Return PEFT's config of an adapter; empty if the folder is not that of an adapter."""
        return self.read_json(ADAPTER_CONFIG_NAME)
