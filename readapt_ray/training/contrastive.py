"""Train a retriever with labels: InfoNCE with the passages of all workers' batches as negatives.

Memory does not limit the batch (GradCache; Gao et al., 2021). First all texts are encoded in micro-batches without a
graph, and the loss and its gradient for each vector are computed. Then each micro-batch is encoded again, with the same
dropout, and the gradient is propagated through it. This costs one more forward pass. A batch that fits into one
micro-batch is encoded once.

The texts of a micro-batch are packed into one row if the model's attention can keep them separate (attention.py). With
padding, questions of 15 tokens would cost as much as passages of 128 in the same batch.

False negatives are masked: a passage that answers a query is never a negative of it, even if it is in the batch as the
passage of another pair or as a hard negative of another query.
"""

import inspect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed.nn
from torch import Tensor, nn

from readapt_ray.catalog.encoding import Encoding
from readapt_ray.catalog.shapes import first_position
from readapt_ray.nn import attention
from readapt_ray.nn.precision import products_in
from readapt_ray.retrieval.forward_pass import check_ids, packed_inputs, padded_inputs
from readapt_ray.retrieval.pooling import normalized, pool, pool_packed
from readapt_ray.training.checkpoints import DataOrder
from readapt_ray.training.dora import without_adapters
from readapt_ray.training.engine import DeepSpeedEngine, seed_dropout
from readapt_ray.training.packing import padded_width
from readapt_ray.training.pairs import PairReader, Texts
from readapt_ray.training.shares import NAMED_PASSAGES
from readapt_ray.training.steps import StepWork


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """The InfoNCE objective: score each query's passage above the passages of the batch that do not answer the query.

    The batch has the pairs and hard negatives of all workers.

    Args:
        model: the model without a language-model head, on the worker's device.
        reader: the pairs in training order.
        encoding: pooling and normalisation.
        temperature: divides the inner product of query and passage.
        both_directions: also score each passage's query above the queries that it does not answer, with equal weight.
        micro_batch_tokens: most tokens of one forward and backward pass, padding included; a longer text is alone.
        dtype: type of matrix products. If it is below float32 and weights have another type, autocast is used.
        seed: random seed of dropout.
        queries_only: encode passages by the model without its adapters, so that only queries are trained.
    """

    model: nn.Module
    reader: PairReader
    encoding: Encoding
    temperature: float
    both_directions: bool
    micro_batch_tokens: int
    dtype: torch.dtype
    seed: int
    queries_only: bool = False

    @property
    def data_order(self) -> DataOrder:
        """The order in which pairs are trained on: that of `reader`."""
        return self.reader.data_order

    def batches(self, first_step: int) -> Iterator[np.ndarray]:
        """Yield the numbers of all workers' pairs for every step from `first_step` on, as `PairReader.steps`."""
        return self.reader.steps(first_step)

    def work(self, engine: DeepSpeedEngine, batch: np.ndarray, step: int) -> StepWork[Any]:
        """Return this worker's micro-batches and loss; with several micro-batches, workers exchange vectors here.

        Collective: all workers must call it.

        Args:
            engine: gives rank and number of workers.
            batch: the numbers of all workers' pairs in this step, from `batches`.
            step: steps before this one; it seeds dropout.

        Raises:
            ModelError: a token id exceeds the model's vocabulary.
        """
        shares = [self.reader.read(batch[rank :: engine.num_workers]) for rank in range(engine.num_workers)]
        highest = max(int(ids.max()) for share in shares for ids in share.token_ids)
        model: Any = self.model
        check_ids(highest, int(model.get_input_embeddings().num_embeddings))
        # Passes are collective, so a worker without a pair encodes some text, which does not count.
        shares = [share if share.num_pairs else share._replace(token_ids=shares[0].token_ids[:1]) for share in shares]
        groups = [self._groups(share, 0, self._num_trained(share)) for share in shares]
        frozen = [self._groups(share, self._num_trained(share)) for share in shares]
        num_parts = max(map(len, groups))
        texts, own = shares[engine.worker_rank], groups[engine.worker_rank]
        frozen_FD = self._frozen(engine, texts, frozen)
        parts = [(part, 1.0) for part in own] + [(own[0], 0.0)] * (num_parts - len(own))
        if num_parts > 1:
            loss_of = self._cached(engine, shares, parts, frozen_FD, step=step)
        else:

            def loss_of(part: Sequence[int]) -> Tensor:
                vectors = self._encode(engine, texts, part)
                in_order = torch.empty_like(vectors).index_copy(0, torch.tensor(part, device=vectors.device), vectors)
                return self.loss_share(_with_frozen(in_order, frozen_FD), shares, engine.worker_rank)

        lengths = [[len(ids) for ids in share.token_ids] for share in shares]
        return StepWork(
            parts=parts,
            loss_of=loss_of,
            num_tokens=sum(map(sum, lengths)),
            num_slots=sum(
                self._num_slots([lengths[rank][index] for index in group])
                for rank in range(engine.num_workers)
                for group in (*groups[rank], *frozen[rank])
            ),
            num_passages=len(batch),
            first_passages=self.reader.doc_numbers(batch[:NAMED_PASSAGES]).tolist(),
        )

    def _cached(
        self,
        engine: DeepSpeedEngine,
        shares: Sequence[Texts],
        parts: Sequence[tuple[Sequence[int], float]],
        frozen_FD: Tensor | None,
        *,
        step: int,
    ) -> Any:
        """Compute the gradient of every vector (GradCache); return a loss function of micro-batches that applies it."""
        texts = shares[engine.worker_rank]
        vectors_TD: Tensor | None = None
        with torch.no_grad():
            for index, (part, weight) in enumerate(parts):
                seed_dropout(self.seed, step=step, worker_rank=engine.worker_rank, part=index)
                encoded = self._encode(engine, texts, part)
                if vectors_TD is None:
                    vectors_TD = encoded.new_zeros(self._num_trained(texts), encoded.shape[1])
                if weight:
                    vectors_TD[torch.tensor(part, device=encoded.device)] = encoded
        assert vectors_TD is not None
        with torch.enable_grad():
            vectors_TD.requires_grad_()
            loss = self.loss_share(_with_frozen(vectors_TD, frozen_FD), shares, engine.worker_rank)
            (gradient_TD,) = torch.autograd.grad(loss, vectors_TD)
        num_real = sum(weight > 0 for _, weight in parts)
        value = loss.detach() / max(1, num_real)

        def loss_of(part: Sequence[int]) -> Tensor:
            rows = torch.tensor(part, device=gradient_TD.device)
            carried = (self._encode(engine, texts, part) * gradient_TD[rows]).sum()
            return carried - carried.detach() + value

        return loss_of

    def _groups(self, texts: Texts, first: int, last: int | None = None) -> list[list[int]]:
        """Group the texts from `first` to `last` (exclusive) into micro-batches, longest first."""
        lengths = [len(ids) for ids in texts.token_ids]
        packed = is_packed(self.model)
        groups: list[list[int]] = []
        num_tokens, width = 0, 0
        for index in sorted(range(len(lengths))[first:last], key=lambda each: -lengths[each]):
            num_tokens += lengths[index]
            num_slots = padded_width(num_tokens) if packed else width * (len(groups[-1]) + 1 if groups else 1)
            if not groups or num_slots > self.micro_batch_tokens:
                groups.append([])
                num_tokens, width = lengths[index], padded_width(lengths[index])
            groups[-1].append(index)
        return groups

    def _num_slots(self, lengths: Sequence[int]) -> int:
        """Count the tokens that a pass over texts of these lengths computes, padding included."""
        return padded_width(sum(lengths)) if is_packed(self.model) else len(lengths) * padded_width(max(lengths))

    def _num_trained(self, texts: Texts) -> int:
        """Return how many of the first texts are trained: all, or only the queries (at least one, see `work`)."""
        return max(1, texts.num_pairs) if self.queries_only else len(texts.token_ids)

    def _frozen(self, engine: DeepSpeedEngine, texts: Texts, groups: Sequence[Sequence[list[int]]]) -> Tensor | None:
        """Encode the texts that are not trained, in order, by the model without its adapters; None if there are none.

        Every worker makes the same number of passes, since passes are collective.
        """
        num_parts, own, first = max(map(len, groups)), groups[engine.worker_rank], self._num_trained(texts)
        found: Tensor | None = None
        with without_adapters(self.model):
            for index in range(num_parts):
                part = own[index] if index < len(own) else [0]
                vectors = self._encode(engine, texts, part)
                if found is None:
                    found = vectors.new_zeros(len(texts.token_ids) - first, vectors.shape[1])
                if index < len(own):
                    found[torch.tensor(part, device=vectors.device) - first] = vectors
        return found

    def _encode(self, engine: DeepSpeedEngine, texts: Texts, part: Sequence[int]) -> Tensor:
        with products_in(self.dtype, self.model, engine.device.type):
            return encode(self.model, [texts.token_ids[index] for index in part], self.encoding, device=engine.device)

    def loss_share(self, vectors_TD: Tensor, shares: Sequence[Texts], worker_rank: int) -> Tensor:
        """Compute this worker's share of the mean InfoNCE loss over all workers' pairs (van den Oord et al., 2018).

        Collective, since workers exchange their vectors.

        The negatives of a query are the passages and hard negatives of all workers, except those that answer it. In the
        other direction, the negatives of a passage are the queries that it does not answer.

        Args:
            vectors_TD: vectors of this worker's texts, in their order.
            shares: the texts of every worker, by rank.
            worker_rank: rank of this worker.

        Returns:
            A float32 scalar; the shares of all workers add up to the mean over all pairs.
        """
        texts = shares[worker_rank]
        num_pairs = [share.num_pairs for share in shares]
        num, first = texts.num_pairs, sum(num_pairs[:worker_rank])
        query_BD, passage_BD = vectors_TD[:num], vectors_TD[num : 2 * num]
        negative_ND = vectors_TD[2 * num : 2 * num + len(texts.negative_numbers)]
        passages_PD = _gathered(passage_BD, num_pairs)
        negatives_ND = _gathered(negative_ND, [len(share.negative_numbers) for share in shares])
        numbers = [*(share.passage_numbers for share in shares), *(share.negative_numbers for share in shares)]
        answers = _relevant_pairs(texts.relevant, np.concatenate(numbers))
        total = self._cross_entropy_sum(query_BD, torch.cat([passages_PD, negatives_ND]), first, answers)
        if self.both_directions:
            asked = _relevant_pairs([each for share in shares for each in share.relevant], texts.passage_numbers)
            answered = [(passage, query) for query, passage in asked]
            total = (total + self._cross_entropy_sum(passage_BD, _gathered(query_BD, num_pairs), first, answered)) / 2
        return total / sum(num_pairs)

    def _cross_entropy_sum(
        self, anchors_BD: Tensor, candidates_CD: Tensor, first: int, positives: Sequence[tuple[int, int]]
    ) -> Tensor:
        """Return the summed cross entropy of some anchors.

        Candidate `first + i` is the target of anchor i. The other pairs (anchor, candidate) in `positives` are positives
        too, so they are masked out of the softmax.
        """
        scores_BC = (anchors_BD @ candidates_CD.T).float() / self.temperature
        others = [(anchor, candidate) for anchor, candidate in positives if candidate != first + anchor]
        at = torch.tensor(others, dtype=torch.int64, device=scores_BC.device).reshape(-1, 2)
        scores_BC = scores_BC.index_put((at[:, 0], at[:, 1]), scores_BC.new_tensor(-torch.inf))
        targets_B = torch.arange(first, first + len(anchors_BD), device=scores_BC.device)
        return nn.functional.cross_entropy(scores_BC, targets_B, reduction="sum")


