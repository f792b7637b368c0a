"""What an embedding actor does: a data shard in, a file of vectors out.

In: the rows of a shard and the job that all actors share. Out: `vectors/part-00000.parquet`, written
whole. An actor holds one model; memory is that and a shard.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from readapt_ray import errors
from readapt_ray.catalog.models import find_model
from readapt_ray.catalog.retrievers import Encoding
from readapt_ray.errors import CorpusError, FingerprintMismatchError
from readapt_ray.retrieval.vector_files import RowRange, read_rows, write_vectors
from readapt_ray.storage import Location

logger = logging.getLogger("readapt_ray")

PASSAGE_COLUMNS = ("doc_id", "title", "text")


@dataclass(frozen=True)
class DataShard:
    """A numbered piece of the corpus, and where its vectors go."""

    number: int
    ranges: tuple[RowRange, ...]

    @property
    def name(self) -> str:
        """Name of the file of its vectors."""
        return f"part-{self.number:05d}.parquet"

    @property
    def num_rows(self) -> int:
        """Passages in it."""
        return sum(each.num_rows for each in self.ranges)


@dataclass(frozen=True)
class EmbedJob:
    """What an actor must know: the same for all of them."""

    model_name: str
    weights: str
    """Fingerprint of the model's files where the driver runs."""
    node_id: str
    """The driver's node."""
    encoder: dict[str, Any]
    """What the metadata of the files say of the encoder."""
    encoding: Encoding
    dtype: str
    vector_dtype: str
    batch_tokens: int | None
    num_threads: int
    passages: Location
    """Folder of the corpus files."""
    vectors: Location
    """Folder that the vectors are written to."""


class ShardEncoder:
    """An actor: holds the model, and turns one shard a call from passages into a file of vectors."""

    def __init__(self, job: EmbedJob) -> None:
        self._job = job
        self._encoder: Any = None

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """An error is handed back as a value: raised here, Ray Data would bury its message in stack traces."""
        rows = []
        for number, ranges in zip(batch["number"].tolist(), batch["ranges"].tolist(), strict=True):
            shard = DataShard(number, tuple(RowRange(**each) for each in json.loads(ranges)))
            try:
                self._encode(shard)
                rows.append((shard.num_rows, "", ""))
            except errors.ReadaptError as error:
                rows.append((0, type(error).__name__, str(error)))
            except Exception as error:
                logger.exception("data shard %s failed", shard.name)
                rows.append(
                    (0, errors.WorkerError.__name__, f"data shard {shard.name}: {type(error).__name__}: {error}")
                )
        num_rows, kinds, messages = zip(*rows, strict=True)
        return {"num_rows": np.array(num_rows), "error": np.array(kinds), "message": np.array(messages)}

    def _encode(self, shard: DataShard) -> None:
        import pyarrow as pa

        job = self._job
        tables = [
            read_rows(job.passages / each.name, each.start, each.num_rows, PASSAGE_COLUMNS) for each in shard.ranges
        ]
        columns = pa.concat_tables(tables).to_pydict()
        doc_ids = columns["doc_id"]
        self._encoder = self._encoder or _load_encoder(job)
        for doc_id, text in zip(doc_ids, columns["text"], strict=True):
            if text is None:
                raise CorpusError(f"passage {doc_id!r} has no text; ingest the corpus again")
        ids = self._encoder.tokenize(columns["text"], "passage", [title or "" for title in columns["title"]])
        for doc_id, row in zip(doc_ids, ids, strict=True):
            if not row:
                raise CorpusError(f"passage {doc_id!r} gives no token, so it has no vector; leave it out of the corpus")
        metadata = {
            "encoder": {**job.encoder, "dimension": self._encoder.dimension},
            "num_tokens": sum(map(len, ids)),
        }
        vectors = self._encoder.encode_ids(ids)
        write_vectors(job.vectors / shard.name, doc_ids, vectors, dtype=job.vector_dtype, metadata=metadata)


def _load_encoder(job: EmbedJob) -> Any:
    """The encoder, on this actor's device; on another node than the driver's, seen to have the same weights."""
    import ray
    import torch

    from readapt_ray.retrieval.encoder import Encoder

    torch.set_num_threads(job.num_threads)
    model = find_model(job.model_name)
    if ray.get_runtime_context().get_node_id() != job.node_id and model.fingerprint() != job.weights:
        raise FingerprintMismatchError(
            f"{job.model_name!r} has other weights on node {ray.util.get_node_ip_address()} than where the stage was started; "
            f"put the same files on all nodes, or give a URI"
        )
    return Encoder.load(model, encoding=job.encoding, dtype=job.dtype, batch_tokens=job.batch_tokens)
