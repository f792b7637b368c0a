"""What the tasks and actors of embed share: the job, and the row of Ray Data that a data shard is on its way.

A row is a table of one row. It holds the number of the shard, the error that a step ran into, and arrays as cells.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from readapt_ray import errors
from readapt_ray.catalog.encoding import Encoding
from readapt_ray.cluster.digest_join import Matches
from readapt_ray.retrieval.parquet_rows import ParquetRows
from readapt_ray.storage import Location

logger = logging.getLogger("readapt_ray")


@dataclass(frozen=True)
class EmbedJob:
    """What tasks and actors must know: the same for all of them."""

    model_name: str
    base_name: str
    """Base of the model, if it is factors."""
    tokenizer: str
    """Fingerprint of the tokenizer."""
    encoder: dict[str, Any]
    """What the metadata of the files say of the encoder."""
    encoding: Encoding
    dtype: str
    vector_dtype: str
    batch_tokens: int | None
    passages: Location
    """Folder of the passages."""
    output: Location
    """Folder of the artifact."""
    earlier: ParquetRows | None = None
    """Vectors of an earlier corpus, to be copied from."""
    dimension: int = 0
    """Numbers in one of them."""
    matches: Matches | None = None
    """Which passages have one of them."""
    plan: str = ""
    """Fingerprint of the plan of the shards on earlier vectors; empty without earlier vectors."""
    max_left_out: int = 0
    """Passages without a usable vector that a shard may have."""
    rows_per_shard: int = 0
    """Passages of a shard; 0 for a sample, whose shards differ."""
    driver_node: str = ""
    num_threads: int = 1
    """Threads of an actor."""

    @property
    def vectors(self) -> Location:
        """Folder that the vectors are written to."""
        return self.output / "vectors"


def or_error(number: int, make: Callable[[], pa.Table]) -> pa.Table:
    """Hand an error on as a row: raised here, Ray Data would bury its message in stack traces."""
    try:
        return make()
    except errors.ReadaptError as error:
        return shard_row(number, error=type(error).__name__, message=str(error))
    except Exception as error:
        logger.exception("data shard %d failed", number)
        message = f"data shard {number}: {type(error).__name__}: {error}"
        return shard_row(number, error=errors.WorkerError.__name__, message=message)


def shard_row(number: int, *, error: str = "", message: str = "", **cells: pa.Array) -> pa.Table:
    """Return a table of one row, in which each array is one cell."""
    return pa.table(
        {
            "number": [number],
            "error": [error],
            "message": [message],
            **{name: _one_cell(array) for name, array in cells.items()},
        }
    )


def _one_cell(array: pa.Array) -> pa.LargeListArray:
    """Put an array into a single cell; nothing is copied."""
    return pa.LargeListArray.from_arrays(pa.array([0, len(array)], pa.int64()), array)


def cell(shard: pa.Table, name: str) -> pa.Array:
    """Return the array in a cell of a table of one row; nothing is copied."""
    return shard[name].combine_chunks().flatten()
