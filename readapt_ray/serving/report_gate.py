"""Check a report for `--require-report`: serve only versions that it measured, and only if its requirements hold."""

import json
from collections.abc import Mapping

from readapt_ray.artifacts import open_artifact
from readapt_ray.catalog.models import open_model
from readapt_ray.errors import InputError
from readapt_ray.serving.options import VersionConfig


def check_report(uri: str, versions: Mapping[str, VersionConfig]) -> None:
    """Refuse versions that a report does not allow; do nothing if it allows all.

    Args:
        uri: output of `readapt evaluate --require`.
        versions: options of each version, by name.

    Raises:
        ArtifactMissingError: there is no such report.
        InputError: the report requires nothing, a requirement does not hold, it did not measure the index (or without
            one the retriever) of a version, or passages of a version move to new vectors.
    """
    report = open_artifact(uri, "evaluate")
    required = report.manifest.details.get("requirements") or []
    if not required:
        raise InputError(f"report {uri!r} requires nothing; make it with `readapt evaluate --require`")
    if failed := [each["sentence"] for each in required if not each["holds"]]:
        raise InputError(f"report {uri!r} does not allow this version: {' '.join(failed)}")
    runs = json.loads((report.location / "report.json").read_text())["runs"]
    measured = {value for run in runs for value in run["provenance"].get("inputs", {}).values()}
    for name, version in versions.items():
        if version.new_vectors:
            raise InputError(
                f"version {name!r} moves to the vectors of {version.new_vectors!r} while it is served, and no report measures "
                f"what is between; leave require_report or new_vectors out"
            )
        if not measured & _made_from(version):
            what = f"index {version.index!r}" if version.index else f"retriever {version.retriever!r}"
            raise InputError(f"report {uri!r} did not measure version {name!r} ({what}); evaluate a run of it")


def _made_from(version: VersionConfig) -> set[str]:
    """Return the fingerprints that a run of this version has as input: bridge, index or its vectors, or retriever."""
    if not version.index:
        return {open_model(version.retriever).fingerprint}
    if version.bridge:
        return {open_artifact(version.bridge, "bridge").fingerprint}
    manifest = open_artifact(version.index, "index").manifest
    return {manifest.fingerprint, manifest.inputs["vectors"]}
