"""Supervised training of a retriever: InfoNCE over the passages of the whole batch of all workers.

Pairs are tokenised once and lie in memory on every worker: 0.6 GB a million pairs of 150 tokens.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import torch.distributed.nn
from torch import Tensor, nn

from readapt_ray.catalog.retrievers import Encoding
from readapt_ray.retrieval.pooling import normalized, pool
from readapt_ray.storage import Location
from readapt_ray.training import engine, language_model
from readapt_ray.training.language_model import Optimization

PAIR_SCHEMA = pa.schema(
    [("query_ids", pa.list_(pa.int32())), ("passage_ids", pa.list_(pa.int32())), ("doc_number", pa.int64())]
)


@dataclass(frozen=True)
class Pairs:
    """A batch: token ids of queries and of the passages that answer them.

    `doc_numbers` names the passages, so that one that stands twice in a batch is no negative to itself.
    """

    query_ids: list[np.ndarray]
    passage_ids: list[np.ndarray]
    doc_numbers: np.ndarray


class PairReader:
    """All pairs in training order: a seeded shuffle an epoch, the same on every worker.

    Args:
        folder: Parquet files of PAIR_SCHEMA.
        batch_size: pairs a step over all workers; the last batch of an epoch may be smaller.
        num_epochs: times that each pair is trained on.
        seed: of the shuffle.
    """

    def __init__(self, folder: Location, *, batch_size: int, num_epochs: int, seed: int) -> None:
        tables = []
        for file in folder.files(".parquet"):
            with file.open_input() as stream:
                tables.append(pq.read_table(stream, schema=PAIR_SCHEMA))
        table = pa.concat_tables(tables).combine_chunks()
        self._queries, self._passages = table["query_ids"].combine_chunks(), table["passage_ids"].combine_chunks()
        self._doc_numbers = table["doc_number"].to_numpy()
        self.batch_size = batch_size
        self.seed = seed
        self.num_pairs = table.num_rows
        self.steps_per_epoch = -(-self.num_pairs // batch_size)
        self.num_steps = self.steps_per_epoch * num_epochs

    def steps(self, first_step: int) -> Iterator[np.ndarray]:
        """The pair numbers of every step from `first_step` on."""
        for step in range(first_step, self.num_steps):
            epoch, in_epoch = divmod(step, self.steps_per_epoch)
            order = np.random.default_rng([self.seed, epoch]).permutation(self.num_pairs)
            yield order[in_epoch * self.batch_size : (in_epoch + 1) * self.batch_size]

    def count_tokens(self, numbers: Sequence[int] | np.ndarray) -> int:
        """Tokens of the queries and passages of these pairs."""
        at = pa.array(numbers)
        return sum(
            int(pc.sum(pc.list_value_length(column.take(at))).as_py()) for column in (self._queries, self._passages)
        )

    def read(self, numbers: Sequence[int] | np.ndarray) -> Pairs:
        """The pairs of these numbers."""
        return Pairs(
            [self._queries[int(number)].values.to_numpy() for number in numbers],
            [self._passages[int(number)].values.to_numpy() for number in numbers],
            self._doc_numbers[np.asarray(numbers, dtype=np.int64)],
        )


@dataclass(frozen=True, kw_only=True)
class PairReport:
    """What one step of supervised training tells."""

    step: int
    num_steps: int
    loss: float
    """Mean over the queries of all workers, in nats."""
    learning_rate: float
    gradient_norm: float
    num_pairs: int
    num_tokens: int
    seconds: float


def encode(model: nn.Module, token_ids: Sequence[np.ndarray], encoding: Encoding, *, device: torch.device) -> Tensor:
    """Vectors of tokenised texts with gradients, float32 [B, D]; texts are padded on the right."""
    longest = max(len(ids) for ids in token_ids)
    input_ids = np.zeros((len(token_ids), longest), np.int64)
    mask = np.zeros((len(token_ids), longest), np.int64)
    for row, ids in enumerate(token_ids):
        input_ids[row, : len(ids)] = ids
        mask[row, : len(ids)] = 1
    attention_mask = torch.from_numpy(mask).to(device)
    hidden = model(input_ids=torch.from_numpy(input_ids).to(device), attention_mask=attention_mask).last_hidden_state
    vectors = pool(hidden, attention_mask, encoding.pooling)
    return normalized(vectors) if encoding.normalize else vectors.float()


def loss_share(
    model: nn.Module,
    pairs: Pairs,
    encoding: Encoding,
    *,
    temperature: float,
    both_directions: bool,
    num_pairs_all: int,
    device: torch.device,
) -> Tensor:
    """This worker's share of the mean InfoNCE loss (van den Oord et al., 2018) over the batch of all workers.

    Each query is told from the passages of all workers; with `both_directions` each passage also from all
    queries, at equal weight. Passages of the same number as the right one are left out of the negatives.

    Args:
        pairs: this worker's; the shares of all workers add up to the mean over `num_pairs_all`.
        temperature: divides the inner product.
    """
    query_BD = encode(model, pairs.query_ids, encoding, device=device)
    passage_BD = encode(model, pairs.passage_ids, encoding, device=device)
    numbers_B = torch.from_numpy(pairs.doc_numbers).to(device)
    passages_ND, numbers_N, first = _gathered(passage_BD, numbers_B)
    targets_B = torch.arange(first, first + len(query_BD), device=device)
    same_BN = numbers_B[:, None] == numbers_N[None, :]
    same_BN[torch.arange(len(query_BD)), targets_B] = False
    total = _cross_entropy_sum(query_BD @ passages_ND.T / temperature, targets_B, same_BN)
    if both_directions:
        queries_ND, _, _ = _gathered(query_BD, numbers_B)
        total = (total + _cross_entropy_sum(passage_BD @ queries_ND.T / temperature, targets_B, same_BN)) / 2
    return total / num_pairs_all


def _cross_entropy_sum(scores_BN: Tensor, targets_B: Tensor, left_out_BN: Tensor) -> Tensor:
    scores_BN = scores_BN.float().masked_fill(left_out_BN, -torch.inf)
    return nn.functional.cross_entropy(scores_BN, targets_B, reduction="sum")


def _gathered(vectors_BD: Tensor, numbers_B: Tensor) -> tuple[Tensor, Tensor, int]:
    """Vectors and numbers of all workers with gradients to each, and the row of this worker's first."""
    size = torch.distributed.get_world_size()
    if size == 1:
        return vectors_BD, numbers_B, 0
    counts = [torch.zeros(1, dtype=torch.int64, device=vectors_BD.device) for _ in range(size)]
    torch.distributed.all_gather(counts, torch.tensor([len(vectors_BD)], device=vectors_BD.device))
    lengths = [int(count) for count in counts]
    longest = max(lengths)
    padded = nn.functional.pad(vectors_BD, (0, 0, 0, longest - len(vectors_BD)))
    vectors: list[Tensor] = torch.distributed.nn.functional.all_gather(padded)  # type: ignore[no-untyped-call]
    padded_numbers = nn.functional.pad(numbers_B, (0, longest - len(numbers_B)))
    numbers = [torch.empty_like(padded_numbers) for _ in range(size)]
    torch.distributed.all_gather(numbers, padded_numbers)
    rank = torch.distributed.get_rank()
    return (
        torch.cat([each[:length] for each, length in zip(vectors, lengths, strict=True)]),
        torch.cat([each[:length] for each, length in zip(numbers, lengths, strict=True)]),
        sum(lengths[:rank]),
    )


