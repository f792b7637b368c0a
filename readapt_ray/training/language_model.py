"""Train a language model on a packed corpus: one worker's part of the knowledge adapter."""

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
    """Predict the next token, or the masked tokens, of every block.

    Args:
        model: a language model on the worker's device with the attention of attention.py and a LossHead; adapters are in
            it already.
        data_order: which blocks, in which order.
        batches: gives this worker's share of every step from a first one on.
        dtype: of matrix products; below float32 they run under autocast where weights have another type.
    """

    model: Any
    data_order: DataOrder
    batches: Callable[[int], Iterator[Share]]
    dtype: torch.dtype

    def work(self, engine: DeepSpeedEngine, batch: Share, step: int) -> StepWork[Batch]:
        """Return this worker's micro-batches.

        Raises:
            RuntimeError: the batch is of another step or worker.
            ModelError: the tokenizer gives an id that the model does not know.
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
