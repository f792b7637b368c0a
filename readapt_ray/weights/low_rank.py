"""Store the difference between two models in a small file: a truncated SVD of each weight (LoRE), or the difference
itself.

In: the pretrained model and a model made from it. Out: a safetensors file with two entries for each weight W that
changed, `W.lore_B` [O, r] and `W.lore_A` [r, I], so that `tuned - pretrained` is about B A. Vectors, and matrices whose
factors would take more than half the space, are stored whole as `W.difference` in float32. Weights that did not change
have no entry. Memory: matrices that are being decomposed take at most three times the largest in float32, for any
number of cores. The process was measured to grow by 120 MB where this limit is 50 MB (2048 x 2048).

LoRE-Adapt (arXiv 2405.15007, section 3.2) truncates each layer at the same explained variance.
"""

import functools
import json
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from readapt_ray import artifact_files
from readapt_ray.errors import ModelError, WeightMismatchError
from readapt_ray.hardware import num_cores
from readapt_ray.storage import Location
from readapt_ray.weights.adapter import Adapter
from readapt_ray.weights.deltas import Difference, Factors
from readapt_ray.weights.ordered_map import Budget, ordered_map
from readapt_ray.weights.reused_buffers import ScratchBuffers
from readapt_ray.weights.weight_files import Checkpoint, file_header, is_finite, read_header

FACTOR_DTYPE = torch.bfloat16
"""Type of stored factors. The reported variance includes its rounding error, which is small beside the truncation's."""

_A, _B, _WHOLE = ".lore_A", ".lore_B", ".difference"
_EXACT_SIDE = 512
_FIRST_SKETCH = 64
_POWER_ITERATIONS = 2
_LARGEST_SKETCH = 0.4
"""Largest sketch, as a share of the short side. A larger one would exceed the memory limit and hardly save space."""
_TRUSTED_SHARE = 0.75
"""Share of a sketch's directions that must hold the wanted variance; the rest is oversampling."""
_ROWS = 256
_COST = 2.75
"""Most memory that one decomposition holds, as a multiple of its matrix in float32."""


