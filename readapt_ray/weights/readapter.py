"""The equation of RE-AdaptIR, tensor by tensor and a slice of rows at a time.

    readapted = pretrained + readapter_scale * (retriever - pretrained) + knowledge_scale * (tuned - pretrained)

In: the weights before retrieval training, the retriever (full weights or an adapter) and knowledge
adapters. Out: float32 rows of every weight of the headless model; only who writes them casts. It
costs one read of each input, and memory for a slice: no dense difference is ever stored.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from readapt_ray.errors import InputError, ModelError, WeightMismatchError
from readapt_ray.weights.adapter import CONFIG_NAME, Adapter, Factors, listed
from readapt_ray.weights.checkpoint import Checkpoint, is_finite, natural_order

logger = logging.getLogger("readapt_ray")

_SLICE_ELEMENTS = 8 << 20
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# BERT-like models carry a pooler that no pooling here reads: where one side lacks it, the other's is kept.
_UNUSED_PREFIX = "pooler."


def readapted_weight(
    name: str,
    pretrained_OI: torch.Tensor,
    retriever_OI: torch.Tensor,
    knowledge_OI: torch.Tensor | None,
    *,
    readapter_scale: float,
    knowledge_scale: float,
) -> torch.Tensor:
    """Lay both adapters on one pretrained weight (RE-AdaptIR, section 2.2).

    A scale of 0 leaves its term out, and a readapter_scale of 1 begins at the retriever, so that
    (0, 0) is the pretrained weight and (1, 0) the retriever to the last bit.

    Args:
        name: tensor name; used only in the error.
        pretrained_OI: before any tuning. O = output rows, I = input columns (any further axes too).
        retriever_OI: the same weight in the published retriever.
        knowledge_OI: tuned minus pretrained, dense, float32; None where the adapter leaves it alone.
        readapter_scale: share of the retrieval skill kept; 1.0 keeps all.
        knowledge_scale: share of the new domain added; the paper uses 0.5.

    Returns:
        float32 [O, I]; only the writer casts, so bf16 rounds once.

    Raises:
        WeightMismatchError: the shapes differ.
    """
    shapes = [list(each.shape) for each in (pretrained_OI, retriever_OI, knowledge_OI) if each is not None]
    if any(shape != shapes[0] for shape in shapes):
        raise WeightMismatchError(f"{name!r} has the shapes {shapes}; all must be those of the pretrained model")
    start_OI = (retriever_OI if readapter_scale == 1 else pretrained_OI).float()
    change_OI = None
    if readapter_scale not in (0, 1):
        change_OI = (retriever_OI.float() - start_OI).mul_(readapter_scale)
    if knowledge_OI is not None and knowledge_scale != 0:
        term_OI = knowledge_OI * knowledge_scale
        change_OI = term_OI if change_OI is None else change_OI.add_(term_OI)
    return start_OI if change_OI is None else start_OI + change_OI


@dataclass(frozen=True)
class Scales:
    """How much of each difference is laid on; one knowledge scale for each knowledge adapter."""

    readapter: float
    knowledge: tuple[float, ...]

    def __post_init__(self) -> None:
        for scale in (self.readapter, *self.knowledge):
            if not math.isfinite(scale):
                raise InputError(f"the scale {scale} is not a finite number; give one such as 0.5")


@dataclass(frozen=True, kw_only=True)
class Ingredients:
    """All that one readapted tensor is made of."""

    name: str
    pretrained: torch.Tensor | None
    """None where only the retriever has the tensor (a pooler)."""
    retriever: torch.Tensor | None
    """None where the retriever is an adapter, or only the pretrained model has the tensor."""
    retriever_factors: Factors | None
    knowledge_factors: tuple[Factors | None, ...]

    def rows(self, scales: Scales, first_row: int = 0) -> torch.Tensor:
        """The readapted weight in float32; `first_row` says where these rows stand in the adapters' factors."""
        pretrained = self.retriever if self.pretrained is None else self.pretrained
        if pretrained is None:
            raise WeightMismatchError(f"{self.name!r} is in neither model")
        laid = list(zip(self.knowledge_factors, scales.knowledge, strict=True))
        readapter_scale = scales.readapter
        if self.retriever is None:
            # The retriever is an adapter: one more term on pretrained, and no difference of full weights.
            laid.insert(0, (self.retriever_factors, readapter_scale))
            readapter_scale = 0.0
        terms = [(factors, scale) for factors, scale in laid if factors is not None and scale != 0]
        knowledge = None
        for factors, scale in terms:
            term = factors.update(pretrained.float(), first_row).mul_(scale)
            knowledge = term if knowledge is None else knowledge.add_(term)
        retriever = pretrained if self.retriever is None else self.retriever
        return readapted_weight(
            self.name, pretrained, retriever, knowledge, readapter_scale=readapter_scale, knowledge_scale=1.0
        )


