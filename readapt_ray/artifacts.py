"""Produce and open artifacts: output folders with a `manifest.json`. It is written last, so it marks them as complete.

A stage calls `produce` with its config, the fingerprints of its inputs and the work to do. What happens depends on what
the output folder holds:

    manifest, same fingerprint          nothing is done, and a log line says so
    manifest, other fingerprint         refused, unless `overwrite` is set
    `building.json`, same fingerprint   an earlier process was killed: the work resumes
    `building.json`, other fingerprint  refused, unless `overwrite` is set
    anything else                       refused, even if `overwrite` is set

A folder counts as our output only if it holds a manifest or a lease that a stage wrote. This record says which files
are ours (`artifact_files.py`). Overwriting removes only these files and keeps all others in the folder.

An output whose name ends with `.trec` is an artifact of a single file. Its records are beside it, with its name in
front (`base.trec.manifest.json`).

During the work, `building.json` holds a lease (`leases.py`).
"""

import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Any

from readapt_ray import artifact_files, hardware, leases, outputs
from readapt_ray.artifact_files import (
    LEASE_NAME,
    MANIFEST_NAME,
    SINGLE_FILE_SUFFIX,
    STAGE_FILES,
    Names,
    record_of,
)
from readapt_ray.config import StageConfig
from readapt_ray.errors import ArtifactMissingError, CorruptFileError, InputError
from readapt_ray.progress import ProgressReporter, amount, duration
from readapt_ray.storage import Location

logger = logging.getLogger("readapt_ray")

FORMAT_VERSION = 1
_MANIFEST_START = b'{"stage"'
"""The first bytes of every manifest that a stage writes, once white space is removed."""
_VERSIONED_PACKAGES = (
    "readapt-ray",
    "ray",
    "torch",
    "transformers",
    "deepspeed",
    "faiss-cpu",
    "faiss-gpu",
    "pyarrow",
)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of `manifest.json`: how a complete artifact was made, and which files it has."""

    stage: str
    fingerprint: str
    """Hex digest of the stage, its options and its inputs. Artifacts with equal fingerprints have the same content."""
    config: dict[str, Any]
    inputs: dict[str, str]
    """The fingerprint of each input. The key is the option that names the input, such as "corpus"."""
    counts: dict[str, int]
    """Numbers of rows, tokens, bytes and the like, by name."""
    details: dict[str, Any]
    """Other facts that the stage records, by name."""
    seconds: float
    """Elapsed seconds, summed over all attempts of a stage that was resumed."""
    created: str
    """When it was completed (UTC, ISO 8601)."""
    versions: dict[str, str]
    files: Names = ()
    """Names of the files. Files with consecutive numbers take one entry: `[before, first, last, after]`."""
    hardware: dict[str, Any] = field(default_factory=dict)
    """The driver's machine and the cluster. Empty in artifacts of older releases, which did not record it."""
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True)
class Artifact:
    """A complete artifact: its location and its manifest."""

    location: Location
    manifest: Manifest

    @property
    def fingerprint(self) -> str:
        """The hash of the stage, its options and its inputs."""
        return self.manifest.fingerprint

    @property
    def uri(self) -> str:
        """The location as a path or URI."""
        return self.location.uri


@dataclass
class Workspace:
    """The output folder that a stage fills. The stage's `counts` and `details` go into the manifest."""

    location: Location
    fingerprint: str
    reporter: ProgressReporter
    counts: dict[str, int] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def progress(self, done: int, total: int | None = None, *, unit: str = "", note: str = "") -> None:
        """Report to the user and to `readapt status` that `done` of `total` units are done in all."""
        self.reporter.update(done, total, unit=unit, note=note)


