"""Check, before a run, that this machine can get a model, without fetching its weights."""

import json
from pathlib import Path

from readapt_ray.artifact_files import LEASE_NAME, MANIFEST_NAME
from readapt_ray.catalog import fetching, models, retrievers
from readapt_ray.errors import ModelError
from readapt_ray.model_file_names import ADAPTER_CONFIG_NAME, CONFIG_NAME
from readapt_ray.storage import Location


def check_reachable(name: str) -> int:
    """Check that `open_model` would find a model on this machine, without fetching weights.

    For an adapter, the base model is checked too. A local model is opened, so its pickled weights or GGUF file are
    converted.

    Args:
        name: a name as in `open_model`.

    Returns:
        How many bytes would be fetched; 0 for a local model. Files that the hub's cache has are not counted.

    Raises:
        ModelError: there is no such model, it is gated, unfinished, or the folder is not a model.
        ReadaptError: the hub could not be reached, or kept failing.
    """
    plain, revision = (name, None) if Path(name).exists() else retrievers.split_commit(name)
    target = retrievers.hub_id(plain)
    if "://" in target:
        files, num_bytes = fetching.check_at_uri(target)
        if CONFIG_NAME not in files and ADAPTER_CONFIG_NAME not in files:
            raise ModelError(f"{name!r} is not a model: it has neither {CONFIG_NAME} nor {ADAPTER_CONFIG_NAME}")
        if LEASE_NAME in files and MANIFEST_NAME not in files:
            raise ModelError(f"{name!r} is unfinished; run the stage that makes it again, or wait for its end")
        return num_bytes + (_base_bytes(Location(target)) if ADAPTER_CONFIG_NAME in files else 0)
    if models.own_folder(plain) is not None or not models.is_hub_id(target):
        model = models.open_model(name)  # or its error, which lists what a name may be
        return check_reachable(model.base_reference) if model.is_adapter else 0
    folder, num_bytes = fetching.check_on_hub(plain, target, revision)
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        return num_bytes + _base_bytes(Location(str(folder)))
    if not (folder / CONFIG_NAME).is_file():
        raise ModelError(f"{name!r} is not a model: the hub has neither {CONFIG_NAME} nor {ADAPTER_CONFIG_NAME} of it")
    return num_bytes


def _base_bytes(adapter: Location) -> int:
    """Return the bytes to fetch of the base model of an adapter."""
    return check_reachable(str(json.loads((adapter / ADAPTER_CONFIG_NAME).read_text())["base_model_name_or_path"]))
