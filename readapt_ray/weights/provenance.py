"""What a merged model was made from, so that it can be checked and made again.

In: models on this machine's disk. Out: for each its name, revision, fingerprint and the SHA-256 of
every file that decides its content. All cores hash, so this is faster than the disk.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from readapt_ray.artifacts import fingerprint, read_manifest
from readapt_ray.catalog.models import Model
from readapt_ray.storage import Location
from readapt_ray.weights.pickled import RECORD_NAME
from readapt_ray.weights.pipeline import in_order, num_cores

_HASHED = (".json", ".safetensors", ".txt", ".model", ".jinja")
_WEIGHTS = (".safetensors", ".bin")


@dataclass(frozen=True, kw_only=True)
class Ingredient:
    """One input of a merge."""

    role: str
    name: str
    fingerprint: str
    """Equal to `Model.fingerprint`."""
    revision: str
    """The commit on the hub; empty for a model that is not from there."""
    files: Mapping[str, str]
    """SHA-256 of each file that decides its content, by its name in the folder."""

    @property
    def weight_files(self) -> dict[str, str]:
        """SHA-256 of the files that hold weights."""
        return {name: digest for name, digest in self.files.items() if name.endswith(_WEIGHTS)}

    def to_json(self) -> dict[str, Any]:
        """What a manifest or a bundle says of it."""
        return {
            "name": self.name,
            "revision": self.revision,
            "fingerprint": self.fingerprint,
            "files": dict(self.files),
        }


def describe(models: Sequence[tuple[str, Model]]) -> list[Ingredient]:
    """Describe the inputs of a merge, by role and model."""
    jobs = [
        (number, file)
        for number, (_, model) in enumerate(models)
        for file, _ in Location(str(model.folder)).listing(recursive=True)
        if file.endswith(_HASHED)
    ]
    hashes = in_order(lambda job: _sha256(models[job[0]][1].folder / job[1]), jobs, num_threads=num_cores())
    files: list[dict[str, str]] = [{} for _ in models]
    for (number, file), digest in zip(jobs, hashes, strict=True):
        files[number][file] = digest
    return [_describe(role, model, found) for (role, model), found in zip(models, files, strict=True)]


def _describe(role: str, model: Model, files: dict[str, str]) -> Ingredient:
    manifest = read_manifest(str(model.folder))
    identified = manifest.fingerprint if manifest is not None else fingerprint(files)
    origin = model.folder
    if (model.folder / RECORD_NAME).is_file():
        record = json.loads((model.folder / RECORD_NAME).read_text(encoding="utf-8"))
        origin, files = Path(record["folder"]), {**files, **record["files"]}
    revision = origin.name if origin.parent.name == "snapshots" else ""  # as the hub's cache lays folders out
    return Ingredient(role=role, name=model.name, fingerprint=identified, revision=revision, files=files)


def _sha256(path: Path) -> str:
    return Location(str(path)).sha256()


def command_line(stage: str, options: Mapping[str, Any]) -> str:
    """The command that makes the same again; `options` by name, those with None left out."""
    parts = [f"readapt {stage}"]
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            parts.append(flag)
        elif value is not None and value is not False:
            listed = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            parts.append(f"{flag} {listed}")
    return " ".join(parts)
