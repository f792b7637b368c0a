"""Merge models by the equation of RE-AdaptIR, tensor by tensor and a slice of rows at a time.

    readapted = pretrained + readapter_scale * (retriever - pretrained) + knowledge_scale * (tuned - pretrained)

In: the weights before retrieval training, the retriever (full weights, an adapter or stored
differences) and any number of knowledge adapters or tuned models. Out: float32 rows of every weight
of the model without its head; only the code that writes them casts. It costs one read of each input,
and memory for a slice of each, since no dense difference is stored.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from readapt_ray.errors import InputError, ModelError, WeightMismatchError
from readapt_ray.model_file_names import ADAPTER_CONFIG_NAME
from readapt_ray.progress import amount
from readapt_ray.weights.adapter import Adapter
from readapt_ray.weights.deltas import Factors, Term, Whole
from readapt_ray.weights.low_rank import DeltaSource, StoredDifference
from readapt_ray.weights.partners import check_embeddings, check_floating, check_partners
from readapt_ray.weights.reused_buffers import ScratchBuffers
from readapt_ray.weights.scale_options import LayerScale, factor_of
from readapt_ray.weights.weight_files import Checkpoint, is_finite, natural_order

logger = logging.getLogger("readapt_ray")

# 1 MiB in float32, so that a slice of each input stays in a core's cache from one sum to the next.
_SLICE_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class Scales:
    """The scales of a merge: how much of each weight change it adds."""

    readapter: float
    knowledge: tuple[float, ...]
    layers: tuple[LayerScale, ...] = ()
    """Factors that multiply the knowledge scales in ranges of layers."""

    def __post_init__(self) -> None:
        for scale in (self.readapter, *self.knowledge):
            if not math.isfinite(scale):
                raise InputError(f"the scale {scale} is not a finite number; give one such as 0.5")

    def of(self, name: str) -> tuple[float, ...]:
        """Return the scales for one tensor: the readapter's, then each knowledge adapter's times the layer's factor."""
        factor = factor_of(self.layers, name)
        return (self.readapter, *(each * factor for each in self.knowledge))


def one_per_adapter(knowledge_scale: float | Sequence[float], num_adapters: int) -> tuple[float, ...]:
    """Return one knowledge scale per adapter; a single number, or a sequence of one, is used for all of them.

    Raises:
        InputError: there is neither one scale nor one per adapter.
    """
    given = tuple(knowledge_scale) if isinstance(knowledge_scale, Sequence) else (knowledge_scale,)
    if len(given) == 1:
        return given * num_adapters
    if len(given) != num_adapters:
        raise InputError(
            f"{amount(len(given), 'knowledge scales')} for {amount(num_adapters, 'adapters')}; give one for all, or one each"
        )
    return given


@dataclass(frozen=True, kw_only=True)
class TensorRows:
    """Rows of one readapted tensor in float32. The next call with the same scratch buffers overwrites them."""

    readapted: torch.Tensor
    pretrained: torch.Tensor
    """The same rows before any tuning."""
    retrieval: torch.Tensor
    """The same rows with a knowledge scale of 0; `readapted` itself if no knowledge was added."""


