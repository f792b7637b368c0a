"""Pack passages into numbered token blocks, and make the tensors of a training step from blocks.

Two modes. `passage`: a block is one passage, truncated at the maximum length (the setting of RE-AdaptIR).
`packed`: passages are concatenated up to the block length, and none is split.

    passages   [5 6 7] [8 9] [4 4 4 4]         block length 6
    blocks     [5 6 7 8 9] [4 4 4 4]
    positions  [0 1 2 0 1] [0 1 2 3]           restart with every passage
    labels     [6 7 . 9 .] [4 4 4 .]           the next token; none from one passage to the next

Attention stays within a passage (attention.py), so both modes give the same loss for the same passages. In both, the
passages of a forward pass are concatenated in one row without padding between them. With `packed`, all steps have about
the same number of tokens.

For an encoder, 15% of each passage's tokens count in the loss instead (Devlin et al., 2019): 80% of these become the
mask token, 10% a random token, and 10% stay. The choice depends only on seed, step and passage.
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
    """Return the length to which a row is padded: to a multiple of 16, and for long rows by up to a sixteenth.

    So few lengths occur. A CPU's matrix library keeps a program for each shape: with a new length in every step, a
    worker grew by 20 MB per step.
    """
    step = max(_MIN_WIDTH_STEP, (1 << num_tokens.bit_length()) // (2 * _WIDTHS_PER_OCTAVE))
    return -(-num_tokens // step) * step


@dataclass(frozen=True)
class Block:
    """The tokens of one or more passages. `input_ids` is int32 [sum of passage_lengths]."""

    input_ids: np.ndarray
    passage_lengths: tuple[int, ...]
    """Tokens of each passage, in order."""
    passage_numbers: tuple[int, ...]
    """Number of each passage: its row, from 0, over all files of the corpus."""

    def num_labels(self, masking: "Masking | None" = None) -> int:
        """Count the tokens in the loss: all except the first of each passage; with masking, the masked ones."""
        if masking is None:
            return len(self.input_ids) - len(self.passage_lengths)
        return sum(masking.num_masked(length) for length in self.passage_lengths)

    def passages(self) -> Iterator["Block"]:
        """Yield each passage as a block of one passage, in order; their tokens share memory with this block."""
        start = 0
        for length, number in zip(self.passage_lengths, self.passage_numbers, strict=True):
            yield Block(self.input_ids[start : start + length], (length,), (number,))
            start += length


@dataclass(frozen=True, kw_only=True)
class Masking:
    """The masking of tokens for masked-token training of an encoder."""

    mask_id: int
    """Id of the mask token."""
    vocab_size: int
    """Random tokens have ids below this."""
    seed: int
    share: float = 0.15
    """Share of a passage's tokens that count in the loss."""

    def num_masked(self, length: int) -> int:
        """Return how many tokens of a passage count in the loss, never CLS or SEP; `length` includes these two.

        It is at least 1, but 0 if there are no other tokens.
        """
        inner = length - 2
        return max(1, round(self.share * inner)) if inner > 0 else 0

    def apply(self, ids: np.ndarray, *, step: int, passage_number: int) -> tuple[np.ndarray, np.ndarray]:
        """Mask tokens of a passage; return its tokens and its labels, int64 [T] each. The same arguments mask the same.

        A label is the original token where a token counts in the loss, also if it was not replaced, else IGNORED.

        Args:
            ids: the passage's tokens, with CLS and SEP; they are not changed.
            step: number of the training step.
            passage_number: number of the passage in the corpus.
        """
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
    """Return the id of the token that ends a text: EOS, or else SEP; None if the tokenizer has neither."""
    found = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    return None if found is None else int(found)


