"""Compute one worker's micro-batches and losses when a language model is trained on token blocks (`train`)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from readapt_ray.nn.precision import products_in
from readapt_ray.retrieval.forward_pass import check_ids
from readapt_ray.training import objectives
from readapt_ray.training.checkpoints import DataOrder
from readapt_ray.training.engine import DeepSpeedEngine
from readapt_ray.training.packing import Batch
from readapt_ray.training.shares import Share
from readapt_ray.training.steps import StepWork


@dataclass(frozen=True, kw_only=True)
class LanguageModelling:
    """The language-model objective: predict the next token, or the masked tokens, of every block.

    Args:
        model: a language model on the worker's device, changed by `objectives.prepare`, with its adapters added.
        data_order: the order in which blocks are trained on.
        batches: a function from a first step to this worker's shares of that step and all later ones.
        dtype: type of matrix products. If it is below float32 and weights have another type, autocast is used.
    """

    model: Any
    data_order: DataOrder
    batches: Callable[[int], Iterator[Share]]
    dtype: torch.dtype

    def work(self, engine: DeepSpeedEngine, batch: Share, step: int) -> StepWork[Batch]:
        """Return this worker's micro-batches and loss.

        Args:
            engine: gives rank and device.
            batch: this worker's share of the step, from `batches`.
            step: steps before this one.

        Raises:
            RuntimeError: the batch belongs to another step or worker.
            ModelError: a token id exceeds the model's vocabulary.
        """
        if (batch.step, batch.worker_rank) != (step, engine.worker_rank):
            raise RuntimeError(
                f"worker {engine.worker_rank} at step {step} got the data of step {batch.step} of worker {batch.worker_rank}"
            )
        highest = max(int(row.input_ids.max()) for row in batch.rows)
        check_ids(highest, self.model.get_input_embeddings().num_embeddings)

        def loss_of(part: Batch) -> Tensor:
            with products_in(self.dtype, self.model, engine.device.type):
                return objectives.loss_sum(self.model, part.to(engine.device)) / batch.num_labels

        return StepWork(
            parts=batch.parts,
            loss_of=loss_of,
            num_tokens=batch.num_tokens,
            num_slots=batch.num_slots,
            num_passages=batch.num_passages,
            first_passages=batch.first_passages,
        )
