"""Pickled weights (`.bin`) turned into safetensors, once, without running what a pickle may hold.

In: a model or adapter folder that has `pytorch_model*.bin` or `adapter_model.bin` and no safetensors.
Out: a folder in the cache with the same tensors as safetensors and the small files beside them,
under a name that stands for the content of the `.bin` files. Memory: one tensor, besides the file
that torch maps. torch's weights-only loader takes tensors and nothing else.
"""

import json
import logging
import os
import pickle
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from readapt_ray.artifacts import fingerprint
from readapt_ray.errors import ModelError
from readapt_ray.storage import Location
from readapt_ray.weights.checkpoint import INDEX_NAME, SINGLE_NAME, file_header

logger = logging.getLogger("readapt_ray")

RECORD_NAME = "converted_from.json"

_SINGLE, _INDEX, _ADAPTER = "pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin"
_SMALL = (".json", ".txt", ".model", ".jinja")


def safe_folder(folder: Path, name: str) -> Path:
    """The folder itself where it has safetensors; else one in the cache that was converted from its `.bin` files.

    Args:
        folder: a local model or adapter folder.
        name: what the user calls it; used in errors.

    Raises:
        ModelError: a `.bin` file holds more than tensors, or cannot be read.
    """
    files = _pickled_files(folder)
    if not files:
        return folder
    digests = {file: Location(str(folder / file)).sha256() for file in files}
    cache = Path(os.environ.get("READAPT_CACHE", "~/.cache/readapt")).expanduser() / "converted"
    target = cache / fingerprint(digests)
    if target.is_dir():
        return target
    logger.warning(
        "%s has pickled weights only: they are converted once to safetensors in %s, by torch's weights-only loader",
        name,
        target,
    )
    cache.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=cache))
    try:
        _convert(folder, files, partial, name)
        (partial / RECORD_NAME).write_text(json.dumps({"folder": str(folder), "files": digests}, indent=2) + "\n")
        try:
            partial.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was faster, with the same content
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _pickled_files(folder: Path) -> list[str]:
    """The `.bin` files that hold the weights; none where safetensors do."""
    if (folder / _ADAPTER).is_file() and not (folder / "adapter_model.safetensors").is_file():
        return [_ADAPTER]
    if (folder / SINGLE_NAME).is_file() or (folder / INDEX_NAME).is_file():
        return []
    if (folder / _INDEX).is_file():
        return sorted(set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    return [_SINGLE] if (folder / _SINGLE).is_file() else []


def _convert(folder: Path, files: list[str], target: Path, name: str) -> None:
    renamed = {_ADAPTER: "adapter_model.safetensors", _SINGLE: SINGLE_NAME}
    weight_map: dict[str, str] = {}
    for file in files:
        tensors = _load(folder / file, name)
        written = renamed.get(file) or file.removesuffix(".bin").replace("pytorch_model", "model") + ".safetensors"
        weight_map |= dict.fromkeys(tensors, written)
        with (target / written).open("wb") as stream:
            stream.write(file_header((each, tensor.dtype, tensor.shape) for each, tensor in tensors.items()))
            for tensor in tensors.values():
                stream.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    if len(files) > 1:
        (target / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for path in folder.iterdir():
        if path.is_file() and path.name.endswith(_SMALL) and not path.name.endswith(".index.json"):
            shutil.copyfile(path, target / path.name)


def _load(path: Path, name: str) -> Mapping[str, torch.Tensor]:
    if not path.is_file():
        raise ModelError(f"{name!r} lacks the weight file {path.name!r}; fetch it again")
    try:
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files of torch before 1.6 cannot be mapped
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{path.name} of {name!r} is not plain tensors ({first}); loading it could run code, so it is refused: give a "
            f"revision that has safetensors"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(each, torch.Tensor) for each in tensors.values()):
        raise ModelError(f"{path.name} of {name!r} is not a table of tensors by name; give the weights of a model")
    return dict(sorted(tensors.items()))
