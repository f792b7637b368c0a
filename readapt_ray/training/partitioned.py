"""Gather whole parameters where ZeRO-3 partitions them over workers."""

import contextlib
from collections.abc import Iterator, Sequence

from torch import Tensor


def is_partitioned(parameter: Tensor) -> bool:
    """Return whether ZeRO-3 holds a part of the parameter on each worker."""
    return hasattr(parameter, "ds_id")


@contextlib.contextmanager
def gathered(parameters: Sequence[Tensor], *, changed_by_rank: int | None = None) -> Iterator[None]:
    """Make parameters whole inside the block, if ZeRO-3 partitions them.

    Args:
        changed_by_rank: the worker whose changes all others take over.
    """
    partitioned = [each for each in parameters if is_partitioned(each)]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=changed_by_rank):
        yield
