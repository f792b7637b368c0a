"""Change the scales of a merge in a model in memory, without loading it again.

In: a loaded model without a head, and the inputs of the merge. Out: the same model with the merged weights.
Memory, on the model's device: one copy of the pretrained weights, of the retriever's weights (or its factors)
and of the adapters' factors. Setting the scales costs a pass over the weights that change.
"""

import threading
from collections.abc import Sequence

import torch

from readapt_ray.errors import WeightMismatchError
from readapt_ray.hardware import num_cores
from readapt_ray.weights.adapter import listed
from readapt_ray.weights.merging import Readapter, Scales, TensorTerms, one_per_adapter
from readapt_ray.weights.ordered_map import ordered_map
from readapt_ray.weights.reused_buffers import ScratchBuffers
from readapt_ray.weights.scale_options import LayerScale

_DEVICE_SLICE_ELEMENTS = 1 << 24
_NUM_WAITING = 8


class LiveReadapter:
    """A module in memory whose weights can be merged again with other scales."""

    def __init__(self, module: torch.nn.Module, readapter: Readapter, *, layers: tuple[LayerScale, ...] = ()) -> None:
        """Read every input of the merge onto the module's device.

        Args:
            module: a model of the same architecture, from `load_model`. Only `set_scales` changes its weights.
            readapter: the models that are merged.
            layers: factors that multiply the knowledge scales in ranges of layers.

        Raises:
            WeightMismatchError: the module has other tensors than the merge; the error lists them.
            ModelError: an input holds NaN or infinity.
        """
        self._readapter, self._layers = readapter, layers
        self._parameters = dict(module.named_parameters())
        _check_module(self._parameters, readapter)
        self._tensor_terms: dict[str, TensorTerms] = {
            name: readapter.tensor_terms(name, self._parameters[name].device)
            for name in readapter.names()
            if name in self._parameters
        }
        self._written: Scales | None = None
        self._of_thread = _OfThread()

    def set_scales(self, readapter_scale: float, knowledge_scale: float | Sequence[float]) -> None:
        """Write the merged weights for these scales into the module; a merge in its type writes the same weights.

        Args:
            readapter_scale: share of the retrieval skill that is kept.
            knowledge_scale: share of the new domain that is added; one number for all knowledge adapters, or one each.

        Raises:
            InputError: a scale is not finite, or there is neither one knowledge scale nor one per adapter. No weight
                is changed then.
        """
        knowledge = one_per_adapter(knowledge_scale, len(self._readapter.knowledge))
        scales = Scales(readapter_scale, knowledge, self._layers)
        before, self._written = self._written, None
        changed = [
            name
            for name, tensor_terms in self._tensor_terms.items()
            if before is None or _changes(tensor_terms, before, scales)
        ]
        slices = (
            (name, start, stop)
            for name in changed
            for start, stop in self._readapter.slices(name, _slice_elements(self._parameters[name].device))
        )
        on_cpu = all(parameter.device.type == "cpu" for parameter in self._parameters.values())

        @torch.no_grad()  # torch keeps this setting per thread
        def write(each: tuple[str, int, int]) -> None:
            name, start, stop = each
            scratch = self._of_thread.scratch
            rows = self._tensor_terms[name].rows_between(start, stop).rows(scales, start, scratch)
            parameter = self._parameters[name]
            (parameter[start:stop] if parameter.ndim else parameter).copy_(rows.readapted)

        if on_cpu:
            for _ in ordered_map(write, slices, num_threads=num_cores(), num_waiting=_NUM_WAITING):
                pass
        else:
            for each in slices:
                write(each)
        self._written = scales


class _OfThread(threading.local):
    """Scratch buffers of one thread."""

    def __init__(self) -> None:
        self.scratch = ScratchBuffers()


def _changes(tensor_terms: TensorTerms, before: Scales, now: Scales) -> bool:
    old, new = (scales.of(tensor_terms.name) for scales in (before, now))
    return any(term is not None and one != other for term, one, other in zip(tensor_terms.terms, old, new, strict=True))


def _slice_elements(device: torch.device) -> int | None:
    """Return the elements per slice: many for an accelerator; None for a CPU, which takes slices that fit its cache."""
    return None if device.type == "cpu" else _DEVICE_SLICE_ELEMENTS


def _check_module(parameters: dict[str, torch.nn.Parameter], readapter: Readapter) -> None:
    problems = []
    for name in sorted({*parameters, *readapter.names()}):
        if name.startswith("pooler."):
            continue
        if name not in parameters:
            problems.append(f"{name}: not in the live model")
        elif name not in readapter.names():
            problems.append(f"{name}: only in the live model")
        elif tuple(parameters[name].shape) != readapter.shape(name):
            problems.append(f"{name}: {list(parameters[name].shape)} live, {list(readapter.shape(name))} on disk")
    if problems:
        raise WeightMismatchError(
            f"the live model is not of the kind of {readapter.pretrained.name!r}: {listed(problems)}; "
            f"load it from the retriever that the scales are set for"
        )
