"""The order of blocks, read in pieces, against the order drawn as a whole."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from readapt_ray.errors import CorruptFileError
from readapt_ray.seeds import random_generator
from readapt_ray.storage import Location
from readapt_ray.training import blocks, packing
from readapt_ray.training.blocks import RowGroups, list_row_groups
from readapt_ray.training.checkpoints import DataOrder
from readapt_ray.training.packing import Block
from tests.training.reading import read_batches

BLOCKS_PER_GROUP = 8


def write_blocks(folder: Path, num_files: int = 9) -> RowGroups:
    """Files of one-passage blocks, numbered through; the row groups are those of several pieces."""
    folder.mkdir(parents=True)
    first = 0
    for index in range(num_files):
        rows = [(first + n, [2, 3, 4]) for n in range(150 + 37 * index)]
        made = list(packing.pack(rows, mode="passage", block_tokens=8))
        file = folder / f"part-{index:05d}.parquet"
        pq.write_table(packing.blocks_to_table(made, index << 32), file, row_group_size=BLOCKS_PER_GROUP)
        first += len(rows)
    return list_row_groups(Location(str(folder)))


def order_of(row_groups: RowGroups, *, batch_size: int = 10, num_epochs: int = 2, seed: int = 3) -> DataOrder:
    return DataOrder(num_units=row_groups.num_blocks, batch_size=batch_size, num_epochs=num_epochs, seed=seed)


def numbers(batches: Iterable[list[Block]]) -> list[list[int]]:
    return [[number for block in batch for number in block.passage_numbers] for batch in batches]


def drawn_whole(row_groups: RowGroups, data_order: DataOrder) -> list[list[int]]:
    """The definition: row groups permuted, then the blocks of each 16 row groups, cut into steps epoch by epoch."""
    ends = np.cumsum(row_groups.group_lengths)
    found = []
    for epoch in range(data_order.num_epochs):
        random = random_generator(data_order.seed, "data order", epoch)
        groups = random.permutation(len(ends))
        order: list[int] = []
        for start in range(0, len(groups), 16):
            window = groups[start : start + 16]
            there = np.concatenate([np.arange(ends[g] - row_groups.group_lengths[g], ends[g]) for g in window])
            order += there[random.permutation(len(there))].tolist()
        size = data_order.batch_size
        found += [order[start : start + size] for start in range(0, len(order), size)]
    return found


@pytest.mark.parametrize("batch_size", [1, 10, 333, 5000])
def test_pieces_from_any_step_give_the_order_that_is_drawn_as_a_whole(tmp_path: Path, batch_size: int) -> None:
    row_groups = write_blocks(tmp_path / "b")
    data_order = order_of(row_groups, batch_size=batch_size)
    whole = drawn_whole(row_groups, data_order)
    assert len(whole) == data_order.num_steps
    per_epoch = data_order.steps_per_epoch
    for first_step in sorted({0, 1, 7, per_epoch - 1, per_epoch, per_epoch + 1, 2 * per_epoch - 1, 2 * per_epoch}):
        assert numbers(read_batches(row_groups, data_order, first_step)) == whole[first_step:], first_step


def test_every_block_comes_once_an_epoch_in_another_order_each(tmp_path: Path) -> None:
    row_groups = write_blocks(tmp_path / "b")
    data_order = order_of(row_groups)
    found = numbers(read_batches(row_groups, data_order))
    half = len(found) // 2
    first, second = ([number for batch in part for number in batch] for part in (found[:half], found[half:]))
    assert sorted(first) == sorted(second) == list(range(row_groups.num_blocks))
    assert first != second and first != sorted(first)
    assert numbers(read_batches(row_groups, data_order)) == found
    assert numbers(read_batches(row_groups, order_of(row_groups, seed=4))) != found


def test_an_epoch_reads_each_row_group_once_and_a_window_more_per_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row_groups = write_blocks(tmp_path / "b")
    data_order = order_of(row_groups, num_epochs=1)
    reads: Counter[int] = Counter()
    read = RowGroups.read
    monkeypatch.setattr(RowGroups, "read", lambda self, number: reads.update([int(number)]) or read(self, number))
    list(read_batches(row_groups, data_order))
    num_pieces = len(list(blocks.pieces(row_groups, data_order, 0)))
    num_groups = len(row_groups.group_lengths)
    assert num_pieces > 1
    assert set(reads) == set(range(num_groups))
    assert reads.total() <= num_groups + (num_pieces - 1) * blocks.WINDOW_ROW_GROUPS


def test_a_truncated_blocks_file_is_named(tmp_path: Path) -> None:
    write_blocks(tmp_path / "b", num_files=2)
    file = tmp_path / "b" / "part-00001.parquet"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(CorruptFileError, match=r"part-00001\.parquet"):
        list_row_groups(Location(str(tmp_path / "b")))
