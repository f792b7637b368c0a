"""Encode a data shard in an actor of embed, and write its file of vectors.

In: rows of Ray Data, one data shard each with token ids or texts, and the job. Out: `vectors/part-00000.parquet`,
written as a whole. An actor holds one model and works on two shards at a time: it computes the vectors of one while it
tokenises the other (if no task did that) or writes it. It needs memory for the model and two shards.
"""

import logging
import threading
import time
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from readapt_ray import errors
from readapt_ray.cluster import on_worker
from readapt_ray.cluster.embed_job import EmbedJob, cell
from readapt_ray.cluster.shard_tokens import tokenize_shard
from readapt_ray.retrieval.shard_ledger import COUNTS, SECONDS, read_figures
from readapt_ray.retrieval.shard_plan import shard_name
from readapt_ray.retrieval.vector_files import to_stored_columns, write_stored

logger = logging.getLogger("readapt_ray")

SHARDS_AT_A_TIME = 2


class ShardEncoder:
    """An actor that holds the model; each call encodes one shard and writes its file of vectors.

    The model is loaded when the first text is encoded. Two threads may call it at the same time.
    """

    def __init__(self, job: EmbedJob) -> None:
        self._job = job
        self._encoder: Any = None
        self._computing = threading.Lock()
        self._idle_since_s: float | None = None

    def __call__(self, shard: pa.Table) -> pa.Table:
        """Encode a shard and return a row with its figures, or with an error.

        A file of the shard that the same encoder wrote before is kept, and its figures are returned. A row that already
        has an error is returned as one. An error is returned as a value, because Ray Data would bury the message of a
        raised one in stack traces.
        """
        number, error, message = (shard[name][0].as_py() for name in ("number", "error", "message"))
        figures: dict[str, Any] = dict.fromkeys(COUNTS, 0) | dict.fromkeys(SECONDS, 0.0)
        if not error:
            try:
                figures |= self._encode(number, shard)
            except errors.ReadaptError as caught:
                error, message = type(caught).__name__, str(caught)
            except Exception as caught:
                logger.exception("data shard %d failed", number)
                error, message = errors.WorkerError.__name__, f"data shard {number}: {type(caught).__name__}: {caught}"
        row = {"number": number, "error": error, "message": message, "batch_tokens": self._lowered_budget(), **figures}
        return pa.Table.from_pylist([row])

    def _lowered_budget(self) -> int:
        """Return the batch size in tokens if the encoder had to lower it for lack of memory; else 0."""
        tokens = self._encoder.batch_tokens if self._encoder else 0
        return tokens if self._encoder and tokens < self._encoder.first_batch_tokens else 0

    def _encode(self, number: int, shard: pa.Table) -> dict[str, Any]:
        """Encode the distinct texts of a shard, copy earlier vectors, and write one vector per row.

        Keep a file that exists: a lost actor may have written it and not reported it.
        """
        file, doc_ids = self._job.vectors / shard_name(number), cell(shard, "doc_id")
        if file.is_file():
            written = read_figures(file, num_rows=len(doc_ids), made_by=self._job.encoder["fingerprint"])
            if written:
                return written
        if "tokens" not in shard.column_names:
            shard = tokenize_shard(
                shard, lambda texts, titles: self._loaded().tokenize_with_losses(texts, "passage", titles)
            )
        place = cell(shard, "vector").to_numpy()
        copied, copied_place = np.unique(-1 - place[place < 0], return_inverse=True)
        stored, metadata = self._encoded(shard, place)
        num_encoded = len(cell(shard, "lengths"))
        if len(copied) and self._job.earlier is not None:
            stored.append(self._job.earlier.take(copied, ("vector", "scale")))
            place = place.copy()
            place[place < 0] = num_encoded + copied_place
        table = pa.concat_tables(stored).take(pa.array(place))
        hashes = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(16), len(place), [None, pa.py_buffer(cell(shard, "hashes").to_numpy().tobytes())]
        )
        dimension = table.schema.field("vector").type.list_size
        metadata |= {
            "encoder": {**self._job.encoder, "dimension": dimension},
            "num_copied": int((cell(shard, "vector").to_numpy() < 0).sum()),
        }
        num_bytes = write_stored(file, doc_ids.to_pylist(), table, hashes, metadata=metadata)
        figures = {name: float(metadata[name]) for name in SECONDS} | {name: metadata.get(name, 0) for name in COUNTS}
        num_left_out = table["vector"].null_count
        figures |= {"num_rows": len(place) - num_left_out, "num_left_out": num_left_out}
        return figures | {"num_bytes": num_bytes, "dimension": dimension}

    def _encoded(self, shard: pa.Table, place: NDArray[np.int64]) -> tuple[list[pa.Table], dict[str, Any]]:
        """Encode the distinct texts of a shard; return the vectors as stored, and counts and seconds as metadata."""
        lengths, losses = (cell(shard, name).to_numpy() for name in ("lengths", "losses"))
        metadata: dict[str, Any] = {"num_encoded": len(lengths), "num_tokens": 0, "num_positions": 0}
        metadata |= {"num_truncated": int((losses > 0).sum()), "num_lost": int(losses.sum())}
        metadata |= {"encode_s": _seconds(0.0), "wait_s": _seconds(0.0)}
        if not len(lengths):
            return [], metadata
        tokens = np.split(cell(shard, "tokens").to_numpy(), np.cumsum(lengths[:-1]))
        encoder = self._loaded()
        with self._computing:
            started_s = time.monotonic()
            before = encoder.work
            vectors = encoder.encode_usable(tokens)
            ended_s = time.monotonic()
            metadata |= {
                "num_tokens": encoder.work.num_tokens - before.num_tokens,
                "num_positions": encoder.work.num_positions - before.num_positions,
                "num_again": encoder.work.num_again - before.num_again,
                "encode_s": _seconds(ended_s - started_s),
                "wait_s": _seconds(started_s - self._idle_since_s if self._idle_since_s else 0.0),
            }
            self._idle_since_s = ended_s
        _, first = np.unique(place[place >= 0], return_index=True)
        doc_ids = cell(shard, "doc_id").take(pa.array(np.flatnonzero(place >= 0)[first])).to_pylist()
        job = self._job
        return [to_stored_columns(doc_ids, vectors, job.vector_dtype, max_left_out=job.max_left_out)], metadata

    def _loaded(self) -> Any:
        with self._computing:
            self._encoder = self._encoder or on_worker.load_encoder(
                self._job.model_name,
                self._job.encoding,
                self._job.dtype,
                base=self._job.base_name,
                expected=self._job.encoder["fingerprint"],
                driver_node=self._job.driver_node,
                num_threads=self._job.num_threads,
                batch_tokens=self._job.batch_tokens,
            )
            return self._encoder


def _seconds(value: float) -> str:
    """Format seconds at one width, so that the size of a file does not depend on the clock."""
    return f"{value:012.3f}"
