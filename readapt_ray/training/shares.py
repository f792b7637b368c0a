"""Divide the blocks of a training step into shares, one per worker: micro-batches as arrays.

Passages are dealt to the workers in turn. If ZeRO partitions, passes are collective, so all workers run the same
number: a worker with fewer repeats a passage at weight zero. Shares are sent as Arrow tables, with one row per share
and 12 bytes per token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from readapt_ray.training import packing
from readapt_ray.training.packing import Batch, Block, Masking, Row

NAMED_PASSAGES = 20
"""Number of passages of a step that the message names if the loss is NaN or infinite."""
_TOKENS = ("input_ids", "position_ids", "labels")
_COUNTS = ("step", "worker_rank", "num_own", "num_parts", "num_labels", "num_tokens", "num_slots", "num_passages")


@dataclass(frozen=True, kw_only=True)
class Share:
    """One worker's part of one step. All counts are over all workers, except `num_own` and `num_parts`."""

    step: int
    """Steps before this one."""
    worker_rank: int
    rows: Sequence[Row]
    """Micro-batches. If this worker has fewer than others, the last one is to be repeated at weight zero."""
    num_own: int
    """Micro-batches of this worker that count."""
    num_parts: int
    """Micro-batches that every worker runs."""
    num_labels: int
    """Tokens that count in the loss."""
    num_tokens: int
    num_slots: int
    """Tokens and padding."""
    num_passages: int
    first_passages: Sequence[int]
    """Numbers of the first passages of the step."""

    @property
    def parts(self) -> list[tuple[Batch, float]]:
        """Micro-batches of this worker with their weights; every worker has the same number."""
        own = [(row.batch(), 1.0) for row in self.rows[: self.num_own]]
        return own + [(self.rows[-1].batch(), 0.0)] * (self.num_parts - self.num_own)


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """The settings for dividing blocks into micro-batches.

    Args:
        pad_id: token that fills rows up to their padded length.
        micro_batch_tokens: most tokens of one forward and backward pass; a longer passage gets its own.
        masking: masking for an encoder; None trains to predict the next token.
    """

    pad_id: int
    micro_batch_tokens: int
    masking: Masking | None = None

    def shares(self, blocks: Sequence[Block], num_workers: int, step: int) -> list[Share]:
        """Divide the blocks of one step into a share per worker, in the order of ranks.

        Args:
            blocks: all workers' blocks of the step, at least one.
            num_workers: number of shares; a worker may get a share that does not count.
            step: steps before this one; it decides the masking.
        """
        passages = [passage for block in blocks for passage in block.passages()]
        groups = [
            packing.micro_batches(passages[rank::num_workers], max_tokens=self.micro_batch_tokens)
            for rank in range(num_workers)
        ]
        of_all: dict[str, Any] = {
            "step": step,
            "num_parts": max(map(len, groups)),
            "num_labels": max(1, sum(each.num_labels(self.masking) for each in passages)),
            "num_tokens": sum(len(each.input_ids) for each in passages),
            "num_slots": sum(_row_tokens(part) for group in groups for part in group),
            "num_passages": len(passages),
            "first_passages": [each.passage_numbers[0] for each in passages[:NAMED_PASSAGES]],
        }
        filler = [passages[:1]]
        return [
            Share(
                rows=[self._lay_out(part, step) for part in own + filler * (len(own) < of_all["num_parts"])],
                worker_rank=rank,
                num_own=len(own),
                **of_all,
            )
            for rank, own in enumerate(groups)
        ]

    def _lay_out(self, part: Sequence[Block], step: int) -> Row:
        return packing.lay_out(part, pad_id=self.pad_id, masking=self.masking, step=step)


def _row_tokens(part: Sequence[Block]) -> int:
    return packing.padded_width(sum(len(each.input_ids) for each in part))


def shares_to_table(shares: Sequence[Share]) -> pa.Table:
    """Convert shares to a table with one row per share."""
    columns = {name: pa.array([getattr(share, name) for share in shares], pa.int64()) for name in _COUNTS}
    for name in (*_TOKENS, "passage_ends"):
        columns[name] = _lists([[getattr(row, name) for row in share.rows] for share in shares])
    columns["widths"] = pa.array([[len(row.input_ids) for row in share.rows] for share in shares])
    columns["num_ends"] = pa.array([[len(row.passage_ends) for row in share.rows] for share in shares])
    columns["first_passages"] = pa.array([share.first_passages for share in shares], pa.list_(pa.int64()))
    return pa.table(columns)


def table_to_shares(table: pa.Table) -> Iterator[Share]:
    """Convert a table from `shares_to_table` back to shares, one at a time."""
    for index in range(table.num_rows):
        tokens = [_split(table, name, "widths", index, np.int64) for name in _TOKENS]
        ends = _split(table, "passage_ends", "num_ends", index, np.int32)
        yield Share(
            rows=[Row(*each) for each in zip(*tokens, ends, strict=True)],
            first_passages=table["first_passages"][index].as_py(),
            **{name: table[name][index].as_py() for name in _COUNTS},
        )


def _lists(rows: Sequence[Sequence[np.ndarray]]) -> pa.Array:
    """Return a column of int32 lists; the arrays of each row are concatenated."""
    offsets = np.cumsum([0, *(sum(map(len, row)) for row in rows)])
    values = np.concatenate([each for row in rows for each in row]).astype(np.int32)
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(values))


def _split(table: pa.Table, name: str, lengths: str, row: int, dtype: type[np.integer[Any]]) -> list[np.ndarray]:
    values = table[name][row].values.to_numpy().astype(dtype)
    return np.split(values, np.cumsum(table[lengths][row].as_py())[:-1])