@dataclass(frozen=True, kw_only=True)
class FactorRecord:
    """A record of how the difference of one weight is stored."""

    name: str
    shape: tuple[int, ...]
    rank: int | None
    """Columns of B; 0 if the weight did not change; None if the whole difference is stored."""
    variance: float
    """Share of the squared difference that is stored, 0 to 1."""

    def entries(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Return name, type and shape of each tensor that the file holds for this weight.

        These are B and A, or the whole difference, or nothing if the weight did not change.
        """
        if self.rank is None:
            return [(self.name + _WHOLE, torch.float32, self.shape)]
        if self.rank == 0:
            return []
        return [
            (self.name + _B, FACTOR_DTYPE, (self.shape[0], self.rank)),
            (self.name + _A, FACTOR_DTYPE, (self.rank, self.shape[1])),
        ]


class StoredDifference:
    """A file of differences that `write_difference` made, read as the change from the pretrained model."""

    def __init__(
        self, path: Path, base: Checkpoint, *, name: str, dtypes: dict[str, torch.dtype] | None = None
    ) -> None:
        """Read the header of the file and check that it fits the base model.

        Args:
            path: the safetensors file.
            base: the pretrained model that the differences are added to.
            name: what the user calls it; used in errors.
            dtypes: types in which the retriever or tuned model stores its weights, by weight name; a merge writes them.
                None takes the types of the base.

        Raises:
            WeightMismatchError: the base lacks a weight of the file or has it in another shape.
            ModelError: the file does not hold differences.
        """
        self.name = name
        self.dtypes = dtypes or {}
        self.heads: tuple[str, ...] = ()
        self._stored = read_header(path)
        self._kinds: dict[str, str] = {}
        problems = []
        for entry, stored in self._stored.items():
            suffix = next((each for each in (_A, _B, _WHOLE) if entry.endswith(each)), None)
            if suffix is None:
                raise ModelError(
                    f"{path} holds {entry!r}, which is not a stored difference; make it again with merge --factors"
                )
            weight = entry.removesuffix(suffix)
            self._kinds[weight] = suffix
            due = base.shape(weight) if weight in base else ()
            axis = {_A: slice(1, 2), _B: slice(0, 1), _WHOLE: slice(None)}[suffix]
            if weight not in base or stored.shape[axis] != due[axis]:
                problems.append(f"{weight}: {list(stored.shape)} in {entry}, {list(due) or 'no such weight'}")
        if problems:
            raise WeightMismatchError(f"{name!r} was not made from {base.name!r}: {'; '.join(problems[:10])}")
        self.factors = functools.lru_cache(maxsize=2)(self._read_factors)
        """Return the factors of a weight that is stored as factors, in float32."""

    def __contains__(self, name: str) -> bool:
        return name in self._kinds

    def term(self, name: str, start: int, stop: int, scratch: ScratchBuffers, role: str) -> Difference | Factors:
        """Return the change of one weight: its low-rank factors if the file has them, else rows of the full difference.

        Args:
            name: name of the weight; it must be in this file.
            start: first row of the difference. Factors are always of the whole weight.
            stop: the row after the last one.
            scratch: gives the buffer for the rows.
            role: name of that buffer. The rows are valid until the same role is requested again.
        """
        if self._kinds[name] == _WHOLE:
            return Difference(rows=self._stored[name + _WHOLE].read(start, stop, scratch, role))
        return self.factors(name)

    def _read_factors(self, name: str) -> Factors:
        A_rI, B_Or = (self._stored[name + suffix].read().float() for suffix in (_A, _B))
        if not (is_finite(A_rI) and is_finite(B_Or)):
            raise ModelError(f"the factors of {name!r} in {self.name!r} hold NaN or infinity; make them again")
        return Factors(A_rI=A_rI, B_Or=B_Or)


DeltaSource = Checkpoint | Adapter | StoredDifference
"""The forms in which a retriever or tuned model can be given: full weights, an adapter, or stored differences."""


def check_shapes(pretrained: Checkpoint, tuned: DeltaSource) -> None:
    """Refuse a tuned model whose vocabulary grew or shrank, since new words have no difference to store.

    Only full weights are checked: adapters and stored differences were compared with the base when they were opened.

    Raises:
        WeightMismatchError: a tensor has another shape than in the pretrained model.
    """
    if not isinstance(tuned, Checkpoint):
        return
    for name in pretrained.names():
        if name in tuned and tuned.shape(name) != pretrained.shape(name):
            raise WeightMismatchError(
                f"{name!r} is {list(pretrained.shape(name))} in {pretrained.name!r} and {list(tuned.shape(name))} in "
                f"{tuned.name!r}: factors hold no new words; merge without --low-rank and --factors"
            )


def write_difference(
    pretrained: Checkpoint,
    tuned: DeltaSource,
    target: Location,
    *,
    variance: float | None,
    report: Callable[[int], None],
) -> list[FactorRecord]:
    """Write `tuned - pretrained` of all weights into one file; a killed call resumes when it is called again.

    If the file and its record exist, nothing is computed or compared: the record is read and returned.

    Args:
        pretrained: the weights before tuning.
        tuned: the model made from them; `check_shapes` must have accepted it. Weights that it lacks are left out.
        target: the file. A record of how each weight is stored is written beside it (its name with .json), and until
            the file is complete also a folder of the finished factors (its name with .parts).
        variance: least share of the squared difference that the factors of a matrix must hold; None stores it whole.
            Vectors, and matrices whose factors would save no space, are always stored whole.
        report: called with the number of weight elements done so far in this file.

    Returns:
        A record per weight of how it is stored, and with which share of the difference, in the order of the weights.

    Raises:
        ModelError: an input holds NaN or infinity; the error names the tensor.
    """
    record = Location(f"{target.uri}.json")
    if target.is_file() and record.is_file():
        return [FactorRecord(**{**each, "shape": tuple(each["shape"])}) for each in json.loads(record.read_text())]
    parts = Location(f"{target.uri}.parts")
    names = [name for name in pretrained.names() if name in tuned]
    largest = max(4 * math.prod(pretrained.shape(name)) for name in names)
    budget = Budget(3 * largest)

    def decompose(name: str) -> FactorRecord:
        with budget.use(round(_COST * 4 * math.prod(pretrained.shape(name)))):
            return _finished(parts, name) or _decomposed(pretrained, tuned, name, variance, parts)

    stored, done = [], 0
    for each in ordered_map(decompose, names, num_threads=num_cores()):
        stored.append(each)
        done += math.prod(each.shape)
        report(done)
    record.write_text(json.dumps([asdict(each) for each in stored], indent=1) + "\n")
    with target.open_output() as stream:
        stream.write(file_header(entry for each in stored for entry in each.entries()))
        for each in stored:
            if each.rank is None:
                for rows in _difference(pretrained, tuned, each.name):
                    stream.write(rows.reshape(-1).view(torch.uint8).numpy().data)
            elif each.rank:
                stream.write((parts / f"{each.name}.factors").read_bytes())
    artifact_files.clear(parts, [f"{name}.{suffix}" for name in names for suffix in ("factors", "json")])
    parts.remove_if_empty()
    return stored


def _finished(parts: Location, name: str) -> FactorRecord | None:
    record = parts / f"{name}.json"
    if not record.is_file():
        return None
    values = json.loads(record.read_text())
    return FactorRecord(**{**values, "shape": tuple(values["shape"])})


def _decomposed(
    pretrained: Checkpoint, tuned: DeltaSource, name: str, variance: float | None, parts: Location
) -> FactorRecord:
    """Decompose one weight; write its factors, then its record."""
    shape = pretrained.shape(name)
    changed = False
    for rows in _difference(pretrained, tuned, name):  # no early exit: find NaN in any row before hours are spent
        changed = bool(rows.any()) or changed
    if not changed:
        stored = FactorRecord(name=name, shape=shape, rank=0, variance=1.0)
    elif variance is None or len(shape) != 2:
        stored = FactorRecord(name=name, shape=shape, rank=None, variance=1.0)
    else:
        difference_OI, first = torch.empty(shape), 0
        for rows in _difference(pretrained, tuned, name):
            difference_OI[first : first + len(rows)] = rows
            first += len(rows)
        found = truncated_svd(difference_OI, variance, seed=zlib.crc32(name.encode()))
        if found is None:
            stored = FactorRecord(name=name, shape=shape, rank=None, variance=1.0)
        else:
            B_Or, A_rI, reached = found
            content = b"".join(each.view(torch.uint8).numpy().tobytes() for each in (B_Or, A_rI))
            (parts / f"{name}.factors").write_bytes(content)
            stored = FactorRecord(name=name, shape=shape, rank=A_rI.shape[0], variance=reached)
    (parts / f"{name}.json").write_text(json.dumps(asdict(stored)))
    return stored


def _difference(pretrained: Checkpoint, tuned: DeltaSource, name: str) -> Iterator[torch.Tensor]:
    """Yield `tuned - pretrained` of one weight in float32, some rows at a time."""
    shape = pretrained.shape(name)
    num_rows = shape[0] if shape else 1
    for start in range(0, num_rows, _ROWS):
        scratch = ScratchBuffers()
        stop = min(start + _ROWS, num_rows)
        weight = pretrained.read(name, start, stop).float()
        difference = torch.zeros_like(weight)
        tuned.term(name, start, stop, scratch, "tuned").add_to(difference, weight, 1.0, start, scratch)
        if not is_finite(difference):
            holder = tuned if is_finite(weight) else pretrained
            raise ModelError(
                f"tensor {name!r} of {holder.name!r} holds NaN or infinity; fetch or train that model again"
            )
        yield difference


def truncated_svd(
    difference_OI: torch.Tensor, variance: float, *, seed: int
) -> tuple[torch.Tensor, torch.Tensor, float] | None:
    """Compute factors B and A, of the lowest rank found, whose product holds a given share of a squared difference D.

    Matrices whose short side is at most 512 are decomposed exactly. Larger ones are decomposed in a random sketch,
    which is doubled until it holds enough (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1).

    Args:
        difference_OI: D, float32 [O, I], not all zero.
        variance: the share to hold, above 0, at most 1.
        seed: seed of the random sketch.

    Returns:
        B [O, r] and A [r, I] in `FACTOR_DTYPE`, and the share that they hold, 1 - ||D - B A||^2 / ||D||^2. None if the
        factors would take more than half the space of D, or hold too little at the highest rank that was tried.
    """
    num_rows, num_columns = difference_OI.shape
    side = min(num_rows, num_columns)
    if side <= _EXACT_SIDE:
        return _truncated(difference_OI, *_exact(difference_OI), variance)
    total = _squared(difference_OI)
    generator = torch.Generator().manual_seed(seed)
    size, largest = _FIRST_SKETCH, int(_LARGEST_SKETCH * side)
    while True:
        size = min(size, largest)
        Q_OS = _range(difference_OI, size, generator)
        S_SI = Q_OS.T @ difference_OI
        squares_S, turn_SS = torch.linalg.eigh((S_SI @ S_SI.T).double())
        squares_S, turn_SS = squares_S.flip(0), turn_SS.flip(1).float()
        if squares_S[: int(_TRUSTED_SHARE * size)].sum() >= variance * total:
            B_OS, A_SI = Q_OS @ turn_SS, turn_SS.T @ S_SI
            del Q_OS, S_SI
            return _truncated(difference_OI, B_OS, A_SI, squares_S, variance)
        if size == largest:
            return None
        size *= 2


def _squared(matrix: torch.Tensor) -> float:
    """Return the squared norm of a matrix; computed by groups of rows, without a second matrix in memory."""
    total = 0.0
    for start in range(0, len(matrix), _ROWS):
        total += float(matrix[start : start + _ROWS].square().sum(dtype=torch.float64))
    return total


def _exact(difference_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return B, A and all squared singular values, from the eigenvectors of the short side's Gram matrix."""
    num_rows, num_columns = difference_OI.shape
    tall = num_rows >= num_columns
    short_LS = difference_OI if tall else difference_OI.T
    squared_SS = torch.zeros(short_LS.shape[1], short_LS.shape[1], dtype=torch.float64)
    for start in range(0, len(short_LS), _ROWS):
        rows = short_LS[start : start + _ROWS].double()
        squared_SS.addmm_(rows.T, rows)
    squares_S, turn_SS = torch.linalg.eigh(squared_SS)
    squares_S, turn_SS = squares_S.flip(0), turn_SS.flip(1).float()
    if tall:
        return difference_OI @ turn_SS, turn_SS.T, squares_S
    return turn_SS, turn_SS.T @ difference_OI, squares_S


def _range(difference_OI: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """Return an orthonormal basis [O, size] that approximates the first `size` left singular vectors."""
    sketch_IS = torch.randn(difference_OI.shape[1], size, generator=generator)
    basis_OS: torch.Tensor = torch.linalg.qr(difference_OI @ sketch_IS).Q
    del sketch_IS
    for _ in range(_POWER_ITERATIONS):
        back_IS = torch.linalg.qr(difference_OI.T @ basis_OS).Q
        basis_OS = torch.linalg.qr(difference_OI @ back_IS).Q
    return basis_OS


def _truncated(
    difference_OI: torch.Tensor,
    B_OS: torch.Tensor,
    A_SI: torch.Tensor,
    squares_S: torch.Tensor,
    variance: float,
) -> tuple[torch.Tensor, torch.Tensor, float] | None:
    """Return the fewest leading directions that hold the variance after rounding; None if they save no space."""
    num_rows, num_columns = difference_OI.shape
    most = num_rows * num_columns // (num_rows + num_columns)  # then bfloat16 factors take half the float32 difference
    total = _squared(difference_OI)
    rank = 1 + int((squares_S.cumsum(0) < variance * total * (1 - 1e-9)).sum())
    while rank <= min(most, len(squares_S)):
        B_Or = B_OS[:, :rank].to(FACTOR_DTYPE).contiguous()
        A_rI = A_SI[:rank].to(FACTOR_DTYPE).contiguous()
        left = 0.0
        for start in range(0, len(difference_OI), _ROWS):
            rows = slice(start, start + _ROWS)
            error = difference_OI[rows] - B_Or[rows].float() @ A_rI.float()
            left += float(error.square_().sum(dtype=torch.float64))
        reached = 1 - left / total
        if reached >= variance:
            return B_Or, A_rI, reached
        rank += 1
    return None