def passage_ids(tokenizer: Any, texts: Sequence[str], *, max_tokens: int) -> tuple[list[list[int]], list[int]]:
    """Tokenise passages with their special tokens, and count the tokens that truncation cut from each.

    A passage begins with BOS, or else CLS, if the tokenizer has one of them, and ends with EOS, or else SEP. If it is
    truncated, a decoder's passage has no end token. An encoder's (its tokenizer has a mask token) always has.

    Args:
        tokenizer: a fast transformers tokenizer.
        texts: one text per passage.
        max_tokens: maximum tokens of a passage, special tokens included.

    Returns:
        Token ids per passage, and number of lost tokens per passage (0 if it was not truncated), in order.
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
    """Pack numbered passages into blocks, in order.

    Args:
        passages: pairs of passage number and token ids, none longer than `block_tokens`.
        mode: `passage` makes one block per passage; `packed` fills blocks with several.
        block_tokens: maximum tokens of a block.
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
    """Convert blocks to a table of BLOCK_SCHEMA, with consecutive block ids from `first_block_id`."""
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
    """Convert a table from `blocks_to_table` back to blocks, in its order; their ids are dropped."""
    columns = [table.column(name).combine_chunks() for name in ("input_ids", "passage_lengths", "passage_numbers")]
    rows = zip(*columns, strict=True)
    return [
        Block(ids.values.to_numpy(), tuple(lengths.as_py()), tuple(numbers.as_py())) for ids, lengths, numbers in rows
    ]


@dataclass(frozen=True)
class Batch:
    """The tensors of one forward pass: passages concatenated in one row of T tokens, then some padding."""

    input_ids: "torch.Tensor"
    """int64 [1, T]"""
    position_ids: "torch.Tensor"
    """int64 [1, T]; counted from 0 in each passage."""
    labels: "torch.Tensor"
    """int64 [1, T]: the token to predict at this position, or IGNORED."""
    passage_ends: "torch.Tensor"
    """int32 [passages + 1]: 0, then the end offset of each passage; the padding counts as a passage."""
    longest_passage: int
    """Tokens in the longest passage, where the padding counts as a passage."""
    label_places: "torch.Tensor"
    """int64 [N]: positions in the row that have a label. Computed on the host, to avoid waiting for the device."""

    def to(self, device: "str | torch.device") -> "Batch":
        """Return the batch on another device; the copy may still be running."""
        import torch

        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)

    def in_rows(self) -> "dict[str, torch.Tensor]":
        """Return input_ids, position_ids, labels and attention_mask with one padded row per passage, int64 [rows, T].

        This is for models whose attention cannot keep concatenated passages separate. If the batch is padded, its
        padding is the last row, without labels.
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
    """The arrays of a `Batch` in numpy, for processes that do not load torch: int64 [T], and int32 `passage_ends`."""

    input_ids: np.ndarray
    position_ids: np.ndarray
    labels: np.ndarray
    passage_ends: np.ndarray

    def batch(self) -> Batch:
        """Convert the arrays to the tensors of a `Batch` on the CPU, which share their memory."""
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
    """Make the tensors of a forward pass from passages; arguments as in `lay_out`."""
    return lay_out(passages, pad_id=pad_id, masking=masking, step=step).batch()


def lay_out(passages: Sequence[Block], *, pad_id: int, masking: Masking | None = None, step: int = 0) -> Row:
    """Concatenate passages into one row, padded to `padded_width`, with positions and labels.

    Args:
        passages: blocks of one passage each, at least one.
        pad_id: token that fills the row; it does not count in the loss.
        masking: masking for an encoder; None trains to predict the next token.
        step: number of the training step; each step masks other tokens.
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
    """Split passages, in order, into micro-batches of at most `max_tokens` tokens; a longer passage gets its own.

    Padding does not count. Without passages the list is empty.
    """
    groups: list[list[Block]] = []
    total = 0
    for passage in passages:
        total += len(passage.input_ids)
        if not groups or total > max_tokens:
            groups.append([])
            total = len(passage.input_ids)
        groups[-1].append(passage)
    return groups