def train_retriever(
    model: nn.Module,
    reader: PairReader,
    encoding: Encoding,
    *,
    optimization: Optimization,
    temperature: float,
    both_directions: bool,
    dtype: torch.dtype,
    checkpoints: Location,
    on_step: Callable[[Any], None],
) -> engine.Engine:
    """Train what is trainable in `model` with InfoNCE, from the newest checkpoint on.

    Args:
        model: headless, on the worker's device.
        reader: the pairs in training order; batches of at least as many pairs as there are workers.
        encoding: pooling and normalisation.
        dtype: of matrix products; below float32 they run under autocast.
        on_step: called on every worker after each step with a PairReport.

    Raises:
        TrainingDivergedError: the loss became NaN or infinite.
    """
    stepper = engine.Engine(
        model,
        learning_rate=optimization.learning_rate,
        weight_decay=optimization.weight_decay,
        zero_stage=optimization.zero_stage,
        max_gradient_norm=optimization.max_gradient_norm,
    )
    first_step = language_model.resume(stepper, checkpoints)
    for step, numbers in enumerate(reader.steps(first_step), start=first_step):
        started_s = time.monotonic()
        if len(numbers) < max(2, stepper.num_workers):
            continue
        share = reader.read(numbers[stepper.worker_rank :: stepper.num_workers])

        def loss_of(pairs: Pairs, num_pairs_all: int = len(numbers)) -> Tensor:
            with torch.autocast(stepper.device_type, dtype, enabled=dtype != torch.float32):
                return loss_share(
                    model,
                    pairs,
                    encoding,
                    temperature=temperature,
                    both_directions=both_directions,
                    num_pairs_all=num_pairs_all,
                    device=stepper.device,
                )

        rate = engine.linear_schedule(
            step, num_steps=reader.num_steps, warmup_steps=int(optimization.warmup_fraction * reader.num_steps)
        )
        outcome = stepper.step([share], num_parts=1, loss_of=loss_of, rate=rate, seed=optimization.seed + step)
        done = step + 1
        if done % optimization.checkpoint_every_steps == 0 or done == reader.num_steps:
            language_model.checkpoint(stepper, checkpoints, done)
        on_step(
            PairReport(
                step=done,
                num_steps=reader.num_steps,
                loss=outcome.loss,
                learning_rate=rate * optimization.learning_rate,
                gradient_norm=outcome.gradient_norm,
                num_pairs=len(numbers),
                num_tokens=reader.count_tokens(numbers),
                seconds=time.monotonic() - started_s,
            )
        )
    return stepper
