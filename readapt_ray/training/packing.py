"""Make numbered token blocks of passages, and the tensors of a step of blocks.

Two modes. `passage`: a block is one passage, cut at the maximum length (RE-AdaptIR's own setting).
`packed`: passages are laid end to end up to the block length; none is split.

    passages   [5 6 7] [8 9] [4 4 4 4]         block length 6
    blocks     [5 6 7 8 9] [4 4 4 4]
    positions  [0 1 2 0 1] [0 1 2 3]           restart with every passage
    labels     [6 7 . 9 .] [4 4 4 .]           the next token; none from one passage to the next

Attention never leaves a passage (attention.py), so both give the same loss for the same passages. In both
the passages of a forward pass are laid end to end in one row and none is padded; with `packed` all steps
have about as many tokens.

For an encoder 15% of each passage's tokens count in the loss instead (Devlin et al., 2019): of these 80% become
the mask token, 10% a random one, 10% stay. Which ones is a function of seed, step and passage alone.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from readapt_ray.seeds import random_generator

if TYPE_CHECKING:
    import torch

Mode = Literal["passage", "packed"]
IGNORED = -100
"""Label of a token that does not count in the loss."""
_MIN_WIDTH_STEP = 16
_WIDTHS_PER_OCTAVE = 16

BLOCK_SCHEMA = pa.schema(
    [
        ("block_id", pa.int64()),
        ("input_ids", pa.list_(pa.int32())),
        ("passage_lengths", pa.list_(pa.int32())),
        ("passage_numbers", pa.list_(pa.int64())),
    ]
)


def padded_width(num_tokens: int) -> int:
    """Return the length of a row that holds so many tokens: up to a sixteenth more, so that few lengths occur.

    A CPU's matrix library keeps a program for each shape that it has met; with a new length every step a
    worker grew by 20 MB a step.
    """
    step = max(_MIN_WIDTH_STEP, (1 << num_tokens.bit_length()) // (2 * _WIDTHS_PER_OCTAVE))
    return -(-num_tokens // step) * step


@dataclass(frozen=True)
class Block:
    """Tokens of one or more passages. `input_ids` is int32 [sum of passage_lengths]."""

    input_ids: np.ndarray
    passage_lengths: tuple[int, ...]
    passage_numbers: tuple[int, ...]

    def num_labels(self, masking: "Masking | None" = None) -> int:
        """Count the tokens of the loss: all but the first of each passage, or those that are masked."""
        if masking is None:
            return len(self.input_ids) - len(self.passage_lengths)
        return sum(masking.num_masked(length) for length in self.passage_lengths)

    def passages(self) -> Iterator["Block"]:
        """Return each passage as a block of its own."""
        start = 0
        for length, number in zip(self.passage_lengths, self.passage_numbers, strict=True):
            yield Block(self.input_ids[start : start + length], (length,), (number,))
            start += length


@dataclass(frozen=True, kw_only=True)
class Masking:
    """How tokens are masked for an encoder."""

    mask_id: int
    vocab_size: int
    seed: int
    share: float = 0.15

    def num_masked(self, length: int) -> int:
        """Return how many tokens of a passage of this length are masked, CLS and SEP left out; at least one."""
        inner = length - 2
        return max(1, round(self.share * inner)) if inner > 0 else 0

    def apply(self, ids: np.ndarray, *, step: int, passage_number: int) -> tuple[np.ndarray, np.ndarray]:
        """Mask a passage; return it with its labels, the original tokens or IGNORED. int64 [T] each."""
        random = random_generator(self.seed, "masking", step, passage_number)
        chosen = 1 + random.permutation(len(ids) - 2)[: self.num_masked(len(ids))] if len(ids) > 2 else np.empty(0, int)
        labels = np.full(len(ids), IGNORED, np.int64)
        labels[chosen] = ids[chosen]
        kind = random.random(len(chosen))
        masked = ids.astype(np.int64)
        masked[chosen[kind < 0.8]] = self.mask_id
        changed = chosen[kind >= 0.9]
        masked[changed] = random.integers(0, self.vocab_size, len(changed))
        return masked, labels


def end_id(tokenizer: Any) -> int | None:
    """Return the token that ends a text: EOS, or an encoder's SEP; None if the tokenizer has neither."""
    found = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    return None if found is None else int(found)