class Readapter:
    """Three models that fit each other, and every readapted tensor that can be made of them."""

    def __init__(
        self, pretrained: Checkpoint, retriever: Checkpoint | Adapter, knowledge: Sequence[Adapter] = ()
    ) -> None:
        """Check from the headers that all fit.

        Raises:
            WeightMismatchError: a tensor of another shape or without a partner; all of them are listed.
            ModelError: weights that are not floating-point (quantised).
        """
        self.pretrained = pretrained
        self.retriever = retriever
        self.knowledge = tuple(knowledge)
        checkpoints = [pretrained, *([retriever] if isinstance(retriever, Checkpoint) else [])]
        for checkpoint in checkpoints:
            _check_floating(checkpoint)
        self.carried = _check_partners(pretrained, retriever) if isinstance(retriever, Checkpoint) else ()
        """Tensors that only one side has and no vector depends on; they are kept as they are."""
        adapters = [*([retriever] if isinstance(retriever, Adapter) else []), *self.knowledge]
        self.dropped = tuple(
            [f"{each.name}: {head}" for each in checkpoints for head in each.heads]
            + [f"{each.name}: {module}" for each in adapters for module in each.dropped]
        )
        """Tensors of LM heads and classifiers, with the model that holds them."""
        if self.dropped:
            logger.info("language-model heads take no part in a vector and are left out: %s", ", ".join(self.dropped))

    def names(self) -> list[str]:
        """Every tensor of the readapted model."""
        return sorted({*self.pretrained.names(), *self.carried}, key=natural_order)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._leading(name).shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """The retriever's type of a tensor; where the retriever is an adapter, that of what it is laid on."""
        return self._leading(name).dtype(name)

    def slices(self, name: str) -> Iterator[tuple[int, int]]:
        """First and last row of each slice that is made at once; the same wherever the tensor is made."""
        shape = self.shape(name)
        num_rows = shape[0] if shape else 1
        step = max(1, _SLICE_ELEMENTS * num_rows // max(math.prod(shape), 1))
        for start in range(0, num_rows, step):
            yield start, min(start + step, num_rows)

    def rows(self, name: str, scales: Scales) -> Iterator[torch.Tensor]:
        """A readapted tensor as float32 slices of rows.

        Raises:
            ModelError: an input holds NaN or infinity; the tensor is named.
        """
        factors = self.factors(name)
        for start, stop in self.slices(name):
            yield Ingredients(
                name=name,
                pretrained=_read(self.pretrained, name, start, stop),
                retriever=_read(self.retriever, name, start, stop),
                retriever_factors=factors[0],
                knowledge_factors=factors[1:],
            ).rows(scales, start)

    def weight(self, name: str, scales: Scales) -> torch.Tensor:
        """A whole readapted tensor in float32."""
        return torch.cat(list(self.rows(name, scales))) if self.shape(name) else next(self.rows(name, scales))

    def walk(self, scales: Scales) -> Iterator[tuple[str, torch.Tensor]]:
        """Every readapted tensor by name, float32, one at a time."""
        for name in self.names():
            yield name, self.weight(name, scales)

    def factors(self, name: str) -> tuple[Factors | None, ...]:
        """What the retriever (where it is an adapter) and each knowledge adapter do to a weight."""
        adapters = (self.retriever if isinstance(self.retriever, Adapter) else None, *self.knowledge)
        return tuple(each.factors(name) if each is not None and name in each else None for each in adapters)

    def ingredients(self, name: str, device: torch.device) -> Ingredients:
        """All that a whole tensor is made of, on a device.

        Raises:
            ModelError: an input holds NaN or infinity; the tensor is named.
        """
        sources = [_read(source, name, 0, None) for source in (self.pretrained, self.retriever)]
        tensors = [None if each is None else each.to(device) for each in sources]
        factors = [None if each is None else each.to(device) for each in self.factors(name)]
        return Ingredients(
            name=name,
            pretrained=tensors[0],
            retriever=tensors[1],
            retriever_factors=factors[0],
            knowledge_factors=tuple(factors[1:]),
        )

    def _leading(self, name: str) -> Checkpoint:
        return self.retriever if isinstance(self.retriever, Checkpoint) and name in self.retriever else self.pretrained


def open_retriever(folder: Path, pretrained: Checkpoint, *, name: str | None = None) -> Checkpoint | Adapter:
    """A retriever as it is published: full weights, or an adapter laid on the pretrained model."""
    if (folder / CONFIG_NAME).is_file():
        return Adapter(folder, pretrained, name=name)
    return Checkpoint(folder, name=name)


def _read(source: Checkpoint | Adapter, name: str, start: int, stop: int | None) -> torch.Tensor | None:
    if isinstance(source, Adapter) or name not in source:
        return None
    tensor = source.read(name, start, stop)
    if not is_finite(tensor):
        raise ModelError(f"tensor {name!r} of {source.name!r} holds NaN or infinity; fetch or train that model again")
    return tensor


def _check_floating(checkpoint: Checkpoint) -> None:
    wrong = [
        f"{name}: {checkpoint.dtype(name)}" for name in checkpoint.names() if checkpoint.dtype(name) not in _FLOATS
    ]
    if wrong:
        raise ModelError(
            f"{checkpoint.name!r} is quantised ({listed(wrong)}); give its weights in float32, float16 or bfloat16"
        )


def _check_partners(pretrained: Checkpoint, retriever: Checkpoint) -> tuple[str, ...]:
    """The tensors that one side lacks and no vector depends on."""
    only_one = {*pretrained.names()} ^ {*retriever.names()}
    carried = {name for name in only_one if name.startswith(_UNUSED_PREFIX)}
    problems = [
        f"{name}: only in {(pretrained if name in pretrained else retriever).name!r}"
        for name in sorted(only_one - carried, key=natural_order)
    ]
    for name in pretrained.names():
        if name in retriever and pretrained.shape(name) != retriever.shape(name):
            problems.append(f"{name}: {list(pretrained.shape(name))} before, {list(retriever.shape(name))} after")
    if problems:
        raise WeightMismatchError(
            f"{retriever.name!r} was not made from {pretrained.name!r}: {listed(problems)}. Give as pretrained the very "
            f"model that the retriever was trained from (the base_model of its model card, with the same vocabulary)"
        )
    return tuple(sorted(carried))
