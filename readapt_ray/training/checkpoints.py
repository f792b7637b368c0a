"""Write checkpoints of a training run in the background, one file each, and find the newest one.

A file holds the trained tensors and Adam's moments under the parameters' names, so it does not depend on the number of
workers. Learning rate and random states are functions of the step. Which blocks or pairs were consumed follows from
step, batch size and seed (blocks.py). These are in the header, and a checkpoint with another data order is refused. A
thread of worker 0 writes while the next steps run, at most one file at a time; this takes the memory of two states. A
file gets its name only when it is complete.
"""

import json
import re
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from readapt_ray.errors import CorruptFileError
from readapt_ray.storage import Location

if TYPE_CHECKING:
    from torch import Tensor

_SUFFIX = ".safetensors"
_NAME = re.compile(rf"step-\d{{9,}}{re.escape(_SUFFIX)}")
_ORDER_VERSION = 2
"""Increase this whenever the same seed gives another order or other masks, so that no run changes them half-way."""


@dataclass(frozen=True, kw_only=True)
class DataOrder:
    """The settings that, with the number of steps done, decide which units (blocks or pairs) were consumed."""

    num_units: int
    """Units per epoch."""
    batch_size: int
    """Units per step, over all workers."""
    num_epochs: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps in which every unit is consumed once; the last one may have fewer units."""
        return -(-self.num_units // self.batch_size)

    @property
    def num_steps(self) -> int:
        """Number of steps in all epochs."""
        return self.steps_per_epoch * self.num_epochs

    def identity(self) -> dict[str, int]:
        """Return the settings that decide the order; a checkpoint with other ones is refused.

        The number of epochs is not among them, since it changes no epoch's order.
        """
        return {"num_units": self.num_units, "batch_size": self.batch_size, "seed": self.seed}

    def consumed(self, step: int) -> tuple[int, int]:
        """Return the current epoch (from 0) after `step` steps, and how many units of its order were consumed.

        At the end of an epoch it is the next epoch, with 0 units.
        """
        epoch, in_epoch = divmod(step, self.steps_per_epoch)
        return epoch, in_epoch * self.batch_size


class CheckpointWriter:
    """A writer of checkpoints in the background, one at a time; it keeps the newest.

    Args:
        folder: folder of the checkpoints, on any filesystem that pyarrow opens.
        data_order: data order of the run.
        keep: number of checkpoints to keep; older ones are removed after a newer one is complete.
    """

    def __init__(self, folder: Location, data_order: DataOrder, *, keep: int) -> None:
        self._folder, self._data_order, self._keep = folder, data_order, keep
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, step: int, state: "dict[str, Tensor]") -> None:
        """Start to write a checkpoint in the background, after waiting for the previous one; then old ones are removed.

        Args:
            step: number of steps done.
            state: tensors on the CPU; the caller must not change them afterwards.

        Raises:
            OSError: the previous checkpoint could not be written.
        """
        self.wait()
        self._pending = self._thread.submit(self._write, step, state)

    def wait(self) -> None:
        """Wait until the last checkpoint is written; raise the error if that failed. Call it at the end of the run."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, step: int, state: "dict[str, Tensor]") -> None:
        from safetensors.torch import save as to_safetensors

        place = dict(zip(("epoch", "num_consumed"), self._data_order.consumed(step), strict=True))
        header = {"step": step, **place, **self._data_order.identity(), "order_version": _ORDER_VERSION}
        metadata = {name: json.dumps(value) for name, value in header.items()}
        written = self._folder / f"step-{step:09d}{_SUFFIX}"
        written.write_bytes(to_safetensors(state, metadata=metadata))
        # Do not count later files: they are damaged, since the run resumed from before them.
        for old in [each for each in _files(self._folder) if each.name <= written.name][: -self._keep]:
            old.delete()


def newest_checkpoint(folder: Location, data_order: DataOrder) -> "tuple[int, dict[str, Tensor]] | None":
    """Load the newest complete checkpoint; return its number of steps and state on the CPU, or None if there is none.

    Damaged files are skipped if an older checkpoint can be read.

    Raises:
        CorruptFileError: there are checkpoints but none can be read; or the newest that can be read has another data
            order, or is of a version of readapt that ordered data in another way.
    """
    from safetensors.torch import load_file

    found = _newest(folder, data_order)
    if found is None:
        return None
    step, file = found
    with tempfile.TemporaryDirectory() as scratch:
        path = file.local_path if file.is_local else Path(scratch) / file.name
        if not file.is_local:
            path.write_bytes(file.read_bytes())
        return step, load_file(path)


def steps_done(folder: Location, data_order: DataOrder) -> int:
    """Return how many steps were done at the newest complete checkpoint, from its header; 0 if there is none.

    Raises:
        CorruptFileError: as `newest_checkpoint`.
    """
    found = _newest(folder, data_order)
    return found[0] if found else 0


def _newest(folder: Location, data_order: DataOrder) -> tuple[int, Location] | None:
    problems = []
    for file in reversed(_files(folder)):
        try:
            header = _header(file)
        except (KeyError, ValueError) as error:
            problems.append(f"{file}: {error}")
            continue
        for name, due in data_order.identity().items():
            if header.get(name, due) != due:
                raise CorruptFileError(
                    f"{file} is of another run: {name} is {header[name]} there and {due} now; "
                    f"remove {folder} to start from the beginning"
                )
        if header.get("order_version", 1) != _ORDER_VERSION:
            raise CorruptFileError(
                f"{file} was written by another version of readapt, in which the same seed gives another order of the data; "
                f"finish the run with that version, or remove {folder} to start from the beginning"
            )
        return header["step"], file
    if problems:
        raise CorruptFileError(
            "no checkpoint can be read: " + "; ".join(problems) + "; remove them to start from the beginning"
        )
    return None


def _files(folder: Location) -> list[Location]:
    """List the checkpoints, oldest first; ignore other files in the folder."""
    return [folder / name for name, _ in folder.listing(_SUFFIX) if _NAME.fullmatch(name)]


def _header(file: Location) -> dict[str, int]:
    """Read the header of a checkpoint, and check that the file is complete (8 bytes of length, JSON, tensors).

    Raises:
        KeyError, ValueError: the file is not a checkpoint, or was cut short.
    """
    num_bytes = file.size_bytes()
    with file.open_input() as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > num_bytes:
            raise ValueError("it is cut short, or no safetensors file")
        tensors = json.loads(stream.read(length))
    header = {name: json.loads(value) for name, value in tensors.pop("__metadata__").items()}
    due = 8 + length + max((each["data_offsets"][1] for each in tensors.values()), default=0)
    if num_bytes != due:
        raise ValueError(f"it has {num_bytes} bytes and should have {due}")
    return {**header, "step": int(header["step"])}
