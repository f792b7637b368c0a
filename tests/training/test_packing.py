import itertools
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from readapt_ray.training import packing
from readapt_ray.training.packing import IGNORED, Block
from tests import factories


def passages(num: int = 30, *, seed: int = 0) -> list[tuple[int, list[int]]]:
    random = np.random.default_rng(seed)
    return [(number, random.integers(2, 300, random.integers(2, 20)).tolist()) for number in range(num)]


def test_the_worked_example_of_the_module() -> None:
    rows = [(0, [5, 6, 7]), (1, [8, 9]), (2, [4, 4, 4, 4])]
    blocks = list(packing.pack(rows, mode="packed", block_tokens=6))
    assert [block.input_ids.tolist() for block in blocks] == [[5, 6, 7, 8, 9], [4, 4, 4, 4]]
    assert [block.passage_numbers for block in blocks] == [(0, 1), (2,)]
    batch = packing.collate([each for block in blocks for each in block.passages()], pad_id=1)
    assert batch.input_ids.shape == (1, 16), "lengths are rounded up"
    assert batch.input_ids[0, :10].tolist() == [5, 6, 7, 8, 9, 4, 4, 4, 4, 1]
    assert batch.position_ids[0, :9].tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3]
    assert batch.labels[0, :9].tolist() == [6, 7, IGNORED, 9, IGNORED, 4, 4, 4, IGNORED]
    assert batch.labels[0, 9:].eq(IGNORED).all()
    assert batch.label_places.tolist() == [0, 1, 3, 5, 6, 7]
    assert (batch.passage_ends.tolist(), batch.longest_passage) == ([0, 3, 5, 9, 16], 7)


def test_few_lengths_occur_and_little_is_padded() -> None:
    widths = [packing.padded_width(num_tokens) for num_tokens in range(1, 4097)]
    assert all(0 <= width - num_tokens < max(16, num_tokens / 16 + 1) for num_tokens, width in enumerate(widths, 1))
    assert len(set(widths[255:])) <= 4 * 16 + 1


def test_passage_mode_gives_a_block_a_passage() -> None:
    blocks = list(packing.pack(passages(), mode="passage", block_tokens=64))
    assert [block.passage_numbers for block in blocks] == [(number,) for number in range(30)]
    assert [each.passage_numbers for block in blocks for each in block.passages()] == [(n,) for n in range(30)]


def test_packing_loses_and_repeats_nothing() -> None:
    rows = passages(200)
    blocks = list(packing.pack(rows, mode="packed", block_tokens=40))
    assert max(len(block.input_ids) for block in blocks) <= 40
    assert np.concatenate([block.input_ids for block in blocks]).tolist() == [t for _, ids in rows for t in ids]
    assert [number for block in blocks for number in block.passage_numbers] == list(range(200))
    assert list(packing.pack([], mode="packed", block_tokens=40)) == []
    (full,) = packing.pack([(0, [1, 2, 3]), (1, [4, 5])], mode="packed", block_tokens=5)
    assert full.passage_lengths == (3, 2)


def test_blocks_survive_parquet() -> None:
    blocks = list(packing.pack(passages(), mode="packed", block_tokens=40))
    again = packing.table_to_blocks(packing.blocks_to_table(blocks, 7))
    assert packing.blocks_to_table(blocks, 7)["block_id"].to_pylist() == list(range(7, 7 + len(blocks)))
    for one, other in zip(blocks, again, strict=True):
        assert one.input_ids.tolist() == other.input_ids.tolist()
        assert (one.passage_lengths, one.passage_numbers) == (other.passage_lengths, other.passage_numbers)


def test_micro_batches_hold_every_passage_once_in_order_within_the_budget() -> None:
    blocks = list(packing.pack(passages(100), mode="passage", block_tokens=64))
    groups = packing.micro_batches(blocks, max_tokens=60)
    assert [block.passage_numbers for group in groups for block in group] == [(n,) for n in range(100)]
    totals = [sum(len(block.input_ids) for block in group) for group in groups]
    assert max(totals) <= 60 < min(map(sum, itertools.pairwise(totals)))
    alone = packing.micro_batches([Block(np.arange(100, dtype=np.int32), (100,), (0,))] * 2, max_tokens=60)
    assert [len(group) for group in alone] == [1, 1]


def test_text_is_wrapped_in_specials_and_cut(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(factories.tiny_decoder(tmp_path / "m"))
    texts = ["array shape", "array shape dtype axis " * 9]
    (whole, cut), losses = packing.passage_ids(tokenizer, texts, max_tokens=12)
    plain = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert losses == [0, len(plain[1]) + 2 - 12]
    assert packing.passage_ids(tokenizer, texts[:1], max_tokens=len(whole))[1] == [0]  # just as long as allowed
    assert (whole[0], whole[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert len(cut) == 12
    assert cut[-1] != tokenizer.eos_token_id
    assert packing.passage_ids(tokenizer, [], max_tokens=12) == ([], [])
