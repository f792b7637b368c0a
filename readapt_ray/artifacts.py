"""Artifacts: folders whose `manifest.json`, written last, says that they are complete.

A stage calls `produce` with its config, the fingerprints of its inputs and the work to do.

    manifest there, same fingerprint      nothing is done, and it says so
    manifest there, other fingerprint     refused, unless told to overwrite
    `building.json` there, same           an earlier process was killed: the work goes on
    `building.json` there, other          refused, unless told to overwrite

An output that ends with `.trec` is an artifact of one file, its records beside it under its name
(`base.trec.manifest.json`).

While work goes on, `building.json` holds a lease (`leases.py`).
"""

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import logging
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from readapt_ray import hardware, leases
from readapt_ray.config import StageConfig
from readapt_ray.errors import ArtifactConflictError, ArtifactMissingError, CorruptFileError, InputError
from readapt_ray.progress import ProgressReporter, duration
from readapt_ray.storage import Location

logger = logging.getLogger("readapt_ray")

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
BUILDING_NAME = "building.json"
SINGLE_FILE_SUFFIX = ".trec"
_VERSIONED_PACKAGES = ("readapt-ray", "ray", "torch", "transformers", "peft", "deepspeed", "faiss-cpu", "pyarrow")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a complete artifact says of itself."""

    stage: str
    fingerprint: str
    """Hex digest of the stage, its options and its inputs: equal means the same content."""
    config: dict[str, Any]
    inputs: dict[str, str]
    """The fingerprint of each input, by the name of its option."""
    counts: dict[str, int]
    """Rows, tokens, bytes and the like."""
    details: dict[str, Any]
    """What else the stage has to say."""
    seconds: float
    created: str
    versions: dict[str, str]
    hardware: dict[str, Any] = field(default_factory=dict)
    """The driver's machine and the cluster; empty in artifacts of releases that did not say."""
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True)
class Artifact:
    """A complete artifact: where it lies and what it says of itself."""

    location: Location
    manifest: Manifest

    @property
    def fingerprint(self) -> str:
        """The fingerprint of its content."""
        return self.manifest.fingerprint

    @property
    def uri(self) -> str:
        """Where it lies."""
        return self.location.uri


@dataclass
class Workspace:
    """The folder that a stage fills. What it leaves in `counts` and `details` goes into the manifest."""

    location: Location
    fingerprint: str
    reporter: ProgressReporter
    counts: dict[str, int] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def progress(self, done: int, total: int | None = None, *, unit: str = "", note: str = "") -> None:
        """Say how far the work is; shown to the user and to `readapt status`."""
        self.reporter.update(done, total, unit=unit, note=note)


