"""The exceptions of readapt_ray.

Two families: `InputError` and `CorruptFileError` are for the user to correct (exit code 2; the message names the value,
what is allowed and what to do); everything else is a failure of the work (exit code 1). All of them
carry one message and survive pickling, so they cross Ray's process borders unchanged.
"""


class ReadaptError(Exception):
    """A failure that readapt_ray recognised. `str(error)` is one clear message."""

    exit_code = 1


class InputError(ReadaptError):
    """What was given cannot be used: the message says what is allowed and what to do."""

    exit_code = 2


class ArtifactConflictError(InputError):
    """A folder already holds another artifact, or another process is writing there.

    Args:
        message: what is wrong and what to do.
        output: the folder, as the stage's config names it; empty where overwriting is no way out.
        difference: what is there and what is wanted.
    """

    def __init__(self, message: str, *, output: str = "", difference: str = "") -> None:
        super().__init__(message)
        self.output = output
        self.difference = difference


class ArtifactMissingError(InputError):
    """A folder that should hold a complete artifact of some stage does not."""


class CorpusError(InputError):
    """A corpus is missing, empty, or does not have the columns or the text that it must."""


class ModelError(InputError):
    """A model cannot be found, is not one, or does not fit what it is used with."""


class WeightMismatchError(ModelError):
    """Two checkpoints that must agree tensor by tensor do not."""


class FingerprintMismatchError(InputError):
    """Vectors, an index or a model of different making would be mixed."""


class PlacementError(InputError):
    """The cluster cannot give what a stage asks for."""


class StorageError(InputError):
    """A disk is full, or a folder may not be written; what was written before stays, and the work can resume."""


class CorruptFileError(ReadaptError):
    """A file of an artifact was cut short or altered."""

    exit_code = 2


class TrainingDivergedError(ReadaptError):
    """The loss became NaN or infinite; the last good checkpoint is kept."""


class TargetError(ReadaptError):
    """A vector database cannot be reached, or refuses what was sent."""


class WorkerError(ReadaptError):
    """A process of the cluster failed for a reason that is not the user's."""


def first_line(error: Exception) -> str:
    """Return the first line of what an error says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


UNREADABLE = (PermissionError, IsADirectoryError, NotADirectoryError)
"""Errors of Python for a path that cannot be used as it is."""


def unreadable(error: Exception) -> InputError:
    """Return the same as one message of ours."""
    return InputError(f"{' '.join(str(error).split())}; give a path that may be read")
