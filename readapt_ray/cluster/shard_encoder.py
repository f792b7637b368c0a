"""What an embedding actor does: a data shard in, a file of vectors out.

In: the row numbers of a shard and the job that all actors share. Out: `vectors/part-00000.parquet`, written
whole. An actor holds one model and works on two shards at a time: while the vectors of one are computed, the
other is read, tokenised or written. Memory is the model and two shards.
"""

import logging
import pickle
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from readapt_ray import errors
from readapt_ray.catalog.encoding import Encoding
from readapt_ray.cluster import on_worker
from readapt_ray.errors import CorpusError
from readapt_ray.records import content_hash
from readapt_ray.retrieval.parquet_rows import ParquetRows
from readapt_ray.retrieval.shard_plan import PASSAGE_COLUMNS, DataShard
from readapt_ray.retrieval.vector_files import stored_vectors, write_stored
from readapt_ray.storage import Location

logger = logging.getLogger("readapt_ray")

SHARDS_AT_A_TIME = 2


@dataclass(frozen=True)
class EmbedJob:
    """What an actor must know: the same for all of them."""

    model_name: str
    encoder: dict[str, Any]
    """What the metadata of the files say of the encoder."""
    encoding: Encoding
    dtype: str
    vector_dtype: str
    batch_tokens: int | None
    passages: ParquetRows
    earlier: ParquetRows | None
    """Vectors of an earlier corpus, to be copied from."""
    vectors: Location
    """Folder that the vectors are written to."""
    max_left_out: int = 0
    """Passages without a usable vector that a shard may have."""


class ShardEncoder:
    """An actor: holds the model, and turns one shard a call from passages into a file of vectors."""

    def __init__(self, job: EmbedJob, driver_node: str, num_threads: int) -> None:
        self._job, self._driver_node, self._num_threads = job, driver_node, num_threads
        self._encoder: Any = None
        self._computing = threading.Lock()
        self._idle_since_s: float | None = None

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """An error is handed back as a value: raised here, Ray Data would bury its message in stack traces."""
        rows = []
        for pickled in batch["shard"].tolist():
            shard: DataShard = pickle.loads(pickled)  # written by this run's own driver
            try:
                self._encode(shard)
                rows.append((len(shard), "", "", self._lowered_budget()))
            except errors.ReadaptError as error:
                rows.append((0, type(error).__name__, str(error), 0))
            except Exception as error:
                logger.exception("data shard %s failed", shard.name)
                message = f"data shard {shard.name}: {type(error).__name__}: {error}"
                rows.append((0, errors.WorkerError.__name__, message, 0))
        return dict(
            zip(("num_rows", "error", "message", "batch_tokens"), map(np.array, zip(*rows, strict=True)), strict=True)
        )

    def _lowered_budget(self) -> int:
        """The budget in tokens to which a lack of memory brought the encoder down; 0 where there was enough."""
        tokens = self._encoder.batch_tokens if self._encoder else 0
        return tokens if self._encoder and tokens < self._encoder.first_batch_tokens else 0

    def _encode(self, shard: DataShard) -> None:
        """A text is encoded once, a text that was encoded before is copied, and each row takes its representative's vector."""
        doc_ids = self._job.passages.take(shard.rows, ("doc_id",))["doc_id"].to_pylist()
        representatives = np.unique(shard.representatives)
        fresh, copied = (
            representatives[shard.earlier[representatives] < 0],
            representatives[shard.earlier[representatives] >= 0],
        )
        stored, metadata = self._encoded(shard, fresh)
        if len(copied) and self._job.earlier is not None:
            stored.append(self._job.earlier.take(shard.earlier[copied], ("vector", "scale")))
        place = np.empty(len(shard), np.int64)
        place[np.concatenate([fresh, copied])] = np.arange(len(representatives))
        table = pa.concat_tables(stored).take(pa.array(place[shard.representatives]))
        hashes = pa.array([each.tobytes() for each in shard.hashes], pa.binary(16))
        metadata |= {
            "encoder": {**self._job.encoder, "dimension": table.schema.field("vector").type.list_size},
            "num_copied": int((shard.earlier >= 0).sum()),
        }
        write_stored(self._job.vectors / shard.name, doc_ids, table, hashes, metadata=metadata)

    def _encoded(self, shard: DataShard, places: NDArray[np.int64]) -> tuple[list[pa.Table], dict[str, Any]]:
        """The stored vectors of the passages at these places of a shard, and what making them took."""
        metadata: dict[str, Any] = {"num_encoded": len(places), "num_tokens": 0, "num_positions": 0}
        metadata |= {"encode_s": _seconds(0.0), "wait_s": _seconds(0.0)}
        if not len(places):
            return [], metadata
        columns = self._job.passages.take(shard.rows[places], PASSAGE_COLUMNS).to_pydict()
        doc_ids, titles, texts = (columns[name] for name in PASSAGE_COLUMNS)
        for doc_id, title, text, planned in zip(doc_ids, titles, texts, shard.hashes[places], strict=True):
            if text is None or content_hash(title, text) != planned.tobytes():
                raise CorpusError(
                    f"passage {doc_id!r} changed while the corpus was embedded; run `readapt embed` again"
                )
        encoder = self._loaded()
        ids, losses = encoder.tokenize_with_losses(texts, "passage", [title or "" for title in titles])
        metadata |= {"num_truncated": sum(map(bool, losses)), "num_lost": sum(losses)}
        for doc_id, row in zip(doc_ids, ids, strict=True):
            if not row:
                raise CorpusError(f"passage {doc_id!r} gives no token, so it has no vector; leave it out of the corpus")
        with self._computing:
            started_s = time.monotonic()
            before = encoder.work
            vectors = encoder.encode_usable(ids)
            ended_s = time.monotonic()
            metadata |= {
                "num_tokens": encoder.work.num_tokens - before.num_tokens,
                "num_positions": encoder.work.num_positions - before.num_positions,
                "num_again": encoder.work.num_again - before.num_again,
                "encode_s": _seconds(ended_s - started_s),
                "wait_s": _seconds(started_s - self._idle_since_s if self._idle_since_s else 0.0),
            }
            self._idle_since_s = ended_s
        job = self._job
        return [stored_vectors(doc_ids, vectors, job.vector_dtype, max_left_out=job.max_left_out)], metadata

    def _loaded(self) -> Any:
        with self._computing:
            self._encoder = self._encoder or on_worker.load_encoder(
                self._job.model_name,
                self._job.encoding,
                self._job.dtype,
                due=self._job.encoder["fingerprint"],
                driver_node=self._driver_node,
                num_threads=self._num_threads,
                batch_tokens=self._job.batch_tokens,
            )
            return self._encoder


def _seconds(value: float) -> str:
    """At one width, so that the size of a file does not depend on the clock."""
    return f"{value:012.3f}"


def pickled_shards(shards: Sequence[DataShard]) -> list[dict[str, bytes]]:
    """Return the rows of the data set that the actors map over: one pickled shard each."""
    return [{"shard": pickle.dumps(shard)} for shard in shards]