def fingerprint(content: Any) -> str:
    """32 hex characters that stand for a JSON-like value, whatever the order of its keys."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]


def read_manifest(uri: str | Location) -> Manifest | None:
    """The manifest of the artifact in a folder; None where there is none, so no complete artifact.

    Raises:
        CorruptFileError: the manifest cannot be read.
    """
    location = _record(uri if isinstance(uri, Location) else Location(uri), MANIFEST_NAME)
    if not location.is_file():
        return None
    try:
        values = json.loads(location.read_text())
        known = {each.name for each in dataclasses.fields(Manifest)}
        return Manifest(**{name: value for name, value in values.items() if name in known})
    except (ValueError, TypeError, AttributeError) as error:
        raise CorruptFileError(
            f"{location} is not a manifest: {error}; remove that folder and run its stage again"
        ) from error


def names_under(root: Location) -> list[str]:
    """The artifacts under a folder, complete or not, by their paths relative to it; `.` is the folder itself.

    What lies inside an artifact is not listed, so a root with millions of files takes a few requests.
    """
    found = []
    pending = [(".", root)]
    while pending:
        name, folder = pending.pop()
        files, folders = folder.children()
        if {MANIFEST_NAME, BUILDING_NAME} & set(files):
            found.append(name)
            continue
        prefix = "" if name == "." else f"{name}/"
        for file in files:
            artifact, mark, record = file.partition(f"{SINGLE_FILE_SUFFIX}.")
            if mark and record in (MANIFEST_NAME, BUILDING_NAME):
                found.append(f"{prefix}{artifact}{SINGLE_FILE_SUFFIX}")
        pending += [(f"{prefix}{each}", folder / each) for each in folders]
    return sorted(set(found))


def open_artifact(uri: str, stage: str) -> Artifact:
    """The complete artifact of a stage.

    Raises:
        ArtifactMissingError: there is none, it is unfinished, or it belongs to another stage.
    """
    location = Location(uri)
    manifest = read_manifest(location)
    if manifest is None:
        if _record(location, BUILDING_NAME).exists():
            raise ArtifactMissingError(
                f"{uri!r} is unfinished; run `readapt {stage}` with this output again, it goes on where it stopped"
            )
        state = "holds no manifest.json" if location.exists() else "does not exist"
        raise ArtifactMissingError(f"{uri!r} {state}; give the output folder of `readapt {stage}`")
    if manifest.stage != stage:
        raise ArtifactMissingError(
            f"{uri!r} is the output of {manifest.stage!r}; give the output folder of `readapt {stage}`"
        )
    return Artifact(location, manifest)


def produce(
    stage: str,
    config: StageConfig,
    *,
    inputs: Mapping[str, str],
    work: Callable[[Workspace], None],
    identity: Mapping[str, Any] | None = None,
) -> Artifact:
    """Make the artifact of a stage, unless it is there.

    Args:
        stage: the stage's name.
        config: its options; those that decide the content are fingerprinted.
        inputs: the fingerprint of each input.
        work: fills the workspace. It finds there what a killed process left, and goes on from it.
        identity: what else decides the content (a resolved default, say).

    Raises:
        ArtifactConflictError: the folder holds something else, or another process is at it.
    """
    location = Location(config.output)
    identified = fingerprint(
        {
            "stage": stage,
            "format": FORMAT_VERSION,
            "config": config.identity(),
            "inputs": dict(inputs),
            "also": dict(identity or {}),
        }
    )
    present = read_manifest(location)
    if present is not None:
        if present.fingerprint == identified:
            logger.info("%s: already complete in %s", stage, config.output)
            return Artifact(location, present)
        _refuse_or_clear(location, config, stage, dataclasses.asdict(present), inputs)
    lease = _take_lease(location, config, stage, identified, inputs)
    started_s = time.monotonic()
    try:
        with ProgressReporter(stage) as reporter, leases.Heartbeat(_record(location, BUILDING_NAME), lease, reporter):
            workspace = Workspace(location=location, fingerprint=identified, reporter=reporter)
            work(workspace)
    except InputError:
        _forget_if_empty(location)
        raise
    manifest = Manifest(
        stage=stage,
        fingerprint=identified,
        config=config.settings(),
        inputs=dict(inputs),
        counts=workspace.counts,
        details=workspace.details,
        seconds=round(lease["seconds_before"] + time.monotonic() - started_s, 3),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions=_versions(),
        hardware=hardware.described(),
    )
    _record(location, MANIFEST_NAME).write_text(json.dumps(dataclasses.asdict(manifest), indent=2, default=str) + "\n")
    _record(location, BUILDING_NAME).delete()
    logger.info("%s: done in %s%s", stage, duration(manifest.seconds), _counted(manifest.counts))
    return Artifact(location, manifest)


def _record(location: Location, name: str) -> Location:
    """Where the manifest or the heartbeat of an artifact lies."""
    return location.beside(f".{name}") if location.name.endswith(SINGLE_FILE_SUFFIX) else location / name


def read_building(uri: str | Location) -> dict[str, Any] | None:
    """What an unfinished artifact says: its stage, process, heartbeat (unix seconds) and progress."""
    return leases.read_lease(_record(uri if isinstance(uri, Location) else Location(uri), BUILDING_NAME))


def _take_lease(
    location: Location, config: StageConfig, stage: str, identified: str, inputs: Mapping[str, str]
) -> dict[str, Any]:
    building = read_building(location)
    seconds_before = 0.0
    if building is not None:
        leases.wait_until_dead(building, _record(location, BUILDING_NAME), location)
        if building["fingerprint"] == identified and not config.overwrite:
            logger.info("%s: goes on where it stopped in %s", stage, config.output)
            location.remove_temporary()
            seconds_before = float(building["seconds"])
        elif building["fingerprint"] != identified:
            _refuse_or_clear(location, config, stage, building, inputs)
        else:
            _clear(location)
    elif not config.overwrite and location.is_folder() and location.listing():
        raise ArtifactConflictError(
            f"{config.output!r} holds files that no stage of readapt made; give an empty or new folder as the output"
        )
    return {
        "stage": stage,
        "fingerprint": identified,
        "config": config.settings(),
        "inputs": dict(inputs),
        **leases.owner(),
        "seconds_before": seconds_before,
    }


def _refuse_or_clear(
    location: Location, config: StageConfig, stage: str, present: Mapping[str, Any], inputs: Mapping[str, str]
) -> None:
    """Empty the folder where the user said so; else say what differs. `present` is a manifest or a heartbeat."""
    if config.overwrite:
        _clear(location)
        return
    if present["stage"] != stage:
        differs = f"it is the output of {present['stage']!r}"
    else:
        there, wanted = present["config"], config.settings()
        names = sorted(config.identity().keys() | inputs.keys())
        changes = [
            f"{name}: {there.get(name)!r} there, {wanted[name]!r} now"
            for name in names
            if name in wanted and there.get(name) != wanted[name]
        ]
        changes += [
            f"{name}: its content changed"
            for name in sorted(inputs)
            if present["inputs"].get(name) != inputs[name] and there.get(name) == wanted.get(name)
        ]
        differs = "; ".join(changes) or "it was made by another version"
    raise ArtifactConflictError(
        f"{config.output!r} already holds something else ({differs}); give another output, or --overwrite to replace it"
    )


def _forget_if_empty(location: Location) -> None:
    """Leave no trace of work that was refused before it wrote anything, so that mended input is not another artifact."""
    written = [name for name, _ in location.listing(recursive=True) if name != BUILDING_NAME]
    if not written and not location.is_file():
        _record(location, BUILDING_NAME).delete()


def _clear(location: Location) -> None:
    location.delete()
    for name in (MANIFEST_NAME, BUILDING_NAME):
        _record(location, name).delete()


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _VERSIONED_PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _counted(counts: Mapping[str, int]) -> str:
    return "".join(f", {value:,} {name.removeprefix('num_').replace('_', ' ')}" for name, value in counts.items())
