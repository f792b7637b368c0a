"""Gather whole parameters that ZeRO-3 partitions over workers."""

import contextlib
from collections.abc import Iterator, Sequence

from torch import Tensor


def is_partitioned(parameter: Tensor) -> bool:
    """Return whether ZeRO-3 partitions a parameter, so that each worker holds only a part of it."""
    return hasattr(parameter, "ds_id")


@contextlib.contextmanager
def gathered(parameters: Sequence[Tensor], *, changed_by_rank: int | None = None) -> Iterator[None]:
    """Gather parameters during a `with` block if ZeRO-3 partitions them (then collective); else do nothing.

    Args:
        parameters: the parameters to gather.
        changed_by_rank: rank of the worker whose changes in the block are kept; None if none changes them.
    """
    partitioned = [each for each in parameters if is_partitioned(each)]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=changed_by_rank):
        yield
