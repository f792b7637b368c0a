"""The knowledge adapter: one worker's part in training a language model on a packed corpus."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from readapt_ray.nn.precision import products_in
from readapt_ray.training import objectives, packing
from readapt_ray.training.blocks import BlockReader
from readapt_ray.training.checkpoints import DataOrder
from readapt_ray.training.engine import DeepSpeedEngine
from readapt_ray.training.packing import Block, Masking
from readapt_ray.training.steps import StepWork


@dataclass(frozen=True, kw_only=True)
class LanguageModelling:
    """The next token, or with `masking` the masked tokens, of every block.

    Args:
        model: a language model on the worker's device with the attention of attention.py and a LossHead; adapters are in
            it already.
        reader: the blocks in training order.
        pad_id: the token that fills short rows.
        micro_batch_tokens: of one forward and backward pass, at most; a longer passage goes alone.
        dtype: of matrix products; below float32 they run under autocast where weights have another type.
        masking: an encoder's.
    """

    model: Any
    reader: BlockReader
    pad_id: int
    micro_batch_tokens: int
    dtype: torch.dtype
    masking: Masking | None = None

    @property
    def data_order(self) -> DataOrder:
        """Which blocks, in which order."""
        return self.reader.data_order

    def batches(self, first_step: int) -> Iterator[list[Block]]:
        """The blocks of every step from `first_step` on."""
        return self.reader.steps(first_step)

    def work(self, engine: DeepSpeedEngine, batch: list[Block], step: int) -> StepWork[list[Block]]:
        """This worker's micro-batches: each computes those of all, and so knows how many the others run."""
        passages = [passage for block in batch for passage in block.passages()]
        shares = [
            packing.micro_batches(passages[rank :: engine.num_workers], max_tokens=self.micro_batch_tokens)
            for rank in range(engine.num_workers)
        ]
        num_labels = max(1, sum(each.num_labels(self.masking) for each in passages))

        def loss_of(part: list[Block]) -> Tensor:
            tensors = packing.collate(part, pad_id=self.pad_id, masking=self.masking, step=step)
            with products_in(self.dtype, self.model, engine.device.type):
                return objectives.loss_sum(self.model, tensors.to(engine.device)) / num_labels

        num_tokens = sum(len(each.input_ids) for each in passages)
        return StepWork(
            parts=weighted(shares[engine.worker_rank], max(map(len, shares)), filler=passages[:1]),
            loss_of=loss_of,
            num_tokens=num_tokens,
            num_slots=sum(_row_tokens(part) for share in shares for part in share),
            passages=[number for each in passages for number in each.passage_numbers],
        )


def weighted(parts: list[Any], num_parts: int, *, filler: Any) -> list[tuple[Any, float]]:
    """Parts at weight one, then as many at weight zero as make `num_parts`."""
    return [(part, 1.0) for part in parts] + [(filler, 0.0)] * (num_parts - len(parts))


def _row_tokens(part: list[Block]) -> int:
    return packing.padded_width(sum(len(each.input_ids) for each in part))
