"""From passages to numbered token blocks, and from blocks to the tensors of a step.

Two modes. `passage`: a block is one passage, cut at the maximum length (RE-AdaptIR's own setting).
`packed`: passages are laid end to end up to the block length; none is split.

    passages   [5 6 7] [8 9] [4 4 4 4]         block length 6
    blocks     [5 6 7 8 9] [4 4 4 4]
    positions  [0 1 2 0 1] [0 1 2 3]           restart with every passage
    labels     [. 6 7 . 9] [. 4 4 4]           none on a passage's first token

In both, attention never leaves a passage, so both give the same loss for the same passages.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch

Mode = Literal["passage", "packed"]
IGNORED = -100
"""Label of a token that bears no loss."""
_WIDTH_STEP = 16
"""Batches are a multiple of this wide: a CPU's matrix library keeps a program for each shape that it has met, and with
a new width every step a worker grew by 20 MB a step."""

BLOCK_SCHEMA = pa.schema(
    [
        ("block_id", pa.int64()),
        ("input_ids", pa.list_(pa.int32())),
        ("passage_lengths", pa.list_(pa.int32())),
        ("passage_numbers", pa.list_(pa.int64())),
    ]
)


@dataclass(frozen=True)
class Block:
    """Tokens of one or more passages. `input_ids` is int32 [sum of passage_lengths]."""

    input_ids: np.ndarray
    passage_lengths: tuple[int, ...]
    passage_numbers: tuple[int, ...]

    @property
    def num_labels(self) -> int:
        """Tokens that bear loss: all but the first of each passage."""
        return len(self.input_ids) - len(self.passage_lengths)


def passage_ids(tokenizer: Any, texts: Sequence[str], *, max_tokens: int) -> list[list[int]]:
    """Token ids of whole passages: BOS where the tokenizer has one, the text, EOS where it was not cut.

    Args:
        tokenizer: a fast transformers tokenizer.
        texts: one text a passage.
        max_tokens: longest passage, specials included.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = tokenizer(list(texts), add_special_tokens=False, truncation=True, max_length=max_tokens, verbose=False)
    return [(bos + ids + eos)[:max_tokens] for ids in encoded["input_ids"]]


def pack(passages: Iterable[tuple[int, list[int]]], *, mode: Mode, block_tokens: int) -> Iterator[Block]:
    """Lay numbered passages into blocks, in order.

    Args:
        passages: pairs of passage number and token ids, none longer than `block_tokens`.
        mode: `passage` gives each its own block; `packed` fills blocks.
        block_tokens: longest block.
    """
    ids: list[int] = []
    lengths: list[int] = []
    numbers: list[int] = []
    for number, tokens in passages:
        if lengths and (mode == "passage" or len(ids) + len(tokens) > block_tokens):
            yield Block(np.asarray(ids, np.int32), tuple(lengths), tuple(numbers))
            ids, lengths, numbers = [], [], []
        ids = ids + tokens
        lengths.append(len(tokens))
        numbers.append(number)
    if lengths:
        yield Block(np.asarray(ids, np.int32), tuple(lengths), tuple(numbers))


def blocks_to_table(blocks: Sequence[Block], first_block_id: int) -> pa.Table:
    """Blocks as a table of BLOCK_SCHEMA, numbered from `first_block_id`."""
    return pa.table(
        {
            "block_id": pa.array(range(first_block_id, first_block_id + len(blocks)), pa.int64()),
            "input_ids": pa.array([block.input_ids for block in blocks], pa.list_(pa.int32())),
            "passage_lengths": pa.array([block.passage_lengths for block in blocks], pa.list_(pa.int32())),
            "passage_numbers": pa.array([block.passage_numbers for block in blocks], pa.list_(pa.int64())),
        },
        schema=BLOCK_SCHEMA,
    )


def table_to_blocks(table: pa.Table) -> list[Block]:
    """The inverse of `blocks_to_table`."""
    columns = [table.column(name).combine_chunks() for name in ("input_ids", "passage_lengths", "passage_numbers")]
    rows = zip(*columns, strict=True)
    return [
        Block(ids.values.to_numpy(), tuple(lengths.as_py()), tuple(numbers.as_py())) for ids, lengths, numbers in rows
    ]


@dataclass(frozen=True)
class Batch:
    """The tensors of one forward pass, on the CPU. B blocks, T tokens in the longest."""

    input_ids: torch.Tensor
    """int64 [B, T]"""
    position_ids: torch.Tensor
    """int64 [B, T]"""
    labels: torch.Tensor
    """int64 [B, T]: the next token of the same passage, or IGNORED."""
    attention_mask: torch.Tensor | None
    """bool [B, 1, T, T], true where a query sees a key; None where plain causal attention is right."""

    def to(self, device: str | torch.device) -> "Batch":
        """The same on another device."""
        mask = None if self.attention_mask is None else self.attention_mask.to(device)
        return Batch(self.input_ids.to(device), self.position_ids.to(device), self.labels.to(device), mask)


def collate(blocks: Sequence[Block], *, pad_id: int) -> Batch:
    """Blocks side by side, padded on the right to the longest, rounded up to a multiple of 16 tokens.

    Where every block holds one passage, causal attention cannot reach the padding from a real token
    and no mask is needed. `labels[b, t]` is the token that position t has to predict.
    """
    longest = max(len(block.input_ids) for block in blocks)
    shape = (len(blocks), -(-longest // _WIDTH_STEP) * _WIDTH_STEP)
    input_ids = np.full(shape, pad_id, np.int64)
    position_ids = np.zeros(shape, np.int64)
    labels = np.full(shape, IGNORED, np.int64)
    passage_of = np.full(shape, -1, np.int64)
    for row, block in enumerate(blocks):
        start = 0
        input_ids[row, : len(block.input_ids)] = block.input_ids
        for index, length in enumerate(block.passage_lengths):
            end = start + length
            position_ids[row, start:end] = np.arange(length)
            labels[row, start : end - 1] = block.input_ids[start + 1 : end]
            passage_of[row, start:end] = index
            start = end
    mask = None
    if any(len(block.passage_lengths) > 1 for block in blocks):
        of = torch.from_numpy(passage_of)
        mask = (of[:, :, None] == of[:, None, :]).tril_().unsqueeze(1)
    return Batch(torch.from_numpy(input_ids), torch.from_numpy(position_ids), torch.from_numpy(labels), mask)


def micro_batches(blocks: Sequence[Block], *, max_tokens: int) -> list[list[Block]]:
    """Split blocks into groups of at most `max_tokens` padded tokens, alike in length, so that little is padded."""
    groups: list[list[Block]] = []
    longest = 0
    for block in sorted(blocks, key=lambda each: len(each.input_ids), reverse=True):
        if not groups or longest * (len(groups[-1]) + 1) > max_tokens:
            groups.append([])
            longest = len(block.input_ids)
        groups[-1].append(block)
    return groups
