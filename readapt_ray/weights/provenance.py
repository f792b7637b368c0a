"""Record what a merged model was made from, so that it can be checked and made again.

In: models on this machine's disk. Out: for each its name, revision, fingerprint and the SHA-256 of
every file that decides its content. All cores hash while the main thread checks the models; a core
needs about a second per gigabyte.
"""

import contextlib
import hashlib
import shlex
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from readapt_ray.artifacts import fingerprint, read_manifest
from readapt_ray.catalog.converted_weights import RECORD_NAME
from readapt_ray.catalog.models import OpenModel
from readapt_ray.hardware import num_cores

_WEIGHTS = (".safetensors", ".bin")
# Large chunks, so that a hashing thread rarely waits for Python's interpreter lock.
_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True)
class MergeInput:
    """A record of one model that a merge reads: its role, name, fingerprint and file hashes."""

    role: str
    name: str
    fingerprint: str
    """Equal to `OpenModel.fingerprint`; but for a bundle, the fingerprint of the bundle itself."""
    revision: str
    """The commit on the Hugging Face hub; empty if the model is not from the hub."""
    files: Mapping[str, str]
    """SHA-256 of each file that decides the model's content, by file name; also of files it was converted from."""

    @property
    def weight_files(self) -> dict[str, str]:
        """The recorded SHA-256 of each weight file, by file name. It filters `files`, and reads nothing."""
        return {name: digest for name, digest in self.files.items() if name.endswith(_WEIGHTS)}

    def to_json(self) -> dict[str, Any]:
        """Return the record as a manifest or bundle stores it: all fields but `role`, which is the key there."""
        return {
            "name": self.name,
            "revision": self.revision,
            "fingerprint": self.fingerprint,
            "files": dict(self.files),
        }


@contextlib.contextmanager
def hashed_in_background(models: Sequence[tuple[str, OpenModel]]) -> Iterator[Callable[[], list[MergeInput]]]:
    """Hash the files of models in threads while the `with` block runs; the end of the block stops the hashing.

    Args:
        models: role and model of each input.

    Yields:
        A function that waits for the hashes and returns one `MergeInput` per model, in their order. Call it only inside
        the block: after it, hashes may be of half-read files. It raises the error of a file that cannot be read.
    """
    stopped = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        try:
            yield pool.submit(_describe, models, stopped).result
        finally:
            stopped.set()


def _describe(models: Sequence[tuple[str, OpenModel]], stopped: threading.Event) -> list[MergeInput]:
    jobs = [(number, file) for number, (_, model) in enumerate(models) for file in model.content_files()]
    paths = [models[number][1].folder / file for number, file in jobs]
    with ThreadPoolExecutor(num_cores()) as pool:
        hashes = list(pool.map(lambda path: _sha256(path, stopped), paths))
    files: list[dict[str, str]] = [{} for _ in models]
    for (number, file), digest in zip(jobs, hashes, strict=True):
        files[number][file] = digest
    return [_merge_input(role, model, found) for (role, model), found in zip(models, files, strict=True)]


def _merge_input(role: str, model: OpenModel, files: dict[str, str]) -> MergeInput:
    manifest = read_manifest(str(model.folder))
    identified = manifest.fingerprint if manifest is not None else fingerprint(files)
    pickles = model.read_json(RECORD_NAME).get("files", {})
    return MergeInput(
        role=role, name=model.name, fingerprint=identified, revision=model.revision, files={**files, **pickles}
    )


def _sha256(path: Path, stopped: threading.Event) -> str:
    digest, chunk = hashlib.sha256(), memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while not stopped.is_set() and (count := file.readinto(chunk)):
            digest.update(chunk[:count])
    return digest.hexdigest()


def command_line(stage: str, options: Mapping[str, Any]) -> str:
    """Return the command line that runs a stage with these options, such as "readapt merge --output FOLDER".

    Options that are None or False are left out, lists are joined by commas, and True is the flag alone. Values are
    quoted for a shell if needed.
    """
    parts = [f"readapt {stage}"]
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            parts.append(flag)
        elif value is not None and value is not False:
            listed = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            parts.append(f"{flag} {shlex.quote(listed)}")
    return " ".join(parts)
