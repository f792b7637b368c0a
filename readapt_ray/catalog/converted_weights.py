"""Convert pickled weights (`.bin`) and GGUF files to safetensors, once, without running what a pickle may hold.

In: a model or adapter folder that has `pytorch_model*.bin` or `adapter_model.bin` and no safetensors, or a GGUF file.
Out: a folder in the cache with the same tensors as safetensors and the small files beside them,
under a name made from the content of the `.bin` files. torch's weights-only loader takes
tensors and nothing else; it maps the file, so its memory is the page cache. GGUF: `gguf_files.py`.
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
"""JSON on where the weights come from; without a suffix, since it is no part of the content."""
PICKLED = ("pytorch_model*.bin", "pytorch_model.bin.index.json", "adapter_model.bin")
"""Names of pickled weights; other `.bin` files (optimizers, training arguments) are none."""

_INDEX = "pytorch_model.bin.index.json"
_SMALL = (".json", ".txt", ".model", ".jinja")


def has_safetensors(folder: Path) -> bool:
    """Return whether a folder holds weights that need no conversion."""
    return any(folder.glob("*.safetensors"))


def is_gguf(folder: Path) -> bool:
    """Return whether a model is a GGUF file: of that name, or the only weights of a folder."""
    if folder.is_file():
        return True
    return not has_safetensors(folder) and not _pickled_files(folder) and any(folder.glob(f"*{gguf_files.SUFFIX}"))


def safe_folder(folder: Path, name: str) -> Path:
    """Return the folder itself where it has safetensors; else one in the cache that was converted from its `.bin` files or
    its GGUF file.

    Args:
        folder: a local model or adapter folder, or a GGUF file.
        name: what the user calls it; used in errors.

    Raises:
        ModelError: a `.bin` file holds more than tensors, or a file cannot be read.
        InputError: what reads GGUF files is not installed.
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
    """Return whether a converted folder has the file that is written last."""
    return (target / RECORD_NAME).is_file()


def _states(folder: Path, files: list[str]) -> dict[str, list[int]]:
    """Return what tells a file that was written again, so that gigabytes are not hashed at each start of a process."""
    states = {file: (folder / file).stat() for file in files}
    return {file: [each.st_ino, each.st_size, each.st_mtime_ns, each.st_ctime_ns] for file, each in states.items()}


def _converted(folder: Path, files: list[str], small: Mapping[str, str], name: str, cache: Path) -> Path:
    """Return the converted folder, named after its content; convert unless it is there."""
    digests = {file: Location(str(folder / file)).sha256() for file in files}
    revision = folder.name if folder.parent.name == "snapshots" else ""  # as the hub's cache lays folders out
    target = cache / fingerprint([digests, small, revision])
    with cache_entries.locked(target):
        cache_entries.keep(target)
        if not _is_whole(target):
            _fill(target, folder, files, small, name)
            (target / RECORD_NAME).write_text(json.dumps({"revision": revision, "files": digests}, indent=2) + "\n")
    return target


def _fill(target: Path, folder: Path, files: list[str], small: Mapping[str, str], name: str) -> None:
    """Convert the weights and copy the small files; nothing is left of a conversion that fails."""
    of_gguf = files[0].endswith(gguf_files.SUFFIX)
    copied = [file for file in small if file != _INDEX and not (of_gguf and file in gguf_files.WRITTEN)]
    if of_gguf:
        size_bytes = (folder / files[0]).stat().st_size
        sizes_bytes = dict.fromkeys(gguf_files.WRITTEN, 0) | {gguf_files.WRITTEN[0]: size_bytes}
    else:
        sizes_bytes = {_converted_name(file): (folder / file).stat().st_size for file in files}
    sizes_bytes |= {file: (folder / file).stat().st_size for file in copied}
    # RECORD_NAME first: a removal that was killed does not leave what looks whole.
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
    """Return the names of weight files that are to be converted; none where there are safetensors."""
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
    # safetensors does not write what shares memory, as tied weights do.
    users = collections.Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values())
    return {
        each: tensor.contiguous() if users[tensor.untyped_storage().data_ptr()] == 1 else tensor.clone()
        for each, tensor in sorted(tensors.items())
    }
