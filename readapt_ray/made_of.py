"""Open what an artifact was made of: at the place that its manifest names, or where both were moved or copied together."""

import contextlib
import os

from readapt_ray.artifacts import Artifact, open_artifact
from readapt_ray.errors import ArtifactMissingError
from readapt_ray.storage import Location


def open_input(made: Artifact, option: str, stage: str) -> Artifact:
    """Open an input of an artifact.

    A folder of artifacts may have been moved, or made by a relative path in another current folder. Where nothing that has
    the right fingerprint is at the recorded place, the input is looked for where it was relative to the artifact.

    Args:
        made: the artifact.
        option: of its stage, whose value was the input: "corpus".
        stage: that made the input.

    Returns:
        The input. If it is at neither place, what is at the recorded one; its fingerprint is not that in the manifest then.

    Raises:
        ArtifactMissingError: nothing is at the recorded place, and the input is not at the other.
    """
    recorded = str(made.manifest.config[option])
    for place in (recorded, _moved(made, recorded)):
        with contextlib.suppress(ArtifactMissingError):
            found = open_artifact(place, stage)
            if found.fingerprint == made.manifest.inputs.get(option):
                return found
    return open_artifact(recorded, stage)


def _moved(made: Artifact, recorded: str) -> str:
    """Return where a recorded path leads from the present place of an artifact, as it did from the recorded one."""
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