@dataclass(frozen=True, kw_only=True)
class TensorTerms:
    """The pretrained rows of one tensor, and the changes that a merge adds to them."""

    name: str
    pretrained_rows: torch.Tensor
    """The pretrained rows, or the retriever's if only the retriever has them (a pooler, new words)."""
    terms: tuple[Term | None, ...]
    """The change by the retriever, then by each knowledge adapter; None if it does not change the tensor."""

    def rows(self, scales: Scales, first_row: int = 0, scratch: ScratchBuffers | None = None) -> TensorRows:
        """Add the scaled changes to the pretrained rows in float32 (RE-AdaptIR, section 2.2).

        A term with scale 0 is left out. With a readapter_scale of 1 and a retriever of full weights, the sum starts at
        the retriever's rows. So scales (0, 0) give the pretrained weight bit for bit, and (1, 0) the weight of such a
        retriever.

        Args:
            scales: how much of each change is added.
            first_row: index of the first of these rows in the whole tensor.
            scratch: buffers for the result; None makes new tensors.

        Raises:
            WeightMismatchError: the shapes differ.
        """
        scratch = scratch or ScratchBuffers()
        retriever, *knowledge = zip(self.terms, scales.of(self.name), strict=True)
        for term, _ in (retriever, *knowledge):
            if term is not None and not isinstance(term, Factors) and term.rows.shape != self.pretrained_rows.shape:
                shapes = list(self.pretrained_rows.shape), list(term.rows.shape)
                raise WeightMismatchError(f"{self.name!r} has the shapes {shapes[0]} and {shapes[1]}, not one")
        pretrained = scratch.float32("pretrained", self.pretrained_rows)
        if isinstance(retriever[0], Whole) and retriever[1] == 1:
            total = scratch.float32("total", retriever[0].rows)
        else:
            total = scratch.float32("total", self.pretrained_rows)
            _add(retriever, total, pretrained, first_row, scratch)
        active = [each for each in knowledge if each[0] is not None and each[1] != 0]
        retrieval = scratch.float32("retrieval", total) if active else total
        for each in active:
            _add(each, total, pretrained, first_row, scratch)
        return TensorRows(readapted=total, pretrained=pretrained, retrieval=retrieval)

    def rows_between(self, start: int, stop: int) -> "TensorTerms":
        """Return the terms of rows `start` to `stop` (exclusive); `self` must hold the whole tensor.

        Factors stay those of the whole weight, so give `start` to `rows` as `first_row`. A scalar is returned whole.
        """
        if not self.pretrained_rows.ndim:
            return self
        terms = tuple(
            each if each is None or isinstance(each, Factors) else replace(each, rows=each.rows[start:stop])
            for each in self.terms
        )
        return TensorTerms(name=self.name, pretrained_rows=self.pretrained_rows[start:stop], terms=terms)

    def with_unchanged(self, rows: torch.Tensor) -> "TensorTerms":
        """Return these terms with more rows appended, which no scale changes (new vocabulary).

        Args:
            rows: the rows that only the retriever has. Terms that are factors do not cover them.
        """
        terms: list[Term | None] = []
        for each in self.terms:
            if each is None or isinstance(each, Factors):
                terms.append(each)
            else:
                more = rows if isinstance(each, Whole) else torch.zeros_like(rows)
                terms.append(replace(each, rows=torch.cat([each.rows, more])))
        return TensorTerms(name=self.name, pretrained_rows=torch.cat([self.pretrained_rows, rows]), terms=tuple(terms))


def _add(
    scaled: tuple[Term | None, float],
    total: torch.Tensor,
    weight: torch.Tensor,
    first_row: int,
    scratch: ScratchBuffers,
) -> None:
    term, scale = scaled
    if term is not None and scale != 0:
        term.add_to(total, weight, scale, first_row, scratch)


