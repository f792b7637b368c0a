"""Read tokenised pairs of query and passage, with hard negatives, in training order.

Every worker holds all pairs in memory: 0.6 GB per million pairs of 150 tokens; hard negatives add their tokens.
"""

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from readapt_ray.seeds import random_generator
from readapt_ray.storage import Location
from readapt_ray.training.checkpoints import DataOrder
from readapt_ray.training.packing import padded_width

_IDS = pa.list_(pa.int32())
_SIDES: Final = ("left", "right")
PAIR_SCHEMA = pa.schema(
    [
        ("query_ids", _IDS),
        ("query_number", pa.int64()),
        ("passage_ids", _IDS),
        ("doc_number", pa.int64()),
        ("doc_id", pa.string()),
        ("negative_ids", pa.list_(_IDS)),
        ("negative_numbers", pa.list_(pa.int64())),
        # Null unless ingest split documents into passages; then the number of the document.
        ("document_number", pa.int64()),
        ("negative_document_numbers", pa.list_(pa.int64())),
    ]
)


class Texts(NamedTuple):
    """The tokenised texts of some pairs: queries, then the passages that answer them, then their hard negatives.

    Passages have numbers; equal texts have equal numbers. A passage in `relevant` is never a negative of that query,
    even if it is in the batch with another pair.
    """

    token_ids: list[np.ndarray]
    """Token ids of each text, in the order above."""
    num_pairs: int
    passage_numbers: np.ndarray
    """int64 [pairs]: numbers of the passages that answer the queries."""
    negative_numbers: np.ndarray
    """int64 [negatives]: numbers of the hard negatives."""
    relevant: list[np.ndarray]
    """For each pair, int64 numbers of all passages that answer its query: its own, the passages of the query's other
    pairs, and all other passages of the same documents."""


class PairReader:
    """All pairs of a folder in memory, read in training order: a seeded shuffle per epoch, the same on every worker.

    Args:
        folder: folder of Parquet files of PAIR_SCHEMA.
        batch_size: pairs per step over all workers; the last batch of an epoch may be smaller.
        num_epochs: number of times that each pair is trained on.
        seed: random seed of the shuffle.
    """

    def __init__(self, folder: Location, *, batch_size: int, num_epochs: int, seed: int) -> None:
        tables = []
        for file in folder.files(".parquet"):
            with file.open_input() as stream:
                tables.append(pq.read_table(stream, schema=PAIR_SCHEMA))
        table = pa.concat_tables(tables).combine_chunks()
        self._columns = {name: table[name].combine_chunks() for name in table.column_names}
        self._doc_numbers = table["doc_number"].to_numpy()
        queries = table["query_number"].to_numpy()
        order = np.argsort(queries, kind="stable")
        documents, of_negatives = (
            pc.coalesce(table[name], table[other]).combine_chunks()
            for name, other in (("document_number", "doc_number"), ("negative_document_numbers", "negative_numbers"))
        )
        self._documents_by_query = documents.to_numpy()[order]
        self._numbers_by_document = np.unique(
            np.stack(
                [
                    np.concatenate([documents.to_numpy(), pc.list_flatten(of_negatives).to_numpy()]),
                    np.concatenate([self._doc_numbers, pc.list_flatten(table["negative_numbers"]).to_numpy()]),
                ],
                axis=1,
            ),
            axis=0,
        )
        self._query_starts, self._query_ends = (np.searchsorted(queries[order], queries, side) for side in _SIDES)
        self.data_order = DataOrder(num_units=table.num_rows, batch_size=batch_size, num_epochs=num_epochs, seed=seed)

    def steps(self, first_step: int) -> Iterator[np.ndarray]:
        """Yield the row numbers of the pairs of each step, from step `first_step` to the last step of the last epoch.

        Each array is the batch of one step over all workers, int64 [batch_size], in training order; the last one of an
        epoch may be shorter. The numbers are rows of the files. Steps count from 0 over all epochs.
        """
        data_order = self.data_order
        for step in range(first_step, data_order.num_steps):
            epoch, first = data_order.consumed(step)
            order = random_generator(data_order.seed, "data order", epoch).permutation(data_order.num_units)
            yield order[first : first + data_order.batch_size]

    def doc_numbers(self, pairs: np.ndarray) -> np.ndarray:
        """Return the numbers of the passages that answer the queries of these pairs, one per pair.

        Args:
            pairs: numbers of pairs, from `steps`.
        """
        return np.asarray(self._doc_numbers[pairs])

    def doc_ids(self, numbers: Sequence[int]) -> list[str]:
        """Return the doc_ids of passages by their numbers, quoted for an error message.

        Args:
            numbers: from `doc_numbers`; a number that only hard negatives have raises KeyError.
        """
        names = dict(zip(self._doc_numbers.tolist(), self._columns["doc_id"].to_pylist(), strict=True))
        return [repr(names[number]) for number in numbers]

    def mean_tokens(self) -> float:
        """Return the mean number of tokens of all queries and passages together; hard negatives do not count."""
        lengths = [pc.sum(pc.list_value_length(self._columns[name])).as_py() for name in ("query_ids", "passage_ids")]
        return float(sum(lengths)) / (2 * self.data_order.num_units)

    def most_tokens(self, num_workers: int) -> int:
        """Return an upper bound of the tokens of one worker in one step, with padding and hard negatives."""
        negatives = self._columns["negative_ids"]
        ids = [self._columns["query_ids"], self._columns["passage_ids"], negatives.flatten()]
        longest = max(pc.max(pc.list_value_length(each)).as_py() or 0 for each in ids)
        num_texts = 2 + (pc.max(pc.list_value_length(negatives)).as_py() or 0)
        return -(-self.data_order.batch_size // num_workers) * num_texts * padded_width(longest)

    def read(self, pairs: np.ndarray) -> Texts:
        """Return the tokenised texts of these pairs, given by their numbers from `steps`, in this order."""
        at = [int(pair) for pair in pairs]
        queries = [self._columns["query_ids"][pair].values.to_numpy() for pair in at]
        passages = [self._columns["passage_ids"][pair].values.to_numpy() for pair in at]
        negatives = [ids.values.to_numpy() for pair in at for ids in self._columns["negative_ids"][pair]]
        numbers = [self._columns["negative_numbers"][pair].values.to_numpy() for pair in at]
        return Texts(
            token_ids=queries + passages + negatives,
            num_pairs=len(at),
            passage_numbers=self._doc_numbers[pairs],
            negative_numbers=np.concatenate([np.empty(0, np.int64), *numbers]),
            relevant=[self._answers(pair) for pair in at],
        )

    def _answers(self, pair: int) -> np.ndarray:
        """Return the numbers of all passages that answer the query of a pair."""
        documents = np.unique(self._documents_by_query[self._query_starts[pair] : self._query_ends[pair]])
        starts, ends = (np.searchsorted(self._numbers_by_document[:, 0], documents, side) for side in _SIDES)
        rows = [self._numbers_by_document[start:end, 1] for start, end in zip(starts, ends, strict=True)]
        return np.unique(np.concatenate(rows))