def install_packed_attention(model: Any, name: str) -> None:
    """Replace a model's attention by one for packed texts, in place; leave a model that cannot be changed as it is.

    A model can be changed if its class takes functions of transformers' AttentionInterface and its forward pass takes
    position_ids. `is_packed` tells whether it was changed; texts are padded if it was not.

    Args:
        model: a transformers model without a head; its weights stay.
        name: what the user calls the model; used in errors.
    """
    if attention.is_exchangeable(model) and "position_ids" in inspect.signature(model.forward).parameters:
        attention.install(model, name)


def is_packed(model: Any) -> bool:
    """Return whether a model takes packed texts, because `install_packed_attention` changed it."""
    return bool(model.config._attn_implementation == attention.NAME)


def encode(model: Any, token_ids: Sequence[np.ndarray], encoding: Encoding, *, device: torch.device) -> Tensor:
    """Encode tokenised texts into vectors, float32 [B, D], with gradients, in the order of the texts.

    Args:
        model: a transformers model without a head. Texts are packed if `is_packed(model)`, else padded.
        token_ids: the B texts, with prompts and special tokens.
        encoding: pooling, dimensions to keep, and whether vectors are normalised.
        device: device of the model.
    """
    pooled = (_packed if is_packed(model) else _padded)(model, token_ids, encoding, device)
    vectors = pooled[:, : encoding.dimensions]
    return normalized(vectors) if encoding.normalize else vectors.float()


