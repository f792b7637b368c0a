"""Check whether a collection in a vector database is still as the previous refresh left it."""

from collections.abc import Mapping
from typing import Any

from readapt_ray import artifacts
from readapt_ray.generations import EXPORT, FOLDER_NAME, STAGE_OF, Generation
from readapt_ray.storage import Location
from readapt_ray.targets.opening import open_target, parse


def begun_export(root: Location, number: int) -> Mapping[str, Any] | None:
    """Return the manifest or lease of an unpublished generation's export; None if that export has not begun."""
    folder = root / FOLDER_NAME / f"{number:05d}" / EXPORT
    manifest = artifacts.read_manifest(folder)
    return vars(manifest) if manifest else artifacts.read_lease(folder)


def changed_by_others(root: Location, present: Generation, number: int) -> str:
    """Say how another program or export changed the collection of a generation.

    The text is empty if the collection is unchanged, or the generation has no export.

    Args:
        root: the root of the generations.
        present: the generation whose collection is checked.
        number: number of the next generation, whose export may already have begun.

    Raises:
        TargetError: the database cannot be reached.
    """
    if EXPORT not in present.artifacts:
        return ""
    export = artifacts.open_artifact(present.folder(root, EXPORT), STAGE_OF[EXPORT])
    target = export.manifest.details["target"]
    with open_target(parse(target)) as opened:
        there = opened.record()
    if there is None:
        return f"{target} is gone"
    begun = begun_export(root, number) or {}
    if there.get("export") in (export.fingerprint, begun.get("fingerprint", export.fingerprint)):
        return ""
    return f"{target} was written by another {'export' if there else 'program'} since"
