"""Open the output of `readapt bridge`: a map of query vectors of a new model, to search the vectors of an old model.

A bridge belongs to one artifact of vectors and one encoder of queries, and is refused with any other.
"""

import functools
import hashlib
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from readapt_ray.artifacts import Artifact, fingerprint, open_artifact
from readapt_ray.errors import CorruptFileError, FingerprintMismatchError, InputError

if TYPE_CHECKING:
    from readapt_ray.retrieval.calibration import Calibration
    from readapt_ray.retrieval.query_maps import QueryMap

logger = logging.getLogger("readapt_ray")

MAP_NAME = "map.safetensors"
CALIBRATION_NAME = "calibration.safetensors"


@dataclass(frozen=True)
class Bridge:
    """A complete bridge. Its map is read at first use."""

    artifact: Artifact

    @classmethod
    def open(cls, uri: str) -> "Bridge":
        """Open the output of `readapt bridge`.

        Raises:
            ArtifactMissingError: there is no complete bridge.
        """
        return cls(open_artifact(uri, "bridge"))

    @property
    def new_encoder(self) -> dict[str, Any]:
        """Return the description of the new model's encoder, whose query vectors are mapped.

        It has fingerprint, model, dtype, encoding and dimension (of the vectors before the map).
        """
        return dict(self.artifact.manifest.details["new_encoder"])

    @property
    def old_encoder(self) -> dict[str, Any]:
        """Return the description of the encoder that made the vectors, with the same entries as `new_encoder`."""
        return dict(self.artifact.manifest.details["old_encoder"])

    @property
    def query_fingerprint(self) -> str:
        """Return a fingerprint of everything that decides the vector of a query after the map."""
        return fingerprint({"encoder": self.new_encoder["fingerprint"], "bridge": self.artifact.fingerprint})

    @functools.cached_property
    def query_map(self) -> "QueryMap":
        """Read the map of query vectors, at first use.

        Raises:
            CorruptFileError: its file was cut short or altered, or is gone.
        """
        from readapt_ray.retrieval.query_maps import QueryMap

        details = self.artifact.manifest.details
        return QueryMap.from_bytes(details["map"], self._verified(MAP_NAME, details["map_sha256"]))

    @functools.cached_property
    def calibration(self) -> "Calibration":
        """Read the sample of passages by which scores are calibrated, at first use.

        Raises:
            CorruptFileError: the file was cut short or altered, or is gone.
            InputError: an older release made the bridge, without such a sample.
        """
        from readapt_ray.retrieval.calibration import Calibration

        self.check_calibrated()
        sha256 = self.artifact.manifest.details["calibration_sha256"]
        return Calibration.from_bytes(self._verified(CALIBRATION_NAME, sha256))

    def check_calibrated(self) -> None:
        """Refuse a bridge of an older release, which has no sample to calibrate its scores.

        Raises:
            InputError: the bridge has no calibration file.
        """
        if "calibration_sha256" not in self.artifact.manifest.details:
            raise InputError(
                f"bridge {self.artifact.uri!r} was made by an older release and lacks {CALIBRATION_NAME}, by which its scores "
                f"are compared with those of new vectors; run `readapt bridge` again into another output"
            )

    def _verified(self, name: str, sha256: str) -> bytes:
        file = self.artifact.location / name
        content = file.read_bytes() if file.is_file() else b""
        if hashlib.sha256(content).hexdigest() != sha256:
            raise CorruptFileError(f"{file} was cut short or altered, or is gone; run `readapt bridge` again")
        return content

    def check_vectors(self, made: Artifact) -> None:
        """Refuse vectors, or an index of them, for which the bridge was not fitted.

        Args:
            made: the output of `readapt embed` or `readapt index`.

        Raises:
            FingerprintMismatchError: the bridge was fitted on other vectors.
        """
        vectors = made.fingerprint if made.manifest.stage == "embed" else made.manifest.inputs["vectors"]
        fitted_on = self.artifact.manifest.inputs["old_vectors"]
        if vectors != fitted_on:
            raise FingerprintMismatchError(
                f"bridge {self.artifact.uri!r} leads to the vectors {fitted_on} ({self.old_encoder['model']!r}, in "
                f"{self.artifact.manifest.config['old_vectors']!r}), and {made.uri!r} has the vectors {vectors}; run "
                f"`readapt bridge` for these"
            )

    def warn_if_not_worth_it(self) -> None:
        """Log a warning if, by its recall when it was made, the bridge is not worth using; else do nothing."""
        if objection := self.artifact.manifest.details["not_worth_it"]:
            logger.warning("bridge %s is not worth it: %s", self.artifact.uri, objection)