class Readapter:
    """A pretrained model, a retriever and knowledge that fit each other; computes the readapted tensors from them."""

    def __init__(
        self,
        pretrained: Checkpoint,
        retriever: DeltaSource,
        knowledge: Sequence[DeltaSource] = (),
        *,
        accept_vocabulary: bool = False,
    ) -> None:
        """Check that the models fit each other; only headers are read.

        Args:
            pretrained: the weights before any tuning.
            retriever: full weights, an adapter, or stored differences from `pretrained`.
            knowledge: the model or adapter tuned on each corpus, in the same forms.
            accept_vocabulary: accept a retriever with more or fewer words. Rows that only the retriever has are kept as
                they are; rows that it lacks are dropped.

        Raises:
            WeightMismatchError: tensors have other shapes or are missing in one model; the error lists them.
            ModelError: weights are not floating-point (quantised), or word embeddings are missing.
        """
        self.pretrained = pretrained
        self.retriever = retriever
        self.knowledge = tuple(knowledge)
        checkpoints = [each for each in (pretrained, retriever, *self.knowledge) if isinstance(each, Checkpoint)]
        for checkpoint in checkpoints:
            check_floating(checkpoint)
            check_embeddings(checkpoint)
        self.carried: tuple[str, ...] = ()
        """Tensors that only one of pretrained model and retriever has. No vector depends on them; they are kept."""
        if isinstance(retriever, Checkpoint):
            self.carried = check_partners(pretrained, retriever, accept_vocabulary=accept_vocabulary, may_pad=True)
        for each in self.knowledge:
            if isinstance(each, Checkpoint):
                check_partners(pretrained, each, accept_vocabulary=False)
        self.dropped = tuple(f"{each.name}: {head}" for each in self._inputs() for head in each.heads)
        """Tensors of LM heads and classifiers, with the model that holds them."""
        if self.dropped:
            logger.info("language-model heads take no part in a vector and are left out: %s", ", ".join(self.dropped))

    def _inputs(self) -> tuple[DeltaSource, ...]:
        return (self.pretrained, self.retriever, *self.knowledge)

    def names(self) -> list[str]:
        """List the names of all tensors of the readapted model, without LM head, in layer order."""
        return sorted({*self.pretrained.names(), *self.carried}, key=natural_order)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a readapted tensor; word embeddings have the rows of a retriever with full weights."""
        return self._checkpoint_of(name).shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Return the type that the retriever stores a tensor in; for an adapter, the type of the pretrained weight.

        A merge may write another type.
        """
        if isinstance(self.retriever, StoredDifference) and name in self.retriever.dtypes:
            return self.retriever.dtypes[name]
        return self._checkpoint_of(name).dtype(name)

    def slices(self, name: str, num_elements: int | None = None) -> Iterator[tuple[int, int]]:
        """Yield first row and end (exclusive) of each slice of a tensor; the same slices for any number of workers.

        Args:
            name: the tensor.
            num_elements: largest number of elements in a slice, which has at least one row; None takes what fits a
                core's cache.
        """
        shape = self.shape(name)
        num_rows = shape[0] if shape else 1
        step = max(1, (num_elements or _SLICE_ELEMENTS) * num_rows // max(math.prod(shape), 1))
        # Words that only the retriever has get slices of their own, since they have no pretrained rows to subtract.
        shared = min(num_rows, self._shared_rows(name))
        for first, last in ((0, shared), (shared, num_rows)):
            for start in range(first, last, step):
                yield start, min(start + step, last)

    def rows(
        self, name: str, start: int, stop: int, scales: Scales, scratch: ScratchBuffers | None = None
    ) -> TensorRows:
        """Compute rows `start` to `stop` (exclusive) of a readapted tensor; they must be one of `slices`.

        Args:
            name: the tensor.
            start: first row.
            stop: the row after the last one.
            scales: how much of each change is added.
            scratch: buffers of this thread, which hold the result; None makes new tensors.

        Raises:
            ModelError: an input holds NaN or infinity; the error names the tensor.
        """
        scratch = scratch or ScratchBuffers()
        tensor_terms = self._terms_of_rows(name, start, stop, scratch)
        rows = tensor_terms.rows(scales, start, scratch)
        # NaN and infinity survive every sum. So if all inputs enter the sum and it is finite, the inputs are finite.
        all_entered = _all_enter(tensor_terms, scales)
        if not all_entered or not is_finite(rows.readapted):
            self._check_finite(tensor_terms)
        return rows

    def weight(self, name: str, scales: Scales) -> torch.Tensor:
        """Compute a whole readapted tensor in float32; raise ModelError if an input holds NaN or infinity."""
        parts = [self.rows(name, start, stop, scales).readapted for start, stop in self.slices(name)]
        return torch.cat(parts) if self.shape(name) else parts[0]

    def walk(self, scales: Scales) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the name and the float32 values of each readapted tensor, one at a time, in the order of `names`."""
        for name in self.names():
            yield name, self.weight(name, scales)

    def tensor_terms(self, name: str, device: torch.device) -> TensorTerms:
        """Read the pretrained rows and all changes of a whole tensor onto a device, unscaled, in the types on disk.

        Raises:
            ModelError: an input holds NaN or infinity; the error names the tensor.
        """
        num_rows = self.shape(name)[0] if self.shape(name) else 1
        shared = min(num_rows, self._shared_rows(name))
        whole = self._terms_of_rows(name, 0, shared or num_rows, ScratchBuffers())
        self._check_finite(whole)
        if 0 < shared < num_rows:
            alone = self._terms_of_rows(name, shared, num_rows, ScratchBuffers())
            self._check_finite(alone)
            whole = whole.with_unchanged(alone.pretrained_rows)
        terms = tuple(
            each.to(device) if isinstance(each, Factors) else each and replace(each, rows=each.rows.to(device))
            for each in whole.terms
        )
        return TensorTerms(name=name, pretrained_rows=whole.pretrained_rows.to(device), terms=terms)

    def _terms_of_rows(self, name: str, start: int, stop: int, scratch: ScratchBuffers) -> TensorTerms:
        """Read the terms of rows, which must be entirely inside or entirely outside the pretrained vocabulary."""
        sources = (self.retriever, *self.knowledge)
        if start >= self._shared_rows(name):
            alone = self._checkpoint_of(name).read(name, start, stop, scratch, "start")
            return TensorTerms(name=name, pretrained_rows=alone, terms=(None,) * len(sources))
        terms = tuple(
            source.term(name, start, stop, scratch, f"term {number}") if name in source else None
            for number, source in enumerate(sources)
        )
        return TensorTerms(
            name=name, pretrained_rows=self.pretrained.read(name, start, stop, scratch, "start"), terms=terms
        )

    def _check_finite(self, tensor_terms: TensorTerms) -> None:
        tensors = [tensor_terms.pretrained_rows]
        tensors += [each.rows for each in tensor_terms.terms if each is not None and not isinstance(each, Factors)]
        holders = [self.pretrained if tensor_terms.name in self.pretrained else self.retriever]
        holders += [
            source
            for source, each in zip((self.retriever, *self.knowledge), tensor_terms.terms, strict=True)
            if each is not None and not isinstance(each, Factors)
        ]
        for tensor, holder in zip(tensors, holders, strict=True):
            if not is_finite(tensor):
                raise ModelError(
                    f"tensor {tensor_terms.name!r} of {holder.name!r} holds NaN or infinity; fetch or train that model again"
                )

    def _shared_rows(self, name: str) -> int:
        """Return the number of rows of a tensor in the pretrained model; 0 if it lacks the tensor."""
        if name not in self.pretrained:
            return 0
        shape = self.pretrained.shape(name)
        return shape[0] if shape else 1

    def _checkpoint_of(self, name: str) -> Checkpoint:
        return self.retriever if isinstance(self.retriever, Checkpoint) and name in self.retriever else self.pretrained


def _all_enter(tensor_terms: TensorTerms, scales: Scales) -> bool:
    """Return whether every input contributes to the sum."""
    scaled = list(zip(tensor_terms.terms, scales.of(tensor_terms.name), strict=True))
    if any(term is not None and scale == 0 for term, scale in scaled):
        return False
    begins_at_retriever = isinstance(tensor_terms.terms[0], Whole) and scales.readapter == 1
    return not begins_at_retriever or any(term is not None and term.reads_weight for term in tensor_terms.terms[1:])


def open_retriever(folder: Path, pretrained: Checkpoint, *, name: str | None = None) -> Checkpoint | Adapter:
    """Open the weights of a published retriever or tuned model; only headers are read.

    Args:
        folder: a local folder. It is an adapter if it holds adapter_config.json, else full weights.
        pretrained: the model that an adapter is applied to; full weights are not compared with it.
        name: what the user calls the model; used in errors. None uses the folder.

    Raises:
        ModelError: the folder holds no safetensors, or an adapter of another kind.
        WeightMismatchError: the adapter does not fit `pretrained`.
    """
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        return Adapter(folder, pretrained, name=name)
    return Checkpoint(folder, name=name)
