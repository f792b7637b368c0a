"""Open the inputs of an artifact, also if artifact and inputs were moved or copied together."""

import contextlib
import os

from readapt_ray.artifacts import Artifact, open_artifact
from readapt_ray.errors import ArtifactMissingError
from readapt_ray.storage import Location


def open_input(made: Artifact, option: str, stage: str) -> Artifact:
    """Open the input from which an artifact was made.

    The folder of artifacts may have been moved since, or recorded by a path relative to another current folder. If the
    path in the manifest holds no artifact with the right fingerprint, the same path relative to the artifact is tried.

    Args:
        made: the artifact.
        option: the option that named the input, such as "corpus".
        stage: the stage that made the input.

    Returns:
        The input. If neither path has the right fingerprint, the artifact at the recorded path; compare its fingerprint
        with the manifest's.

    Raises:
        ArtifactMissingError: neither path has the input, and the recorded path holds no artifact of the stage.
    """
    recorded = str(made.manifest.config[option])
    for place in (recorded, _moved(made, recorded)):
        with contextlib.suppress(ArtifactMissingError):
            found = open_artifact(place, stage)
            if found.fingerprint == made.manifest.inputs.get(option):
                return found
    return open_artifact(recorded, stage)


def _moved(made: Artifact, recorded: str) -> str:
    """Return the path that has the same position relative to the artifact now as `recorded` had when it was made."""
    output, then = Location(str(made.manifest.config["output"])), Location(recorded)
    if not output.filesystem.equals(then.filesystem):
        return recorded
    steps = os.path.relpath(then.path, output.path).split(os.sep)
    num_up = steps.count(os.pardir)
    if num_up >= len(made.location.path.strip("/").split("/")):
        return recorded
    place = made.location
    for _ in range(num_up - 1):
        place = place.sibling("")
    name = "/".join(steps[num_up:])
    return (place.sibling(name) if num_up else place / name).uri
