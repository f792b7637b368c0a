"""Convert pickled weights (`.bin`) and GGUF files to safetensors once, without executing code in a pickle.

In: a model or adapter folder that has `pytorch_model*.bin` or `adapter_model.bin` and no safetensors, or a GGUF file.
Out: a folder in the cache with the same tensors as safetensors, and copies of configuration and tokenizer files. Its
name is a hash of their content. torch's weights-only loader accepts nothing but tensors. It maps the file, so its
memory is the page cache. For GGUF see `gguf_files.py`.
"""

import collections
import json
import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from readapt_ray.artifacts import fingerprint
from readapt_ray.catalog import cache_entries, gguf_files
from readapt_ray.errors import ModelError, first_line
from readapt_ray.model_file_names import INDEX_NAME
from readapt_ray.storage import Location

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("readapt_ray")

RECORD_NAME = "converted_from"
"""JSON file that says where the weights are from, written last. It has no suffix, so that fingerprints ignore it."""
PICKLED = ("pytorch_model*.bin", "pytorch_model.bin.index.json", "adapter_model.bin")
"""Patterns of pickled weights. Other `.bin` files (optimizers, training arguments) are not weights."""

_INDEX = "pytorch_model.bin.index.json"
_SMALL = (".json", ".txt", ".model", ".jinja")


def has_safetensors(folder: Path) -> bool:
    """Return whether a folder holds safetensors (not in subfolders), which need no conversion."""
    return any(folder.glob("*.safetensors"))


def is_gguf(folder: Path) -> bool:
    """Return whether a path is a GGUF file, or a folder whose only weights are GGUF.

    Any file counts as GGUF, since no other file is accepted as a model (`models.own_folder`).
    """
    if folder.is_file():
        return True
    return not has_safetensors(folder) and not _pickled_files(folder) and any(folder.glob(f"*{gguf_files.SUFFIX}"))


def safe_folder(folder: Path, name: str) -> Path:
    """Return a folder with safetensors: the folder itself, or one in the cache with its converted weights.

    The folder itself is also returned if it has no weights at all. A folder in the cache is kept until this process
    ends.

    Args:
        folder: a local model or adapter folder, or a GGUF file.
        name: name that the user gave; used in errors.

    Raises:
        ModelError: a `.bin` file holds more than tensors, or a file is missing or cannot be read.
        InputError: the packages that read GGUF files are not installed.
    """
    files = _files_to_convert(folder, name)
    if not files:
        return folder
    is_alone = folder.is_file()
    folder = folder.parent if is_alone else folder
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise ModelError(
            f"{name!r} lacks {len(missing)} of {len(files)} weight files, first {missing[0]!r}; fetch it again"
        )
    small = {} if is_alone else Location(str(folder)).content_fingerprint(_SMALL)
    cache = cache_entries.folder_of("converted")
    seen = cache / f"{fingerprint([str(folder.resolve()), _states(folder, files), small])}.seen"
    if seen.is_file():
        target = cache / seen.read_text()
        with cache_entries.locked(target):
            if _is_whole(target):
                cache_entries.keep(target)
                return target
    target = _converted(folder, files, small, name, cache)
    seen.write_text(target.name)
    return target


def _is_whole(target: Path) -> bool:
    """Return whether a converted folder is complete: it has the file that is written last."""
    return (target / RECORD_NAME).is_file()


def _states(folder: Path, files: list[str]) -> dict[str, list[int]]:
    """Return inode, size and times of files, which change if a file is written again. So files are hashed only once."""
    states = {file: (folder / file).stat() for file in files}
    return {file: [each.st_ino, each.st_size, each.st_mtime_ns, each.st_ctime_ns] for file, each in states.items()}


