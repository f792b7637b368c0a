"""List the artifacts under a root, with their generations, inputs, and whether they hold passages."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from readapt_ray import artifacts
from readapt_ray.artifact_files import is_single_file, record_of
from readapt_ray.generations import FOLDER_NAME, STAGE_OF, Generation
from readapt_ray.storage import Location

_WEIGHTS = ("train", "finetune", "merge")
"""Stages whose artifacts are models and hold neither passages nor ids."""


_OF_REFRESH = re.compile(rf"{FOLDER_NAME}/\d{{5,}}/({'|'.join(STAGE_OF)})")


@dataclass(frozen=True)
class Trace:
    """An artifact under a root, complete or not, and the generations that it belongs to."""

    name: str
    """Path relative to the root."""
    location: Location
    stage: str
    fingerprint: str
    inputs: frozenset[str]
    """Fingerprints of the artifacts and models that it was made from."""
    generations: tuple[int, ...]
    """Numbers of the generations that have this artifact."""
    details: dict[str, Any]

    @property
    def is_of_refresh(self) -> bool:
        """Whether a refresh made (or began) the artifact."""
        return _OF_REFRESH.fullmatch(self.name) is not None

    @property
    def holds_passages(self) -> bool:
        """Whether the artifact may hold texts, ids or vectors of passages."""
        return self.stage not in _WEIGHTS

    def files(self) -> list[Location]:
        """Return all files of the artifact, manifest and lease included."""
        if is_single_file(self.location):
            records = (record_of(self.location, name) for name in ("manifest.json", "building.json"))
            return [file for file in (self.location, *records) if file.is_file()]
        return [self.location / name for name in self.location.entries()[0]]

    def num_bytes(self) -> int:
        """Return the total size of its files in bytes."""
        return sum(file.size_bytes() for file in self.files())


def traces(root: Location, there: Iterable[Generation]) -> list[Trace]:
    """Return all artifacts under a root, complete or not, sorted by name.

    Raises:
        CorruptFileError: a manifest cannot be read.
    """
    generations = list(there)
    found = []
    for name in artifacts.names_under(root):
        location = root if name == "." else root / name
        manifest = artifacts.read_manifest(location)
        record = vars(manifest) if manifest else artifacts.read_lease(location) or {}
        found.append(
            Trace(
                name=name,
                location=location,
                stage=record.get("stage", ""),
                fingerprint=record.get("fingerprint", ""),
                inputs=frozenset(record.get("inputs", {}).values()) | _reported_runs(location, record),
                generations=tuple(each.number for each in generations if name in each.artifacts.values()),
                details=record.get("details", {}),
            )
        )
    return found


def _reported_runs(location: Location, record: Mapping[str, Any]) -> frozenset[str]:
    """Return the fingerprints of the runs that a report of `evaluate` compares; its own inputs have only their hash."""
    if record.get("stage") != "evaluate":
        return frozenset()
    try:
        provenance = json.loads((location / "report.json").read_bytes())["provenance"]
        return frozenset(each["fingerprint"] for each in provenance.values() if "fingerprint" in each)
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):  # unfinished, or of an older release
        return frozenset()


def derived_from(origins: Iterable[Trace], among: Iterable[Trace]) -> list[Trace]:
    """Return the artifacts with texts, ids or vectors of passages that derive from `origins`.

    They were made from `origins` directly, or through other such artifacts. Models (of train, finetune and merge) are
    left out, and so is what was made only through them. `origins` themselves are not returned.

    Args:
        origins: artifacts, such as corpora.
        among: the artifacts to choose from.
    """
    known = {each.fingerprint for each in origins}
    left = [each for each in among if each.fingerprint not in known and each.holds_passages]
    found: list[Trace] = []
    while more := [each for each in left if each.inputs & known]:
        found += more
        known |= {each.fingerprint for each in more}
        left = [each for each in left if each not in more]
    return found
