"""The exceptions of readapt_ray.

There are two kinds. `InputError` and `CorruptFileError` are for the user to correct: the exit code is 2, and the message
names the value, what is allowed and what to do. All others are failures of the work: the exit code is 1. Each error has
one message and can be pickled, so it passes between Ray's processes unchanged.
"""


class ReadaptError(Exception):
    """Base class of all errors that readapt_ray raises on purpose. `str(error)` is one clear message."""

    exit_code = 1


class InputError(ReadaptError):
    """The user's input cannot be used. The message says what is allowed and what to do."""

    exit_code = 2


class ArtifactConflictError(InputError):
    """A folder already holds another artifact, or another process is writing there.

    Args:
        message: what is wrong and what to do.
        output: the folder, as in the stage's config. Empty if `--overwrite` would not help.
        difference: which options or inputs of the artifact in the folder differ from the wanted ones.
    """

    def __init__(self, message: str, *, output: str = "", difference: str = "") -> None:
        super().__init__(message)
        self.output = output
        self.difference = difference


class ArtifactMissingError(InputError):
    """A folder that should hold a complete artifact of some stage does not."""


class CorpusError(InputError):
    """A corpus is missing or empty, or lacks required columns or text."""


class ModelError(InputError):
    """A model cannot be found, is not a usable model, or does not fit the other model or data that it is used with."""


class WeightMismatchError(ModelError):
    """Two models that must belong together do not: their tensors or tokenizers differ in names, shapes or content."""


class FingerprintMismatchError(InputError):
    """Vectors, an index and a model do not belong together: their fingerprints differ, so they must not be mixed."""


class PlacementError(InputError):
    """The cluster lacks the CPUs, GPUs or memory that a stage needs."""


class StorageError(InputError):
    """A disk is full, or permission to write a folder is missing. Earlier output stays, so the work can resume."""


class CorruptFileError(ReadaptError):
    """A file of an artifact was cut short or altered."""

    exit_code = 2


class TrainingDivergedError(ReadaptError):
    """The loss became NaN or infinite. The last good checkpoint is kept."""


class TargetError(ReadaptError):
    """A vector database cannot be reached, or rejects the rows that were sent."""


class WorkerError(ReadaptError):
    """A process of the cluster failed, and the user's input is not the reason."""


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the name of its class if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


UNREADABLE = (PermissionError, IsADirectoryError, NotADirectoryError)
"""Python's errors for a path that cannot be read: no permission, or a folder where a file is expected."""


def unreadable(error: Exception) -> InputError:
    """Convert one of the `UNREADABLE` errors to an InputError."""
    return InputError(f"{' '.join(str(error).split())}; give a path that may be read")
