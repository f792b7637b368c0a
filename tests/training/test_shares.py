"""What each worker computes in a step, and how it travels."""

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch

from readapt_ray.training import packing
from readapt_ray.training.packing import IGNORED, Batch, Block, Masking
from readapt_ray.training.shares import BatchSettings, Share, shares_to_table, table_to_shares

MASKING = Masking(mask_id=1, vocab_size=1000, seed=3)


def blocks_of(num_passages: int) -> list[Block]:
    random = np.random.default_rng(0)
    rows = [(number, random.integers(2, 300, random.integers(3, 20)).tolist()) for number in range(num_passages)]
    return list(packing.pack(rows, mode="packed", block_tokens=40))


def targets(share: Share) -> list[int]:
    return [label for part, weight in share.parts if weight for label in part.labels[0].tolist() if label != IGNORED]


@pytest.mark.parametrize("masking", [None, MASKING])
@pytest.mark.parametrize("num_workers", [1, 2, 3, 7])
def test_workers_share_every_target_and_know_the_whole_step(num_workers: int, masking: Masking | None) -> None:
    blocks = blocks_of(60)
    batch_settings = BatchSettings(pad_id=0, micro_batch_tokens=64, masking=masking)
    (alone,) = batch_settings.shares(blocks, 1, step=5)
    shares = batch_settings.shares(blocks, num_workers, step=5)
    assert [share.worker_rank for share in shares] == list(range(num_workers))
    assert Counter(label for share in shares for label in targets(share)) == Counter(targets(alone))
    assert {len(share.parts) for share in shares} == {shares[0].num_parts}
    for share in shares:
        assert (share.num_labels, share.num_tokens) == (
            len(targets(alone)),
            sum(len(each.input_ids) for each in blocks),
        )
        assert (share.num_passages, list(share.first_passages)) == (60, list(range(20)))
        assert share.num_slots == sum(
            part.input_ids.shape[1] for each in shares for part, weight in each.parts if weight
        )


def test_a_worker_without_a_passage_repeats_one_at_no_weight() -> None:
    idle = BatchSettings(pad_id=0, micro_batch_tokens=64).shares(blocks_of(2), 3, step=0)[2]
    assert [weight for _, weight in idle.parts] == [0.0]
    assert idle.num_own == 0


@pytest.mark.parametrize("masking", [None, MASKING])
def test_shares_travel_whole(masking: Masking | None) -> None:
    batch_settings = BatchSettings(pad_id=0, micro_batch_tokens=64, masking=masking)
    sent = [batch_settings.shares(blocks_of(num), 3, step)[2] for step, num in enumerate((40, 2, 17))]
    for one, other in zip(sent, table_to_shares(shares_to_table(sent)), strict=True):
        told, heard = ({**vars(share), "rows": None, "first_passages": None} for share in (one, other))
        assert told == heard
        assert list(one.first_passages) == list(other.first_passages)
        for (ours, weight), (theirs, same) in zip(one.parts, other.parts, strict=True):
            assert weight == same
            assert_same(ours, theirs)


def assert_same(one: Batch, other: Batch) -> None:
    for name, value in vars(one).items():
        there = getattr(other, name)
        if isinstance(value, torch.Tensor):
            assert (value.dtype, value.shape) == (there.dtype, there.shape), name
            assert torch.equal(value, there), name
        else:
            assert value == there, name


def test_reading_loads_no_torch() -> None:
    """It would take every process of the data stream a second of a core and 200 MB."""
    code = "import sys, readapt_ray.cluster.block_stream; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
