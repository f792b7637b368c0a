"""Hold one retriever in memory and encode each text with its own domain's adapter factors.

In: a base model, and bundles that `readapt merge --factors` wrote for one retriever made from it. Out: pooled vectors
of batches in which each text has its own domain and scales; they equal the vectors of the merged models. Memory: the
retriever, and the factors of each domain. If the retriever has full weights instead of an adapter, also the pretrained
weight of each layer that a domain changes.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from readapt_ray.catalog.models import OpenModel
from readapt_ray.errors import ModelError, WeightMismatchError
from readapt_ray.nn.packed_linear import PackedLinear
from readapt_ray.weights.adapter import Adapter
from readapt_ray.weights.bundle import Bundle
from readapt_ray.weights.deltas import Factors
from readapt_ray.weights.domain_layers import Domain, DomainBatch, DomainLinear, DomainUse, LayerTerms
from readapt_ray.weights.loading import load_headless
from readapt_ray.weights.merging import Readapter, Scales
from readapt_ray.weights.reused_buffers import ScratchBuffers
from readapt_ray.weights.scale_options import LayerScale, factor_of
from readapt_ray.weights.weight_files import Checkpoint

Rows = Sequence[Sequence[int] | np.ndarray]

_PROBE: Rows = ([1, 2, 3], [3, 2, 1, 2, 3, 1, 2])


class DomainNetwork:
    """A retriever in memory whose linear layers can add the factors of domains.

    `module` is transformers' module without a head, with the retriever's weights (at the bundle's readapter_scale). Its
    layers are replaced when `load` loads a domain that changes them.

    Args:
        bundle: the bundle of any one domain; all domains must have been made with the same retriever.
        base: the base (pretrained) model of the bundle.
        dtype: type of the weights and of the computation.
        device: where the weights are: cpu, cuda, cuda:1.

    Raises:
        ModelError: the base or the bundle cannot be read, or holds NaN.
        WeightMismatchError: the bundle does not fit the base.
    """

    def __init__(self, bundle: Bundle, base: OpenModel, *, dtype: torch.dtype, device: str) -> None:
        self.base = Checkpoint(base.folder, name=base.name)
        self._readapter = bundle.readapter(self.base)
        self._scale = bundle.scales.readapter
        network: Any = load_headless(base.folder, base.name, self.base, dtype, config_folder=bundle.model.folder)
        _write_retriever(network, self._readapter, self._scale)
        self.module = network.eval().requires_grad_(False).to(device)
        self._batch = DomainBatch()
        self._layers: dict[str, DomainLinear] = {}

    def pooled(
        self, run: Callable[[Rows], Tensor], rows: Rows, uses: Sequence[DomainUse | None], *, is_packed: bool
    ) -> Tensor:
        """Return the vectors of texts, each encoded with its own domain, in the order of the texts.

        Call it from one thread at a time, since the layers read the domains from this object.

        Args:
            run: the forward pass through `module`; it takes token ids per text and returns a vector per text. It gets
                the texts sorted by domain and must keep that order.
            rows: the token ids of each text, at least one text.
            uses: the domain of each text, from `load`, with its scales; None for the retriever without a domain.
            is_packed: whether `run` concatenates the texts; otherwise it pads each to the longest.
        """
        kinds = {use: number for number, use in enumerate(dict.fromkeys(uses))}
        order = sorted(range(len(rows)), key=lambda place: kinds[uses[place]])
        tokens = dict.fromkeys(kinds, 0)
        longest = max(map(len, rows))
        for row, use in zip(rows, uses, strict=True):
            tokens[use] += len(row) if is_packed else longest
        self._batch.uses, self._batch.num_tokens = list(tokens), list(tokens.values())
        try:
            vectors = run([rows[place] for place in order])
        finally:
            self._batch.uses = self._batch.num_tokens = ()
        back = torch.empty(len(order), dtype=torch.long)
        back[order] = torch.arange(len(order))
        return vectors[back.to(vectors.device)]

    def load(
        self,
        name: str,
        adapters: Sequence[Adapter],
        encode: Callable[[Rows, Sequence[DomainUse | None]], object],
        layers: Sequence[LayerScale] = (),
    ) -> Iterator[Domain | None]:
        """Load the factors of a domain layer by layer, so that the caller can compute batches in between.

        If it fails or is closed before its end, the layers that no earlier domain changed are restored.

        Args:
            name: name of the domain.
            adapters: its knowledge adapters, bound to `base`.
            encode: encodes texts, given their token ids and domains, by `pooled`; it is called once at the end if the
                domain changes layers that no earlier domain changed, to test them.
            layers: factors of its scales in ranges of layers; other layers have 1.

        Yields:
            None after each layer, and the loaded domain at the end.

        Raises:
            ModelError: a factor is NaN or infinite, or a layer cannot be computed for each text separately.
        """
        names = sorted({weight for adapter in adapters for weight in adapter.names()})
        new = [weight for weight in names if weight not in self._layers]
        terms: dict[str, LayerTerms] = {}
        try:
            for weight in names:
                layer = self._layers.get(weight) or self._converted(weight)
                factors = [each.factors(weight) if weight in each else None for each in adapters]
                terms[weight] = layer.terms_of(factors, factor_of(layers, weight))
                _check_finite(terms[weight], weight, name)
                yield None
            domain = Domain(name=name, terms=terms, num_bytes=sum(each.num_bytes for each in terms.values()))
            if new:
                self._try(domain, encode, len(adapters))
        except BaseException:
            self._restore(new)
            raise
        yield domain

    def _try(
        self, domain: Domain, encode: Callable[[Rows, Sequence[DomainUse | None]], object], num_adapters: int
    ) -> None:
        """Encode two texts, and check that each layer of the domain was called with the tokens of all texts."""
        self._batch.called.clear()
        encode(_PROBE, [DomainUse(domain, (1.0,) * num_adapters), None])
        silent = [weight for weight in domain.terms if weight not in self._batch.called]
        if silent:
            raise ModelError(
                f"{type(self.module).__name__} multiplies {silent[0]} outside of its linear layer, so a domain cannot be added "
                f"to it; merge {domain.name!r} into a model"
            )

    def _converted(self, weight: str) -> DomainLinear:
        """Replace a linear layer by one that can add the factors of domains."""
        path = weight.removesuffix(".weight")
        try:
            linear = self.module.get_submodule(path)
        except AttributeError:
            linear = None
        if type(linear) not in (nn.Linear, PackedLinear):
            kind = "no module" if linear is None else type(linear).__name__
            raise ModelError(
                f"{weight} of {type(self.module).__name__} belongs to {kind}, and only linear layers take domains; merge "
                f"this domain into a model"
            )
        pretrained_OI = self.base.read(weight).float()
        retriever, is_enough = self._retriever_of(weight, pretrained_OI.shape)
        device = linear.weight.device
        layer = DomainLinear(
            linear,
            name=weight,
            batch=self._batch,
            pretrained_OI=None if is_enough else pretrained_OI.to(linear.weight),
            retriever=retriever and retriever.to(device),
            norm_squared_O=pretrained_OI.square().sum(1).to(device),
        )
        self.module.set_submodule(path, layer)
        self._layers[weight] = layer
        return layer

    def _retriever_of(self, weight: str, shape: Sequence[int]) -> tuple[Factors | None, bool]:
        """Return the LoRA factors that the retriever adds to a weight, if any; and whether P x can be computed from W x
        and them, so that the pretrained weight need not be held.
        """
        source = self._readapter.retriever
        if weight not in source or self._scale == 0:
            return None, True
        term = source.term(weight, 0, shape[0], ScratchBuffers(), "retriever")
        if (
            isinstance(term, Factors)
            and term.magnitude is None
            and 2 * len(term.A_rI) * sum(shape) < shape[0] * shape[1]
        ):
            scaled = Factors(A_rI=term.A_rI, B_Or=term.B_Or, scaling=self._scale * term.scaling)
            return scaled, True
        return None, False

    def _restore(self, weights: Sequence[str]) -> None:
        """Put back the original layers after a domain could not be loaded."""
        for weight in weights:
            layer = self._layers.pop(weight, None)
            if layer is not None:
                self.module.set_submodule(weight.removesuffix(".weight"), layer.replaced[0])


@torch.no_grad()
def _write_retriever(network: nn.Module, readapter: Readapter, scale: float) -> None:
    """Replace the base's weights by the retriever's."""
    parameters = dict(network.named_parameters())
    scales = Scales(scale, (0.0,) * len(readapter.knowledge))
    for name in readapter.names():
        if name not in readapter.retriever or (name.startswith("pooler.") and name not in parameters):
            continue
        if name not in parameters:
            raise WeightMismatchError(
                f"{readapter.retriever.name!r} changes {name!r}, which {type(network).__name__} lacks"
            )
        parameters[name].copy_(readapter.weight(name, scales))


def _check_finite(terms: LayerTerms, weight: str, name: str) -> None:
    tensors = [terms.A_RI, terms.B_OR] + ([] if terms.gains is None else [terms.gains])
    if not all(bool(each.isfinite().all()) for each in tensors):
        raise ModelError(f"the factors of {weight!r} in domain {name!r} give NaN or infinity; train that domain again")
