"""Multiply float32 queries by float16 vectors on tensor cores, with the precision of float32.

Each number of a query is written as the sum of two float16 numbers, so that two float16 products with float32 sums give
its scores. On an H100, float16 products have 15 times the rate of float32 ones (989 and 67 TFLOPS, NVIDIA's data
sheet), and the vectors need not be widened.
"""

import functools
import logging

import torch
from torch import Tensor

logger = logging.getLogger("readapt_ray")

_LOW_SCALE = 2.0**11
"""Factor of the low halves. Without it they are too small for float16 to keep their digits."""
_TOLERANCE = 1e-6
"""Largest error of a score, as a share of the product of the norms of query and vector."""


class HalfQueries:
    """Queries, split into two float16 matrices.

    Args:
        queries_QD: float32, on the device of the vectors.
    """

    def __init__(self, queries_QD: Tensor) -> None:
        largest_Q1 = queries_QD.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        exponents_Q1 = torch.frexp(largest_Q1).exponent
        self._factors_Q1 = torch.ldexp(torch.ones_like(largest_Q1), exponents_Q1)
        scaled_QD = torch.ldexp(queries_QD, -exponents_Q1)  # within (-1, 1); powers of two change no digit
        high_QD = scaled_QD.half()
        low_QD = ((scaled_QD - high_QD.float()) * _LOW_SCALE).half()
        self._halves_2QD = torch.cat([high_QD, low_QD])

    def scores(self, vectors_ND: Tensor) -> Tensor:
        """Return the inner products with float16 vectors, float32 [Q, N]. The vectors are read once for both halves.

        Args:
            vectors_ND: float16, on the device of the queries. On a CPU both are widened to float32.
        """
        high_QN, low_QN = _product(self._halves_2QD, vectors_ND).chunk(2)
        return high_QN.add_(low_QN, alpha=1 / _LOW_SCALE).mul_(self._factors_Q1)


def has_half_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether `HalfQueries` can be used: float16 vectors on a GPU, if a test product is precise enough."""
    return device.type == "cuda" and dtype == torch.float16 and _is_right(device)


@functools.cache
def _is_right(device: torch.device) -> bool:
    """Compare scores with float64 ones, once per process and device; log a warning if they differ."""
    random = torch.Generator().manual_seed(0)
    queries_QD, vectors_ND = (torch.randn(size, 256, generator=random) for size in (16, 128))
    vectors_ND = vectors_ND.half()
    wanted_QN = queries_QD.double() @ vectors_ND.double().T
    try:
        found_QN = HalfQueries(queries_QD.to(device)).scores(vectors_ND.to(device)).double().cpu()
    except (RuntimeError, TypeError) as error:
        reason = str(error).partition("\n")[0]
    else:
        norms_QN = queries_QD.double().norm(dim=1, keepdim=True) * vectors_ND.double().norm(dim=1)
        off = float(((found_QN - wanted_QN).abs() / norms_QN).max())
        if off < _TOLERANCE:
            return True
        reason = f"its scores are off by {off:.2g} of the norms"
    logger.warning("float16 vectors are widened to float32 for exact search on %s: %s", device, reason)
    return False


def _product(rows_QD: Tensor, vectors_ND: Tensor) -> Tensor:
    """Return float16 products with float32 sums, [Q, N]. A CPU has no such product, so it widens both."""
    if rows_QD.device.type == "cuda":
        return torch.mm(rows_QD, vectors_ND.T, out_dtype=torch.float32)
    return rows_QD.float() @ vectors_ND.float().T
