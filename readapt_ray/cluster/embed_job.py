"""Define the job that all tasks and actors of embed share, and the row in which Ray Data carries a data shard.

A row is a table of one row: the number of the shard, the error of a failed step, and arrays as cells.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from readapt_ray import errors
from readapt_ray.catalog.encoding import Encoding
from readapt_ray.cluster.earlier_vectors import Matches
from readapt_ray.retrieval.parquet_rows import ParquetRows
from readapt_ray.storage import Location

logger = logging.getLogger("readapt_ray")


@dataclass(frozen=True)
class EmbedJob:
    """The options and inputs that all tasks and actors of embed share."""

    model_name: str
    """Name by which every worker can open the model, from `on_worker.model_name`."""
    base_name: str
    """Name of the base model if the model is factors, else empty."""
    tokenizer: str
    """Fingerprint of the tokenizer."""
    encoder: dict[str, Any]
    """The entry `encoder` for the metadata of the files: fingerprint and so on."""
    encoding: Encoding
    dtype: str
    """Data type that the model computes in."""
    vector_dtype: str
    """Data type of the stored vectors."""
    batch_tokens: int | None
    """Most tokens per batch; None lets the encoder choose."""
    passages: Location
    """Folder of the passages."""
    output: Location
    """Folder of the artifact."""
    earlier: ParquetRows | None = None
    """Vectors of an earlier corpus, to copy from; None without earlier vectors."""
    dimension: int = 0
    """Dimension of the earlier vectors; 0 without."""
    matches: Matches | None = None
    """For each passage, the row of its earlier vector; None without earlier vectors."""
    plan: str = ""
    """Fingerprint of the shard plan that uses earlier vectors; empty without earlier vectors."""
    max_left_out: int = 0
    """Most passages of a shard that may be left out because their vector is not finite, or zero."""
    rows_per_shard: int = 0
    """Passages per shard; 0 for a sample, whose shards have different sizes."""
    driver_node: str = ""
    """Ray node id of the driver, from `on_worker.this_node`."""
    num_threads: int = 1
    """Threads per actor."""

    @property
    def vectors(self) -> Location:
        """Return the folder that the vectors are written to."""
        return self.output / "vectors"


def or_error(number: int, make: Callable[[], pa.Table]) -> pa.Table:
    """Return what `make` returns; if it raises, return a row with the name of the error's class and its message.

    Ray Data would bury the message of a raised error in stack traces. Errors other than ReadaptError are logged and
    become a WorkerError.

    Args:
        number: number of the data shard.
        make: makes the row of the shard.
    """
    try:
        return make()
    except errors.ReadaptError as error:
        return shard_row(number, error=type(error).__name__, message=str(error))
    except Exception as error:
        logger.exception("data shard %d failed", number)
        message = f"data shard {number}: {type(error).__name__}: {error}"
        return shard_row(number, error=errors.WorkerError.__name__, message=message)


def shard_row(number: int, *, error: str = "", message: str = "", **cells: pa.Array) -> pa.Table:
    """Return the row of a data shard: a table of one row, in which each array is one cell.

    Args:
        number: number of the shard.
        error: class name of a ReadaptError; empty if all is well.
        message: message of the error.
        cells: arrays of any length by column; `cell` reads one.
    """
    return pa.table(
        {
            "number": [number],
            "error": [error],
            "message": [message],
            **{name: _one_cell(array) for name, array in cells.items()},
        }
    )


def _one_cell(array: pa.Array) -> pa.LargeListArray:
    """Put an array into a single cell, without a copy."""
    return pa.LargeListArray.from_arrays(pa.array([0, len(array)], pa.int64()), array)


def cell(shard: pa.Table, name: str) -> pa.Array:
    """Return the array in one cell of a data shard's row (made by `shard_row`), without a copy."""
    return shard[name].combine_chunks().flatten()