def passage_ids(tokenizer: Any, texts: Sequence[str], *, max_tokens: int) -> tuple[list[list[int]], list[int]]:
    """Return the token ids of whole passages, and how many tokens truncation took from each.

    A decoder's: BOS where the tokenizer has one, the text, EOS where it was not cut. An encoder's (its
    tokenizer has a mask token): CLS, the text, SEP always.

    Args:
        tokenizer: a fast transformers tokenizer.
        texts: one text a passage.
        max_tokens: longest passage, specials included.
    """
    if not texts:
        return [], []
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
    last = end_id(tokenizer)
    start, end = ([] if each is None else [each] for each in (first, last))
    encoded = tokenizer(list(texts), add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
    losses = [max(0, len(start) + len(ids) + len(end) - max_tokens) for ids in encoded]
    if tokenizer.mask_token_id is not None:
        return [start + ids[: max_tokens - len(start) - len(end)] + end for ids in encoded], losses
    return [(start + ids + end)[:max_tokens] for ids in encoded], losses


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
    """Return blocks as a table of BLOCK_SCHEMA, numbered from `first_block_id`."""
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
    """Return the blocks of a table of `blocks_to_table`."""
    columns = [table.column(name).combine_chunks() for name in ("input_ids", "passage_lengths", "passage_numbers")]
    rows = zip(*columns, strict=True)
    return [
        Block(ids.values.to_numpy(), tuple(lengths.as_py()), tuple(numbers.as_py())) for ids, lengths, numbers in rows
    ]


@dataclass(frozen=True)
class Batch:
    """The tensors of one forward pass: passages end to end in one row of T tokens, then some padding."""

    input_ids: "torch.Tensor"
    """int64 [1, T]"""
    position_ids: "torch.Tensor"
    """int64 [1, T]; from 0 in each passage."""
    labels: "torch.Tensor"
    """int64 [1, T]: the token to predict at this position, or IGNORED."""
    passage_ends: "torch.Tensor"
    """int32 [passages + 1]: 0, then where each passage ends; the padding counts as a passage."""
    longest_passage: int
    """Tokens."""
    label_places: "torch.Tensor"
    """int64 [N]: places of the labels in the row. Found on the host, since a device would have to be waited for."""

    def to(self, device: "str | torch.device") -> "Batch":
        """Return the same batch on another device."""
        import torch

        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)

    def in_rows(self) -> "dict[str, torch.Tensor]":
        """Return input_ids, position_ids, labels and attention_mask with each passage in a row of its own, padded.

        For models whose attention cannot keep concatenated passages apart.
        """
        import torch

        lengths = self.passage_ends.diff()[:, None]
        places = torch.arange(self.longest_passage, device=lengths.device)
        is_filled = places < lengths
        index = (self.passage_ends[:-1, None] + places.minimum(lengths - 1)).long()
        rows = {name: getattr(self, name)[0][index] for name in ("input_ids", "position_ids", "labels")}
        rows["labels"].masked_fill_(~is_filled, IGNORED)
        return {**rows, "attention_mask": is_filled.long()}


@dataclass(frozen=True)
class Row:
    """The arrays of a `Batch`, made by processes that do not load torch."""

    input_ids: np.ndarray
    position_ids: np.ndarray
    labels: np.ndarray
    passage_ends: np.ndarray

    def batch(self) -> Batch:
        """Return the tensors; they share this row's memory."""
        import torch

        return Batch(
            input_ids=torch.from_numpy(self.input_ids)[None],
            position_ids=torch.from_numpy(self.position_ids)[None],
            labels=torch.from_numpy(self.labels)[None],
            passage_ends=torch.from_numpy(self.passage_ends),
            longest_passage=int(np.diff(self.passage_ends).max()),
            label_places=torch.from_numpy(np.flatnonzero(self.labels != IGNORED)),
        )


def collate(passages: Sequence[Block], *, pad_id: int, masking: Masking | None = None, step: int = 0) -> Batch:
    """Return the tensors of `lay_out`."""
    return lay_out(passages, pad_id=pad_id, masking=masking, step=step).batch()


def lay_out(passages: Sequence[Block], *, pad_id: int, masking: Masking | None = None, step: int = 0) -> Row:
    """Lay passages end to end, and pad them to a length that occurs often.

    Args:
        passages: blocks of one passage each, at least one.
        pad_id: fills the row; does not count in the loss.
        masking: an encoder's; without it the objective is the next token.
        step: which step of training it is; masks differ by it.
    """
    lengths = [len(each.input_ids) for each in passages]
    ends = np.cumsum([0, *lengths])
    width = padded_width(int(ends[-1]))
    input_ids = np.full(width, pad_id, np.int64)
    position_ids = np.zeros(width, np.int64)
    labels = np.full(width, IGNORED, np.int64)
    for passage, start, end in zip(passages, ends, ends[1:], strict=False):
        position_ids[start:end] = np.arange(end - start)
        if masking is None:
            input_ids[start:end] = passage.input_ids
            labels[start : end - 1] = passage.input_ids[1:]
        else:
            (number,) = passage.passage_numbers
            input_ids[start:end], labels[start:end] = masking.apply(passage.input_ids, step=step, passage_number=number)
    if width > ends[-1]:
        ends = np.append(ends, width)
    return Row(input_ids, position_ids, labels, ends.astype(np.int32))


def micro_batches(passages: Sequence[Block], *, max_tokens: int) -> list[list[Block]]:
    """Split passages, in order, into rows of at most `max_tokens` tokens; a longer one goes alone."""
    groups: list[list[Block]] = []
    total = 0
    for passage in passages:
        total += len(passage.input_ids)
        if not groups or total > max_tokens:
            groups.append([])
            total = len(passage.input_ids)
        groups[-1].append(passage)
    return groups
