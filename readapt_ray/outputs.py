"""Check that an output may be written, and clear an earlier artifact from it.

In: the output, the record (manifest or lease) in it, and what a stage wants to write. Out: an error that names what is
in the way, or a folder without the files of the earlier artifact.
"""

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from readapt_ray import artifact_files, leases
from readapt_ray.artifact_files import LEASE_NAME, MANIFEST_NAME, RECORDS, is_single_file, record_of
from readapt_ray.config import StageConfig
from readapt_ray.errors import ArtifactConflictError
from readapt_ray.storage import Location

logger = logging.getLogger("readapt_ray")

LEFTOVERS = ""
"""Placeholder for the fingerprint while an artifact is being cleared. It matches no fingerprint, so a half-cleared folder
is never resumed."""


def refuse_what_is_there(
    location: Location, config: StageConfig, ours: Mapping[str, Any], there: Mapping[str, Any] | None
) -> None:
    """Refuse an output that holds something else, with an error that names what is in the way.

    An output that is free, that holds the same artifact (complete or not), or that may be replaced is accepted. Nothing
    is removed here.

    Args:
        location: the output.
        config: the stage's options; `overwrite` allows another artifact to be replaced.
        ours: the record that the stage will write.
        there: the manifest or lease in the output, or None.

    Raises:
        ArtifactConflictError: another artifact is there and may not be replaced, or files that no stage made.
    """
    if there is None:
        _refuse_foreign_files(location, config)
        return
    _refuse_late_files(location, config, ours["patterns"], there)
    if there["fingerprint"] == ours["fingerprint"]:
        return
    if not config.overwrite:
        difference = _difference(config, ours, there)
        raise ArtifactConflictError(
            f"{config.output!r} already holds something else ({difference}); give another output, or --overwrite to replace it",
            output=config.output,
            difference=difference,
        )
    if is_single_file(location):
        return
    own = artifact_files.own_files(location, there)
    if collisions := artifact_files.would_collide(location, own, ours["patterns"]):
        raise ArtifactConflictError(
            f"{config.output!r} holds {artifact_files.named(collisions)} that no stage of readapt made, where this one "
            f"would write; move it away, or give another output"
        )


def refuse_foreign_results(file: Location, keys: set[str], *beside: Location) -> None:
    """Refuse to replace result files that readapt did not write.

    They are ours if the JSON file has these keys, or if neither it nor the files `beside` it exist.

    Raises:
        ArtifactConflictError: a file that is not ours is there.
    """
    try:
        values = None if file.is_folder() else json.loads(file.read_bytes())
        found = [] if isinstance(values, dict) and keys <= values.keys() else [file]
    except FileNotFoundError:
        found = [each for each in beside if each.exists()]
    except ValueError:
        found = [file]
    if found:
        raise ArtifactConflictError(
            f"{found[0]} is there, and readapt did not write it; move it away, or give another folder"
        )


def _refuse_foreign_files(location: Location, config: StageConfig) -> None:
    """Refuse an output that holds any file but our lease: it may be the root of a run, a home or a mount."""
    lease = record_of(location, LEASE_NAME)
    is_ours = not leases.is_foreign(lease)
    if is_single_file(location):
        records = [record_of(location, MANIFEST_NAME), *([] if is_ours else [lease])]
        found = [each.name for each in (location, *records) if each.exists()]
    elif location.is_file():
        raise ArtifactConflictError(f"{config.output!r} is a file; give an empty or new folder as the output")
    else:
        found = artifact_files.in_the_way(location, but=(LEASE_NAME,) if is_ours else ())
    # Another driver may have started since we looked. Its lease is found when we take ours.
    if found and leases.read_lease(lease) is None:
        new = "another output" if is_single_file(location) else "an empty or new folder as the output"
        raise ArtifactConflictError(
            f"{config.output!r} holds {artifact_files.named(found)} that no stage of readapt made; give {new}"
        )


def _refuse_late_files(
    location: Location, config: StageConfig, patterns: Sequence[str], there: Mapping[str, Any]
) -> None:
    """Refuse files that were added after a process was killed: resuming would overwrite them or take them as its own."""
    if "heartbeat" not in there or artifact_files.is_late(record_of(location, LEASE_NAME), there):
        return  # complete; or copied as a whole, so that times mean nothing
    if is_single_file(location):
        late = {location.name} if location.is_file() and artifact_files.is_late(location, there) else set()
    else:
        late = artifact_files.late_files(location, artifact_files.matching_files(location, patterns), there)
    if late:
        raise ArtifactConflictError(
            f"{artifact_files.named(sorted(late))} came to {config.output!r} after the process that worked there had ended; "
            f"move it away, or give another output"
        )


def _difference(config: StageConfig, ours: Mapping[str, Any], there: Mapping[str, Any]) -> str:
    if there["fingerprint"] == LEFTOVERS:
        return "what is left of an artifact that was being replaced"
    if there["stage"] != ours["stage"]:
        return f"it is the output of {there['stage']!r}"
    before, wanted, inputs = there["config"], ours["config"], ours["inputs"]
    changes = [
        f"{name}: {before.get(name)!r} there, {wanted[name]!r} now"
        for name in sorted(config.identity().keys() | inputs.keys())
        if name in wanted and before.get(name) != wanted[name]
    ]
    changes += [
        f"{name}: its content changed"
        for name in sorted(inputs)
        if there["inputs"].get(name) != inputs[name] and before.get(name) == wanted.get(name)
    ]
    return "; ".join(changes) or "it was made by another version"


def drop_lease_if_empty(location: Location, patterns: Sequence[str]) -> None:
    """Remove the lease if the work wrote no file before its input was refused. Corrected input can then start anew."""
    if location.is_file():
        return
    artifact_files.remove_empty_folders(location, patterns)
    if not artifact_files.in_the_way(location, but=(LEASE_NAME,)):
        record_of(location, LEASE_NAME).delete()


def being_cleared(own: Collection[str]) -> dict[str, Any]:
    """Return the fields of a lease while these files of an artifact are removed, so that a killed removal can resume."""
    names = artifact_files.packed(name for name in own if name not in RECORDS)
    return {"fingerprint": LEFTOVERS, "files": names, "patterns": ()}


def clear(location: Location, there: Mapping[str, Any], own: Collection[str]) -> None:
    """Remove the files of an artifact. The manifest goes first, so that it never describes incomplete data.

    Args:
        location: the artifact.
        there: its manifest or lease.
        own: the names of its files, according to that record.
    """
    record_of(location, MANIFEST_NAME).delete()
    if location.is_file():
        location.delete()
        return
    artifact_files.remove(location, [name for name in own if name not in RECORDS])
    artifact_files.remove_empty_folders(location, artifact_files.unpacked(there.get("files", ())))
    if foreign := [name for name in location.entries()[0] if artifact_files.final_name(name) not in RECORDS]:
        logger.warning("%s keeps %s, which no stage of readapt made", location, artifact_files.named(foreign))
