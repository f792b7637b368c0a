"""Compute linear layers for batches in which each text may use another domain's adapters, with one copy of the weights.

In: a linear layer with the retriever's weight W, and each domain's adapter factors for it. Out: for tokens of a domain
with knowledge adapters k and their scales c_k (RE-AdaptIR, section 2.2)

    y = W x + sum_k c_k ((d_k - 1) * P x + d_k * s_k B_k A_k x) + bias

which equals the output of the merged weight. P x is the output of the pretrained weight. If the retriever is a LoRA
adapter R, P x is W x - R x, and R's factors are multiplied together with the domain's. Otherwise P x costs a second
dense product. Texts are sorted by domain, so that the tokens of a domain are one slice, in padded and packed batches.
GPUs multiply all slices in two launches (torch's grouped products; not measured on a GPU yet). CPUs multiply slices of
equal length together in bfloat16: 20 slices of 64 tokens take .4 to .6 of the time of 20 products. All else is
multiplied one by one: slices of unequal lengths, padded to one length, would take .6 to 1.0 of that time, and float32
would gain nothing.
"""

import functools
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from readapt_ray.errors import ModelError
from readapt_ray.nn.packed_linear import PackedLinear, PackedProduct
from readapt_ray.weights.deltas import Factors

logger = logging.getLogger("readapt_ray")

_ALIGNED = 8
"""Grouped products on GPUs need dimensions that are multiples of 16 bytes: 8 numbers in bfloat16."""
_TOLERANCE = 0.03
"""Largest accepted difference between grouped and separate products in bfloat16, as a share of the largest result."""


@dataclass(frozen=True, kw_only=True)
class LayerTerms:
    """The factors that one domain adds to one linear layer [O, I]. K is its number of adapters, R the sum of ranks."""

    A_RI: Tensor
    """The factors A of all adapters, one below the other."""
    B_OR: Tensor
    """The factors B of all adapters, side by side. Each is already multiplied by the adapter's scaling, by the layer's
    factor, and for DoRA by d."""
    ranks: tuple[int, ...]
    """Rank of each adapter; 0 if it does not change this layer."""
    gains: Tensor | None
    """d - 1 of each DoRA adapter, times the layer's factor, in float32 [K, O]; None if no adapter is DoRA."""

    @property
    def num_bytes(self) -> int:
        """Bytes of memory that the factors take."""
        tensors = [self.A_RI, self.B_OR] + ([] if self.gains is None else [self.gains])
        return sum(each.nbytes for each in tensors)


@dataclass(frozen=True, kw_only=True, eq=False)
class Domain:
    """One domain, with its adapter factors in memory."""

    name: str
    terms: Mapping[str, LayerTerms]
    """By the name of the weight that they change."""
    num_bytes: int
    """Bytes of memory that all these factors take."""


class DomainUse(NamedTuple):
    """The domain that a text is encoded for, with a scale per knowledge adapter, in the order of the adapters."""

    domain: Domain
    scales: tuple[float, ...]


class _Slice(NamedTuple):
    """Rows of tokens that one domain changes, with its terms and scales."""

    rows: slice
    terms: LayerTerms
    scales: tuple[float, ...]


@dataclass
class DomainBatch:
    """The domains of the batch that is being computed. All layers of a model share one object."""

    uses: Sequence[DomainUse | None] = ()
    """Domain of each slice of tokens; None for the retriever without a domain."""
    num_tokens: Sequence[int] = ()
    """Number of tokens in each slice, padding included."""
    called: set[str] = field(default_factory=set)
    """Names of the weights whose layers were called since it was last cleared."""