def _padded(model: Any, token_ids: Sequence[np.ndarray], encoding: Encoding, device: torch.device) -> Tensor:
    """Encode texts one per row, padded on the right; return pooled vectors [B, H]."""
    input_ids, mask = padded_inputs(token_ids, padded_width(max(map(len, token_ids))))
    attention_mask = torch.from_numpy(mask).to(device)
    hidden = model(
        input_ids=torch.from_numpy(input_ids).to(device), attention_mask=attention_mask, use_cache=False
    ).last_hidden_state
    return pool(hidden, attention_mask, encoding.pooling)


def _packed(model: Any, token_ids: Sequence[np.ndarray], encoding: Encoding, device: torch.device) -> Tensor:
    """Encode texts packed into one row, with the padding as a last text; return pooled vectors [B, H]."""
    lengths = [len(ids) for ids in token_ids]
    num_tokens = sum(lengths)
    num_padding = padded_width(num_tokens) - num_tokens
    padding = [np.repeat(token_ids[-1][-1:], num_padding)] if num_padding else []
    ids, positions, places = packed_inputs([*token_ids, *padding])
    ends, longest = torch.from_numpy(places).to(device), max(*lengths, num_padding)
    hidden = model(
        input_ids=torch.from_numpy(ids).to(device),
        position_ids=torch.from_numpy(positions + first_position(model)).to(device),
        use_cache=False,
        cu_seq_lens_q=ends,
        cu_seq_lens_k=ends,
        max_length_q=longest,
        max_length_k=longest,
    ).last_hidden_state
    return pool_packed(hidden[0, :num_tokens], lengths, encoding.pooling)


