"""Errors keep their message and their fields on the way between processes."""

import pickle

from readapt_ray.errors import ArtifactConflictError


def test_a_conflict_keeps_its_fields_over_pickling() -> None:
    error = ArtifactConflictError("'x' holds something else", output="x", difference="k: 1 there, 2 now")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.output, copy.difference, copy.exit_code) == (str(error), "x", "k: 1 there, 2 now", 2)