class DomainLinear(nn.Linear):
    """A linear layer that adds each domain's terms to the tokens of its texts.

    Args:
        linear: the layer that it replaces, with the retriever's weight.
        name: name of that weight.
        batch: says which domain each slice of tokens belongs to.
        pretrained_OI: the pretrained weight; None if it can be computed from `linear` and `retriever`.
        retriever: LoRA factors that the retriever adds to the pretrained weight; None if it has none for this weight.
        norm_squared_O: squared norm of each row of the pretrained weight, float32.
    """

    def __init__(
        self,
        linear: nn.Linear,
        *,
        name: str,
        batch: DomainBatch,
        pretrained_OI: Tensor | None,
        retriever: Factors | None,
        norm_squared_O: Tensor,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.name, self.batch = name, batch
        self.pretrained = None if pretrained_OI is None else nn.Parameter(pretrained_OI, requires_grad=False)
        self.retriever = retriever
        self.norm_squared_O = norm_squared_O
        self.replaced = (linear,)
        """In a tuple, so that torch does not register it as a submodule and list its weight a second time."""
        self._by_weight = linear.product if isinstance(linear, PackedLinear) else functional.linear
        self._by_pretrained = PackedProduct() if isinstance(linear, PackedLinear) else functional.linear

    def forward(self, input: Tensor) -> Tensor:  # the name is torch's
        """Multiply tokens [..., I] and return [..., O], with each domain's terms added to its tokens.

        The name of the weight is added to `batch.called`. If no domain of the batch changes this layer, it computes
        as the layer that it replaces.

        Raises:
            ModelError: a domain changes this layer, and the number of rows is not the number of tokens in the batch.
        """
        batch = self.batch
        batch.called.add(self.name)
        if not any(use is not None and self.name in use.domain.terms for use in batch.uses):
            return self._by_weight(input, self.weight, self.bias)
        x_NI = input.reshape(-1, self.in_features)
        if len(x_NI) != sum(batch.num_tokens):
            raise ModelError(
                f"{self.name} is multiplied with {len(x_NI):,} rows where the batch has {sum(batch.num_tokens):,} tokens, so "
                f"its output cannot be told apart by text; merge this domain into a model"
            )
        own = list(self._slices())
        has_gains = any(each.terms.gains is not None for each in own)
        out = _Output(
            y=self._by_weight(x_NI, self.weight),
            x=x_NI,
            pretrained=self._by_pretrained(x_NI, self.pretrained)
            if has_gains and self.pretrained is not None
            else None,
            retriever=self._retriever_terms(x_NI) if has_gains and self.pretrained is None else None,
        )
        y_NO = out.y
        _add_all(out, own)
        if self.bias is not None:
            y_NO += self.bias
        return y_NO.view(*input.shape[:-1], self.out_features)

    def _slices(self) -> Iterator["_Slice"]:
        """Yield the slices of the batch whose domain changes this layer."""
        start = 0
        for use, length in zip(self.batch.uses, self.batch.num_tokens, strict=True):
            if use is not None and any(use.scales) and (terms := use.domain.terms.get(self.name)) is not None:
                yield _Slice(slice(start, start + length), terms, use.scales)
            start += length

    def _retriever_terms(self, x_NI: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return A x and s B of the retriever's factors R = s B A; None if it has none."""
        if self.retriever is None:
            return None
        A_rI, B_Or = self.retriever.A_rI.to(x_NI.dtype), self.retriever.B_Or
        return x_NI @ A_rI.T, self.retriever.scaling * B_Or

    def terms_of(self, factors: Sequence[Factors | None], share: float = 1.0) -> LayerTerms:
        """Compute the terms that a domain adds to this layer.

        Args:
            factors: factors of each of its adapters for this weight; None for an adapter that does not change it. At
                least one must change it.
            share: factor of all its scales in this layer (`scale_options.factor_of`).
        """
        some = next(each for each in factors if each is not None)
        none = Factors(A_rI=some.A_rI[:0], B_Or=some.B_Or[:, :0])
        known = [(each or none).to(self.weight.device) for each in factors]
        directions = [None if each.magnitude is None else self._directions(each) for each in known]
        scaled = [
            each.B_Or * (each.scaling * share) * (1.0 if d_O is None else d_O.unsqueeze(1))
            for each, d_O in zip(known, directions, strict=True)
        ]
        gains = [torch.zeros_like(self.norm_squared_O) if d_O is None else (d_O - 1) * share for d_O in directions]
        return LayerTerms(
            A_RI=torch.cat([each.A_rI for each in known]).to(self.weight.dtype),
            B_OR=torch.cat(scaled, dim=1).to(self.weight.dtype),
            ranks=tuple(len(each.A_rI) for each in known),
            gains=None if all(d_O is None for d_O in directions) else torch.stack(gains),
        )

    def _directions(self, factors: Factors) -> Tensor:
        """Return DoRA's d = m / ||P + s B A|| in float32 [O], without storing a matrix of the weight's size (arXiv
        2603.22276).
        """
        A_rI, B_Or, scaling = factors.A_rI, factors.B_Or, factors.scaling
        products_rO = self._pretrained_of(A_rI)
        squared_O = (
            self.norm_squared_O
            + 2 * scaling * (products_rO.T * B_Or).sum(1)
            + scaling**2 * ((B_Or @ (A_rI @ A_rI.T)) * B_Or).sum(1)
        )
        norm_O = squared_O.clamp(min=0).sqrt()
        assert factors.magnitude is not None
        # A row of zeros has no direction to scale. It stays zero.
        return torch.where(norm_O == 0, torch.ones_like(norm_O), factors.magnitude.to(norm_O) / norm_O)

    def _pretrained_of(self, A_rI: Tensor) -> Tensor:
        """Return A P^T in float32 [r, O]."""
        if self.pretrained is not None:
            return A_rI @ self.pretrained.float().T
        product_rO = A_rI @ self.weight.float().T
        if self.retriever is not None:
            product_rO -= self.retriever.scaling * (A_rI @ self.retriever.A_rI.T) @ self.retriever.B_Or.T
        return product_rO


class _Output(NamedTuple):
    """The output of a layer that domains add their terms to, and what these terms are computed from."""

    y: Tensor
    """W x [N, O]."""
    x: Tensor
    """[N, I]."""
    pretrained: Tensor | None
    """P x [N, O]; None if it is not needed, or if it is computed from `retriever`."""
    retriever: tuple[Tensor, Tensor] | None
    """A x [N, r] and s B [O, r] of the retriever's factors."""


def _add_all(out: _Output, own: Sequence[_Slice]) -> None:
    """Add the terms of all domains, by the method that is fastest on this device."""
    y_NO = out.y
    is_aligned = not any(size % _ALIGNED for size in (y_NO.shape[1], out.x.shape[1]))
    if y_NO.dtype == torch.bfloat16 and is_aligned and _are_adjacent(own) and _has_grouped_products(y_NO.device):
        _add_grouped(out, own)
    elif y_NO.dtype == torch.bfloat16 and not y_NO.is_cuda and _are_alike(own):
        _add_together(out, own)
    else:
        for each in own:
            _add(out, each)


def _add(out: _Output, own: _Slice) -> None:
    """Add one domain's terms to its tokens.

    With g = sum_k c_k (d_k - 1), the DoRA term g * P x is g * W x - (g * s B) A x, with the retriever's update s B A.
    """
    rows, terms, scales = own
    y_NO, inner_NR, B_OR = out.y[rows], out.x[rows] @ terms.A_RI.T, terms.B_OR
    is_single = len(scales) == 1
    if not is_single:
        columns = [scale for scale, rank in zip(scales, terms.ranks, strict=True) for _ in range(rank)]
        inner_NR *= inner_NR.new_tensor(columns)
    factor = scales[0] if is_single else 1.0
    if terms.gains is not None:
        gain_O = terms.gains[0] if is_single else terms.gains.new_tensor(scales) @ terms.gains
        pretrained_NO = y_NO if out.pretrained is None else out.pretrained[rows]
        y_NO.addcmul_(pretrained_NO, (factor * gain_O).to(y_NO.dtype))  # 1 + g in bfloat16 would round g away
        if out.retriever is not None:
            retriever_Nr, B_Or = out.retriever
            less_Or = (B_Or * -gain_O.unsqueeze(1)).to(B_OR.dtype)
            inner_NR, B_OR = torch.cat([inner_NR, retriever_Nr[rows]], 1), torch.cat([B_OR, less_Or], 1)
    y_NO.addmm_(inner_NR, B_OR.T, alpha=factor)


def _are_alike(own: Sequence[_Slice]) -> bool:
    """Return whether the slices are adjacent, of one length, and with adapters of the same ranks."""
    shapes = {(each.rows.stop - each.rows.start, each.terms.ranks, each.terms.gains is None) for each in own}
    return len(shapes) == 1 and _are_adjacent(own)


def _are_adjacent(own: Sequence[_Slice]) -> bool:
    """Return whether there are several slices and they are adjacent."""
    return len(own) > 1 and all(one.rows.stop == other.rows.start for one, other in itertools.pairwise(own))


def _add_together(out: _Output, own: Sequence[_Slice]) -> None:
    """Do the same as `_add` for D slices of one length L, by batched products."""
    rows, terms = slice(own[0].rows.start, own[-1].rows.stop), [each.terms for each in own]

    def of_slices(whole: Tensor) -> Tensor:
        return whole[rows].view(len(own), -1, whole.shape[1])

    y_DLO, scales_DK = of_slices(out.y), torch.tensor([each.scales for each in own])
    inner_DLR = torch.bmm(of_slices(out.x), torch.stack([each.A_RI for each in terms]).transpose(1, 2))
    inner_DLR *= scales_DK.repeat_interleave(torch.tensor(terms[0].ranks), dim=1).unsqueeze(1)
    B_DOR = torch.stack([each.B_OR for each in terms])
    if terms[0].gains is not None:
        gain_DO = torch.bmm(
            scales_DK.unsqueeze(1), torch.stack([each.gains for each in terms if each.gains is not None])
        )[:, 0]
        pretrained_DLO = y_DLO if out.pretrained is None else of_slices(out.pretrained)
        y_DLO.addcmul_(pretrained_DLO, gain_DO.to(y_DLO.dtype).unsqueeze(1))
        if out.retriever is not None:
            retriever_Nr, B_Or = out.retriever
            less_DOr = gain_DO.unsqueeze(2) * -B_Or
            inner_DLR = torch.cat([inner_DLR, of_slices(retriever_Nr)], 2)
            B_DOR = torch.cat([B_DOR, less_DOr.to(B_DOR.dtype)], 2)
    y_DLO.baddbmm_(inner_DLR, B_DOR.transpose(1, 2))


def _add_grouped(out: _Output, own: Sequence[_Slice]) -> None:
    """Do the same as `_add` for slices of any lengths and ranks, by two grouped products.

    D is the number of slices, R the largest rank, rounded up to a multiple of 8.
    """
    rows, terms = slice(own[0].rows.start, own[-1].rows.stop), [each.terms for each in own]
    y_NO, x_NI = out.y[rows], out.x[rows]
    ends_D = torch.tensor([each.rows.stop - rows.start for each in own], dtype=torch.int32).to(y_NO.device)
    lengths_D = torch.tensor([each.rows.stop - each.rows.start for each in own]).to(y_NO.device)
    rank = _ALIGNED * -(-max(len(each.A_RI) for each in terms) // _ALIGNED)

    def of_tokens(by_domain: Tensor) -> Tensor:
        return by_domain.repeat_interleave(lengths_D, dim=0, output_size=len(x_NI))

    A_DRI = torch.stack([functional.pad(each.A_RI, (0, 0, 0, rank - len(each.A_RI))) for each in terms])
    B_DOR = torch.stack([functional.pad(each.B_OR, (0, rank - each.B_OR.shape[1])) for each in terms])
    scales_DR = torch.stack([functional.pad(_columns(each), (0, rank - len(each.terms.A_RI))) for each in own])
    inner_NR = functional.grouped_mm(x_NI, A_DRI.transpose(1, 2), offs=ends_D)
    inner_NR = inner_NR * of_tokens(scales_DR.to(inner_NR))
    if any(each.gains is not None for each in terms):
        gain_DO = torch.stack([_gain(each, out.y.shape[1]).to(y_NO.device) for each in own])
        pretrained_NO = y_NO if out.pretrained is None else out.pretrained[rows]
        y_NO.addcmul_(pretrained_NO, of_tokens(gain_DO.to(y_NO.dtype)))
        if out.retriever is not None:
            retriever_Nr, B_Or = out.retriever
            more = -B_Or.shape[1] % _ALIGNED
            less_DOr = functional.pad((gain_DO.unsqueeze(2) * -B_Or).to(B_DOR.dtype), (0, more))
            inner_NR = torch.cat([inner_NR, functional.pad(retriever_Nr[rows], (0, more))], 1)
            B_DOR = torch.cat([B_DOR, less_DOr], 2)
    y_NO += functional.grouped_mm(inner_NR, B_DOR.transpose(1, 2), offs=ends_D)


def _columns(own: _Slice) -> Tensor:
    """Return the scale of each column of a slice's B, float32 [R]."""
    return torch.tensor([scale for scale, rank in zip(own.scales, own.terms.ranks, strict=True) for _ in range(rank)])


def _gain(own: _Slice, num_outputs: int) -> Tensor:
    """Return sum_k c_k (d_k - 1) of a slice, float32 [O]."""
    gains = own.terms.gains
    return torch.zeros(num_outputs) if gains is None else gains.new_tensor(own.scales) @ gains


@functools.cache
def _has_grouped_products(device: torch.device) -> bool:
    """Return whether to use grouped products on a device: on GPUs, if a test there gives the right result."""
    return device.type == "cuda" and _grouped_are_right(device)


def _grouped_are_right(device: torch.device) -> bool:
    """Compare grouped products with separate ones on random data; log a warning if they differ or fail."""
    random = torch.Generator().manual_seed(0)

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(device, torch.bfloat16)

    one_terms = LayerTerms(A_RI=made(8, 64), B_OR=made(32, 8), ranks=(8,), gains=made(1, 32).float())
    other_terms = LayerTerms(A_RI=made(12, 64), B_OR=made(32, 12), ranks=(8, 4), gains=None)
    own = [_Slice(slice(0, 5), one_terms, (0.5,)), _Slice(slice(5, 16), other_terms, (1.0, 0.25))]
    y_NO, x_NI = made(16, 32), made(16, 64)
    one, grouped = (_Output(y_NO.clone(), x_NI, None, (made(16, 4), made(32, 4))) for _ in range(2))
    grouped = grouped._replace(retriever=one.retriever)
    for each in own:
        _add(one, each)
    try:
        _add_grouped(grouped, own)
    except (RuntimeError, TypeError) as error:
        reason = str(error).partition("\n")[0]
    else:
        off = float((grouped.y - one.y).abs().max() / one.y.abs().max())
        if off < _TOLERANCE:
            return True
        reason = f"they are off by {off:.2g}"
    logger.warning("domains are multiplied one after the other, without grouped products, on %s: %s", device, reason)
    return False