def _converted(folder: Path, files: list[str], small: Mapping[str, str], name: str, cache: Path) -> Path:
    """Return the converted folder, whose name is a hash of the content; convert if it does not exist."""
    digests = {file: Location(str(folder / file)).sha256() for file in files}
    revision = folder.name if folder.parent.name == "snapshots" else ""  # the layout of the hub's cache
    target = cache / fingerprint([digests, small, revision])
    with cache_entries.locked(target):
        cache_entries.keep(target)
        if not _is_whole(target):
            _fill(target, folder, files, small, name)
            (target / RECORD_NAME).write_text(json.dumps({"revision": revision, "files": digests}, indent=2) + "\n")
    return target


def _fill(target: Path, folder: Path, files: list[str], small: Mapping[str, str], name: str) -> None:
    """Convert the weights and copy the small files; if that fails, remove the folder again."""
    of_gguf = files[0].endswith(gguf_files.SUFFIX)
    copied = [file for file in small if file != _INDEX and not (of_gguf and file in gguf_files.WRITTEN)]
    if of_gguf:
        size_bytes = (folder / files[0]).stat().st_size
        sizes_bytes = dict.fromkeys(gguf_files.WRITTEN, 0) | {gguf_files.WRITTEN[0]: size_bytes}
    else:
        sizes_bytes = {_converted_name(file): (folder / file).stat().st_size for file in files}
    sizes_bytes |= {file: (folder / file).stat().st_size for file in copied}
    # RECORD_NAME comes first, so that it is removed first: a killed removal leaves no folder that looks complete.
    due = {RECORD_NAME: 0, INDEX_NAME: 0, **sizes_bytes}
    cache_entries.note_files(target, {file: {"size_bytes": size_bytes} for file, size_bytes in due.items()})
    cache_entries.make_room()
    target.mkdir(exist_ok=True)
    try:
        if of_gguf:
            gguf_files.convert(folder / files[0], target, name)
            due |= {file: (target / file).stat().st_size for file in gguf_files.WRITTEN if (target / file).is_file()}
            cache_entries.note_files(target, {file: {"size_bytes": size_bytes} for file, size_bytes in due.items()})
        else:
            _convert(folder, files, target, name)
        for file in copied:
            Location(str(folder / file)).copy_to(Location(str(target / file)))
    except BaseException:
        cache_entries.remove_files(target)
        raise


def _files_to_convert(folder: Path, name: str) -> list[str]:
    """Return the names of weight files to convert; empty if there are safetensors."""
    if folder.is_file():
        return [folder.name]
    return [] if has_safetensors(folder) else _pickled_files(folder) or gguf_files.in_folder(folder, name)


def _pickled_files(folder: Path) -> list[str]:
    if (folder / _INDEX).is_file():
        return sorted(set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    return [name for name in ("pytorch_model.bin", "adapter_model.bin") if (folder / name).is_file()]


def _convert(folder: Path, files: list[str], target: Path, name: str) -> None:
    from safetensors.torch import save_file

    logger.warning(
        "%s has pickled weights only: they are converted once to safetensors in %s, by torch's weights-only loader",
        name,
        target,
    )
    weight_map: dict[str, str] = {}
    for file in files:
        tensors = _load(folder / file, name)
        written = _converted_name(file)
        save_file(dict(tensors), target / written, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, written)
    if len(files) > 1:
        (target / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _converted_name(file: str) -> str:
    return file.removesuffix(".bin").replace("pytorch_model", "model") + ".safetensors"


def _load(path: Path, name: str) -> Mapping[str, "torch.Tensor"]:
    import torch

    try:
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files of torch before 1.6 cannot be mapped
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ModelError(
            f"{path.name} of {name!r} is not plain tensors ({first_line(error)}); loading it could run code, so it is refused: give a "
            f"revision that has safetensors"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(each, torch.Tensor) for each in tensors.values()):
        raise ModelError(f"{path.name} of {name!r} is not a table of tensors by name; give the weights of a model")
    # safetensors cannot write tensors that share memory, such as tied weights.
    users = collections.Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values())
    return {
        each: tensor.contiguous() if users[tensor.untyped_storage().data_ptr()] == 1 else tensor.clone()
        for each, tensor in sorted(tensors.items())
    }