def fingerprint(content: Any) -> str:
    """Hash a JSON-like value to 32 hex characters. The order of keys makes no difference."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]


def read_manifest(uri: str | Location) -> Manifest | None:
    """Return the manifest of the artifact in a folder, or None if the folder holds no complete artifact.

    A `manifest.json` that another program wrote is ignored.

    Raises:
        CorruptFileError: a stage wrote the manifest, but it cannot be parsed.
    """
    location = record_of(uri if isinstance(uri, Location) else Location(uri), MANIFEST_NAME)
    try:
        content = location.read_bytes()
    except leases.NO_FILE:
        return None
    fields = dataclasses.fields(Manifest)
    required = {each.name for each in fields if each.default is each.default_factory is dataclasses.MISSING}
    try:
        values = json.loads(content)
    except ValueError as error:
        start = b"".join(content.replace(b"\0", b"").split())  # after a crash a file may be empty, or hold zeros
        if not _MANIFEST_START.startswith(start[: len(_MANIFEST_START)]):
            return None
        raise CorruptFileError(
            f"{location} is not a manifest: {error}; if a stage of readapt made that folder, remove it and run the stage again"
        ) from error
    if not isinstance(values, dict) or not required <= values.keys():
        return None
    known = {each.name: values[each.name] for each in fields if each.name in values}
    return Manifest(**known)


def names_under(root: Location) -> list[str]:
    """Return the relative paths of all artifacts under a folder, complete or unfinished; `.` is the folder itself.

    Files inside an artifact are not listed, so a root with millions of files takes a few requests. The content of a
    record is checked: a `manifest.json` of another program makes no artifact. A link to a folder outside the root is
    followed once; other links are not followed. Otherwise an artifact would be listed, and cleaned, under two names.
    """
    found = []
    seen: set[str] = set()
    pending = [(".", root)]
    while pending:
        name, folder = pending.pop()
        files, folders = folder.children()
        if {MANIFEST_NAME, LEASE_NAME} & set(files) and _is_artifact(folder):
            found.append(name)
            continue
        prefix = "" if name == "." else f"{name}/"
        for file in files:
            stem, mark, record = file.partition(f"{SINGLE_FILE_SUFFIX}.")
            artifact = f"{stem}{SINGLE_FILE_SUFFIX}"
            if mark and record in (MANIFEST_NAME, LEASE_NAME) and _is_artifact(folder / artifact):
                found.append(f"{prefix}{artifact}")
        inner = ((f"{prefix}{each}", folder / each) for each in folders)
        pending += [each for each in inner if not _leads_back(each[1], root, seen)]
    return sorted(set(found))


def _leads_back(folder: Location, root: Location, seen: set[str]) -> bool:
    """Return whether a folder is a link into the root, to a parent of the root, or to a folder already seen."""
    if not folder.is_local or not os.path.islink(folder.path):
        return False
    there, own = os.path.realpath(folder.path), os.path.realpath(root.path)
    leads_back = os.path.commonpath([there, own]) in (there, own) or there in seen
    seen.add(there)
    return leads_back


def _is_artifact(location: Location) -> bool:
    try:
        return read_manifest(location) is not None or read_lease(location) is not None
    except CorruptFileError:
        return True  # a stage wrote this manifest, but a crash cut it short


def open_artifact(uri: str, stage: str) -> Artifact:
    """Open the complete artifact in a folder. It must be an output of `stage`, unless `stage` is empty.

    Raises:
        ArtifactMissingError: there is no artifact, it is unfinished, or another stage made it.
        CorruptFileError: its manifest cannot be parsed.
    """
    location = Location(uri)
    manifest = read_manifest(location)
    if manifest is None:
        if (lease := read_lease(location)) is not None:
            raise ArtifactMissingError(
                f"{uri!r} is unfinished; run `readapt {stage or lease['stage']}` with this output again to resume it"
            )
        state = f"holds no {MANIFEST_NAME} of a stage" if location.exists() else "does not exist"
        made_by = f"`readapt {stage}`" if stage else "a stage"
        raise ArtifactMissingError(f"{uri!r} {state}; give the output folder of {made_by}")
    if stage and manifest.stage != stage:
        raise ArtifactMissingError(
            f"{uri!r} is the output of {manifest.stage!r}; give the output folder of `readapt {stage}`"
        )
    return Artifact(location, manifest)


def identify(
    stage: str,
    config: StageConfig,
    inputs: Mapping[str, str],
    identity: Mapping[str, Any] | None = None,
    known: Container[str] | None = None,
) -> str:
    """Compute the fingerprint of an artifact. See `produce` for the arguments, and `StageConfig.identity` for `known`."""
    content = {"stage": stage, "format": FORMAT_VERSION, "inputs": dict(inputs), "also": dict(identity or {})}
    return fingerprint({**content, "config": config.identity(known)})


def produce(
    stage: str,
    config: StageConfig,
    *,
    inputs: Mapping[str, str],
    work: Callable[[Workspace], None],
    identity: Mapping[str, Any] | None = None,
) -> Artifact:
    """Make the artifact of a stage in `config.output`, unless it is already complete.

    Args:
        stage: the stage's name.
        config: the stage's options. The options that decide the content go into the fingerprint.
        inputs: the fingerprint of each input, by the name of its option.
        work: fills the workspace. If a killed process left files there, `work` resumes from them.
        identity: other values that decide the content, such as a resolved default.

    Raises:
        ArtifactConflictError: the folder holds something else, or another process is writing it.
    """
    location = Location(config.output)
    identified = identify(stage, config, inputs, identity)
    present, old_lease = read_manifest(location), None
    if present is not None and identify(stage, config, inputs, identity, present.config) == present.fingerprint:
        identified = present.fingerprint  # an older release made it: options it lacked have their defaults here
    if present is None or present.fingerprint != identified:
        old_lease = leases.wait_until_dead(record_of(location, LEASE_NAME), location)
        present = read_manifest(location)  # the other process may have finished while we waited
    if present is not None and present.fingerprint == identified:
        logger.info("%s: already complete in %s", stage, config.output)
        return Artifact(location, present)
    old_record = dataclasses.asdict(present) if present is not None else old_lease
    options = old_record.get("config", {}) if old_record else {}
    if (
        old_record
        and identify(stage, config.changed_back(options), inputs, identity, options) == old_record["fingerprint"]
    ):
        old_record = {**old_record, "fingerprint": identified}
    record = {
        "stage": stage,
        "fingerprint": identified,
        "config": config.settings(),
        "inputs": dict(inputs),
        "patterns": STAGE_FILES.get(stage, ()),
    }
    outputs.refuse_what_is_there(location, config, record, old_record)
    manifest = _fill(location, record, work, old_record=old_record, old_lease=old_lease)
    counts = counted(manifest.counts)
    logger.info("%s: done in %s%s", stage, duration(manifest.seconds), counts and f", {counts}")
    return Artifact(location, manifest)


def produce_again(artifact: Artifact, output: str, work: Callable[[Workspace], None]) -> Artifact:
    """Write an artifact with the same content and fingerprint into another folder, unless that folder already has it.

    Args:
        artifact: the existing artifact.
        output: the other folder. An artifact or unfinished work with another fingerprint there is replaced.
        work: fills the workspace with the same content in other files. If a killed process left files there, `work`
            resumes from them.

    Raises:
        ArtifactConflictError: another process is writing the other folder.
    """
    location, manifest = Location(output), artifact.manifest
    old_lease = leases.wait_until_dead(record_of(location, LEASE_NAME), location)
    present = read_manifest(location)
    if present is not None and present.fingerprint == manifest.fingerprint:
        return Artifact(location, present)
    record = {
        "stage": manifest.stage,
        "fingerprint": manifest.fingerprint,
        "config": {**manifest.config, "output": output},
        "inputs": manifest.inputs,
        "patterns": STAGE_FILES[manifest.stage],
    }
    old_record = dataclasses.asdict(present) if present is not None else old_lease
    return Artifact(location, _fill(location, record, work, old_record=old_record, old_lease=old_lease))


def _fill(
    location: Location,
    record: Mapping[str, Any],
    work: Callable[[Workspace], None],
    *,
    old_record: Mapping[str, Any] | None,
    old_lease: Mapping[str, Any] | None,
) -> Manifest:
    """Do the work under a lease. Resume if the fingerprint is the same; else clear the folder and start again."""
    stage, identified = record["stage"], record["fingerprint"]
    resumes = old_record is not None and old_record["fingerprint"] == identified
    own = artifact_files.own_files(location, old_record) if old_record is not None else set()
    seconds_before = float(old_record["seconds"]) if old_record is not None and resumes else 0.0
    reporter = ProgressReporter(stage)
    file = record_of(location, LEASE_NAME)
    cleared = outputs.being_cleared(own) if old_record is not None and not resumes else {}
    lease = leases.Lease(
        file, location, reporter, before=old_lease, fields={**record, "seconds_before": seconds_before, **cleared}
    )
    try:
        with reporter, lease:
            if old_record is not None and not resumes:
                outputs.clear(location, old_record, own)
                lease.update(**record, files=())
            elif resumes:
                logger.info("%s: resumes where it stopped in %s", stage, location)
                artifact_files.remove_temporary(location, own)
            workspace = Workspace(location=location, fingerprint=identified, reporter=reporter)
            work(workspace)
            manifest = _described(workspace, record, lease.seconds())
            text = json.dumps(dataclasses.asdict(manifest), indent=2, default=str) + "\n"
            lease.confirm()
            record_of(location, MANIFEST_NAME).write_text(text)
    except InputError:
        if lease.is_held:
            outputs.drop_lease_if_empty(location, record["patterns"])
        raise
    file.delete()
    return manifest


def _described(workspace: Workspace, record: Mapping[str, Any], seconds: float) -> Manifest:
    """Return the manifest of finished work, and remove temporary files that killed writers left."""
    return Manifest(
        **{name: record[name] for name in ("stage", "fingerprint", "config", "inputs")},
        files=artifact_files.packed(artifact_files.tidied_files(workspace.location, record["patterns"])),
        counts=workspace.counts,
        details=workspace.details,
        seconds=seconds,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions=dict(_versions()),
        hardware=hardware.machine_info(),
    )


def read_lease(uri: str | Location) -> dict[str, Any] | None:
    """Return the lease of an unfinished artifact: stage, process, heartbeat (unix seconds), progress. None if none."""
    return leases.read_lease(record_of(uri if isinstance(uri, Location) else Location(uri), LEASE_NAME))


@functools.cache  # reading them takes 20 ms
def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _VERSIONED_PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def counted(counts: Mapping[str, int]) -> str:
    """Return counts as text for people: "300 passages, 1 shard, 81,920 bytes"."""
    return ", ".join(amount(value, name.removeprefix("num_").replace("_", " ")) for name, value in counts.items())