def _with_frozen(vectors_TD: Tensor, frozen_FD: Tensor | None) -> Tensor:
    return vectors_TD if frozen_FD is None else torch.cat([vectors_TD, frozen_FD])


def _relevant_pairs(relevant: Sequence[np.ndarray], numbers: np.ndarray) -> list[tuple[int, int]]:
    """Return every (i, j) for which the passage numbers[j] is in relevant[i]."""
    places = defaultdict(list)
    for place, number in enumerate(numbers.tolist()):
        places[number].append(place)
    return [
        (index, place)
        for index, each in enumerate(relevant)
        for number in each.tolist()
        if number in places
        for place in places[number]
    ]


def _gathered(vectors_BD: Tensor, lengths: Sequence[int]) -> Tensor:
    """Gather the vectors of all workers, with gradients to each; `lengths` is the number of vectors per rank."""
    longest = max(lengths)
    if len(lengths) == 1 or longest == 0:
        return vectors_BD
    padded = nn.functional.pad(vectors_BD, (0, 0, 0, longest - len(vectors_BD)))
    vectors: list[Tensor] = torch.distributed.nn.functional.all_gather(padded)  # type: ignore[no-untyped-call]
    return torch.cat([each[:length] for each, length in zip(vectors, lengths, strict=True)])
