from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from readapt_ray.errors import CorruptFileError
from readapt_ray.storage import Location
from readapt_ray.training import objectives, packing
from readapt_ray.training.blocks import BlockReader
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
    batch = packing.collate(blocks, pad_id=1)
    assert batch.position_ids.shape == (2, 16), "widths are rounded up"
    assert batch.position_ids[:, :5].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert batch.labels[:, :5].tolist() == [[6, 7, IGNORED, 9, IGNORED], [4, 4, 4, IGNORED, IGNORED]]
    assert batch.labels[:, 5:].eq(IGNORED).all()
    assert batch.attention_mask is not None
    assert batch.attention_mask[0, 0, 3].nonzero().flatten().tolist() == [3]


def test_passage_mode_gives_a_block_a_passage() -> None:
    blocks = list(packing.pack(passages(), mode="passage", block_tokens=64))
    assert [block.passage_numbers for block in blocks] == [(number,) for number in range(30)]
    assert packing.collate(blocks[:3], pad_id=1).attention_mask is None


def test_packing_loses_and_repeats_nothing() -> None:
    rows = passages(200)
    blocks = list(packing.pack(rows, mode="packed", block_tokens=40))
    assert max(len(block.input_ids) for block in blocks) <= 40
    assert np.concatenate([block.input_ids for block in blocks]).tolist() == [t for _, ids in rows for t in ids]
    assert [number for block in blocks for number in block.passage_numbers] == list(range(200))
    assert list(packing.pack([], mode="packed", block_tokens=40)) == []


def test_blocks_survive_parquet() -> None:
    blocks = list(packing.pack(passages(), mode="packed", block_tokens=40))
    again = packing.table_to_blocks(packing.blocks_to_table(blocks, 7))
    assert packing.blocks_to_table(blocks, 7)["block_id"].to_pylist() == list(range(7, 7 + len(blocks)))
    for one, other in zip(blocks, again, strict=True):
        assert one.input_ids.tolist() == other.input_ids.tolist()
        assert (one.passage_lengths, one.passage_numbers) == (other.passage_lengths, other.passage_numbers)


def test_micro_batches_hold_every_block_once_within_the_budget() -> None:
    blocks = list(packing.pack(passages(100), mode="passage", block_tokens=64))
    groups = packing.micro_batches(blocks, max_tokens=60)
    assert sorted(block.passage_numbers for group in groups for block in group) == [(n,) for n in range(100)]
    for group in groups:
        assert max(len(block.input_ids) for block in group) * len(group) <= 60
    alone = packing.micro_batches([Block(np.arange(100, dtype=np.int32), (100,), (0,))], max_tokens=60)
    assert len(alone) == 1


def test_text_is_wrapped_in_specials_and_cut(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(factories.tiny_decoder(tmp_path / "m"))
    whole, cut = packing.passage_ids(tokenizer, ["array shape", "array shape dtype axis " * 9], max_tokens=12)
    assert (whole[0], whole[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert len(cut) == 12
    assert cut[-1] != tokenizer.eos_token_id


def test_packed_and_passage_mode_give_the_same_loss_and_gradients(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(factories.tiny_decoder(tmp_path / "m"), dtype=torch.float32)
    rows = passages(12)
    found = {}
    for mode in ("passage", "packed"):
        model.zero_grad()
        blocks = list(packing.pack(rows, mode=mode, block_tokens=48))  # type: ignore[arg-type]
        loss = objectives.causal_lm_loss_sum(model, packing.collate(blocks, pad_id=1))
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found[mode] = (loss.item() / sum(block.num_labels for block in blocks), gradients)
    assert found["passage"][0] == pytest.approx(found["packed"][0], abs=1e-5)
    assert torch.allclose(found["passage"][1], found["packed"][1], atol=1e-3, rtol=1e-3)


def test_the_chunked_loss_equals_transformers_own(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        factories.tiny_decoder(tmp_path / "m", tie_word_embeddings=False), dtype=torch.float32
    )
    ids = torch.randint(2, 300, (3, 700))
    theirs = model(input_ids=ids, labels=ids).loss
    theirs.backward()
    expected = {name: tensor.grad.clone() for name, tensor in model.named_parameters()}
    model.zero_grad()
    blocks = [Block(row.numpy().astype(np.int32), (700,), (0,)) for row in ids]
    ours = objectives.causal_lm_loss_sum(model, packing.collate(blocks, pad_id=1)) / (3 * 699)
    ours.backward()  # type: ignore[no-untyped-call]
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)
    for name, tensor in model.named_parameters():
        assert torch.allclose(tensor.grad, expected[name], atol=1e-6), name


def write_blocks(folder: Path, num_files: int = 3) -> list[int]:
    """Files of one-passage blocks, numbered through; all passage numbers."""
    folder.mkdir(parents=True)
    first = 0
    for index in range(num_files):
        rows = [(first + n, [2, 3, 4]) for n in range(50 + 7 * index)]
        blocks = list(packing.pack(rows, mode="passage", block_tokens=8))
        pq.write_table(
            packing.blocks_to_table(blocks, index << 32), folder / f"part-{index:05d}.parquet", row_group_size=8
        )
        first += len(rows)
    return list(range(first))


def numbers(batches: list[list[Block]]) -> list[int]:
    return [number for batch in batches for block in batch for number in block.passage_numbers]


def test_every_block_comes_once_an_epoch_in_another_order_each(tmp_path: Path) -> None:
    everything = write_blocks(tmp_path / "b")
    reader = BlockReader(Location(str(tmp_path / "b")), batch_size=10, num_epochs=2, seed=3)
    batches = list(reader.steps(0))
    assert len(batches) == reader.num_steps == 2 * -(-len(everything) // 10)
    half = reader.steps_per_epoch
    first, second = numbers(batches[:half]), numbers(batches[half:])
    assert sorted(first) == sorted(second) == everything
    assert first != second
    assert first != everything
    again = BlockReader(Location(str(tmp_path / "b")), batch_size=10, num_epochs=2, seed=3)
    assert numbers(list(again.steps(0))) == first + second
    other = BlockReader(Location(str(tmp_path / "b")), batch_size=10, num_epochs=2, seed=4)
    assert numbers(list(other.steps(0))) != first + second


@pytest.mark.parametrize("first_step", [1, 7, 17, 18, 25, 36])
def test_starting_late_gives_the_same_rest(tmp_path: Path, first_step: int) -> None:
    write_blocks(tmp_path / "b")
    reader = BlockReader(Location(str(tmp_path / "b")), batch_size=10, num_epochs=2, seed=3)
    whole = list(reader.steps(0))
    assert numbers(list(reader.steps(first_step))) == numbers(whole[first_step:])


def test_a_truncated_blocks_file_is_named(tmp_path: Path) -> None:
    write_blocks(tmp_path / "b")
    file = tmp_path / "b" / "part-00001.parquet"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(CorruptFileError, match=r"part-00001\.parquet"):
        BlockReader(Location(str(tmp_path / "b")), batch_size=10, num_epochs=1, seed=0)
