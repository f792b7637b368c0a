"""Shuffle blocks into their training order, and read any part of this order by itself.

The order of an epoch depends only on (seed, epoch): row groups are permuted, then the blocks inside each window of 16
row groups. Step s of the epoch takes blocks [s * batch_size, (s + 1) * batch_size) of this order. So the number of
steps done says exactly which blocks were consumed, for any number of workers.

A window is read as a whole, since the smallest part of a Parquet file that can be read is a row group. The steps of an
epoch are divided into pieces of several windows. Reading all pieces reads every row group once, and at most one window
more per piece. The plan takes 8 bytes per row group (256 blocks), and the state of a random generator per piece.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq

from readapt_ray.errors import CorruptFileError
from readapt_ray.retrieval.footers import map_in_threads
from readapt_ray.seeds import random_generator
from readapt_ray.storage import Location
from readapt_ray.training.checkpoints import DataOrder
from readapt_ray.training.packing import Block, table_to_blocks

WINDOW_ROW_GROUPS = 16
_WINDOWS_PER_PIECE = 8
_MOST_PIECES = 4000


@dataclass(frozen=True)
class RowGroups:
    """The row groups of a folder of blocks, in the order of its files."""

    folder: Location
    names: tuple[str, ...]
    """Names of the files."""
    group_ends: np.ndarray
    """int64 [files]: number of row groups in each file and all files before it."""
    group_lengths: np.ndarray
    """int32 [row groups]: number of blocks in each row group."""

    @property
    def num_blocks(self) -> int:
        """Number of blocks in all row groups."""
        return int(self.group_lengths.sum(dtype=np.int64))

    def read(self, number: int) -> list[Block]:
        """Read the blocks of one row group, by its number from 0 over all files of the folder.

        Raises:
            CorruptFileError: its file cannot be read.
        """
        at = int(np.searchsorted(self.group_ends, number, side="right"))
        file = self.folder / self.names[at]
        try:
            with file.open_input() as stream:
                parquet = pq.ParquetFile(stream)
                return table_to_blocks(
                    parquet.read_row_group(int(number - self.group_ends[at]) + parquet.num_row_groups)
                )
        except (OSError, ValueError) as error:
            raise _unreadable(file, error) from error


def list_row_groups(folder: Location) -> RowGroups:
    """Read the footer of every blocks file in a folder, many at the same time.

    Raises:
        CorruptFileError: a file cannot be read.
    """
    names = tuple(name for name, _ in folder.listing(".parquet"))
    counts = map_in_threads(lambda name: _row_group_lengths(folder / name), names)
    return RowGroups(
        folder=folder,
        names=names,
        group_ends=np.cumsum([len(each) for each in counts], dtype=np.int64),
        group_lengths=np.concatenate([np.empty(0, np.int32), *counts]),
    )


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Consecutive steps of one epoch, with what is needed to read their blocks."""

    first_step: int
    """Number of the first step, counted from the beginning of the run."""
    num_steps: int
    groups: np.ndarray
    """int32: numbers of the row groups from the piece's first window on, in training order."""
    random: np.random.Generator
    """Generator that shuffles the windows, in its state before the piece's first window."""
    num_skipped: int
    """Number of blocks, from the start of the first window on, that belong to earlier steps."""
    num_blocks: int
    """Number of blocks that the steps take."""


def pieces(row_groups: RowGroups, data_order: DataOrder, first_step: int) -> Iterator[Piece]:
    """Divide all steps from `first_step` on into pieces, in order, some thousands at most; none if all steps are done.

    Steps count from 0 over all epochs. A piece never spans two epochs.

    The state of a random generator depends on all earlier draws. So the shuffle of each window is drawn here and thrown
    away, which takes 10 ns per block.
    """
    num_windows = -(-len(row_groups.group_lengths) // WINDOW_ROW_GROUPS) * data_order.num_epochs
    per_piece = max(_WINDOWS_PER_PIECE, -(-num_windows // _MOST_PIECES))
    first_epoch = first_step // max(1, data_order.steps_per_epoch)
    for epoch in range(first_epoch, data_order.num_epochs):
        yield from _epoch_pieces(row_groups, data_order, epoch, first_step, per_piece)


def _epoch_pieces(
    row_groups: RowGroups, data_order: DataOrder, epoch: int, first_step: int, per_piece: int
) -> Iterator[Piece]:
    random = random_generator(data_order.seed, "data order", epoch)
    groups_G = random.permutation(len(row_groups.group_lengths)).astype(np.int32)
    starts_W = np.arange(0, len(groups_G), WINDOW_ROW_GROUPS)
    lengths_W = np.add.reduceat(row_groups.group_lengths[groups_G], starts_W, dtype=np.int64)
    ends_W = np.cumsum(lengths_W)
    size, begin = data_order.batch_size, epoch * data_order.steps_per_epoch
    for window in range(0, len(starts_W), per_piece):
        last = min(window + per_piece, len(starts_W))
        before = copy.deepcopy(random)
        for length in lengths_W[window:last]:
            random.permutation(length)
        start, end = int(ends_W[window] - lengths_W[window]), int(ends_W[last - 1])
        # A step belongs to the piece of its first block.
        step, end_step = max(first_step - begin, -(-start // size)), -(-end // size)
        if step >= end_step:
            continue
        end = min(end_step * size, data_order.num_units)
        num_windows = int(np.searchsorted(ends_W, end)) + 1
        yield Piece(
            first_step=begin + step,
            num_steps=end_step - step,
            groups=groups_G[starts_W[window] : num_windows * WINDOW_ROW_GROUPS].copy(),
            random=before,
            num_skipped=step * size - start,
            num_blocks=end - step * size,
        )


def read_steps(row_groups: RowGroups, piece: Piece, batch_size: int) -> Iterator[list[Block]]:
    """Read the blocks of a piece; yield a list for all workers per step. The last list of an epoch may be shorter.

    Memory: one window and one batch.

    Args:
        row_groups: the row groups that the pieces were planned for.
        piece: from `pieces`; it is not changed, so it can be read again.
        batch_size: blocks per step over all workers, the same as in the plan.
    """
    batch: list[Block] = []
    num_left = piece.num_blocks
    for block in _shuffled(row_groups, piece):
        batch.append(block)
        num_left -= 1
        if len(batch) == batch_size or not num_left:
            yield batch
            batch = []
        if not num_left:
            return


def _shuffled(row_groups: RowGroups, piece: Piece) -> Iterator[Block]:
    """Yield the blocks from the piece's first one on. Windows that are skipped entirely are not read."""
    random = copy.deepcopy(piece.random)
    num_skipped = piece.num_skipped
    for start in range(0, len(piece.groups), WINDOW_ROW_GROUPS):
        window = piece.groups[start : start + WINDOW_ROW_GROUPS]
        order = random.permutation(row_groups.group_lengths[window].sum(dtype=np.int64))
        if num_skipped >= len(order):
            num_skipped -= len(order)
            continue
        blocks = [block for group in map_in_threads(row_groups.read, window) for block in group]
        yield from (blocks[index] for index in order[num_skipped:])
        num_skipped = 0


def _row_group_lengths(file: Location) -> np.ndarray:
    try:
        with file.open_input() as stream:
            metadata = pq.ParquetFile(stream).metadata
    except (OSError, ValueError) as error:
        raise _unreadable(file, error) from error
    return np.array([metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)], np.int32)


def _unreadable(file: Location, error: Exception) -> CorruptFileError:
    return CorruptFileError(f"{file} cannot be read: {error}; remove the blocks folder and run train again")
