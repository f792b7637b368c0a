"""Shares of one worker without Ray, for tests of training."""

from collections.abc import Iterator

from readapt_ray.training import blocks
from readapt_ray.training.blocks import RowGroups
from readapt_ray.training.checkpoints import DataOrder
from readapt_ray.training.packing import Block
from readapt_ray.training.shares import BatchSettings, Share


def read_batches(row_groups: RowGroups, data_order: DataOrder, first_step: int = 0) -> Iterator[list[Block]]:
    """The blocks of all workers in every step from a first one on."""
    for piece in blocks.pieces(row_groups, data_order, first_step):
        yield from blocks.read_steps(row_groups, piece, data_order.batch_size)


def read_shares(
    row_groups: RowGroups, data_order: DataOrder, batch_settings: BatchSettings, first_step: int, *, of: tuple[int, int]
) -> Iterator[Share]:
    """The share of worker `of[0]` of `of[1]`, of every step from a first one on."""
    rank, num_workers = of
    for step, batch in enumerate(read_batches(row_groups, data_order, first_step), first_step):
        yield batch_settings.shares(batch, num_workers, step)[rank]
