"""Send blocks to Ray Train workers through Ray Data, in the data order.

A read task takes a piece of the steps (`training/blocks.py`), reads its blocks once, and cuts them into the shares of
all workers. It yields one row per worker for up to 64 steps. Ray Data gives the rows to the workers in turn, so each
worker gets its own rows, for any number of workers. The tasks reserve no CPU, so they also run if workers have reserved
all CPUs.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import ray
import ray.data
import ray.train
from ray.data import ExecutionOptions, ExecutionResources
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from readapt_ray.cluster.connection import cause_of
from readapt_ray.errors import WorkerError
from readapt_ray.storage import Location
from readapt_ray.training import blocks
from readapt_ray.training.blocks import Piece, RowGroups
from readapt_ray.training.checkpoints import DataOrder, steps_done
from readapt_ray.training.shares import BatchSettings, Share, shares_to_table, table_to_shares

_ROW_TOKENS = 1 << 18
_ROW_STEPS = 64
_CHUNK_TOKENS = 1 << 24
"""Most tokens, over the rows of all workers, that a task holds at once: 0.4 GB."""
_WORKERS_PER_TASK = 4
"""Workers per read task: a core reads and cuts a few million tokens per second."""
_BYTES_PER_WORKER = 64 << 20
"""Object store memory for rows that wait for a worker."""
_ROWS_AHEAD = 2
_SHARES_AHEAD = 4


class BlockStream(ray.train.DataConfig):  # type: ignore[misc]
    """The data configuration of Ray Train: each start of the workers gets the data after the last checkpoint's step.

    Without a checkpoint they get all data. Workers read it with `receive`.

    Args:
        row_groups: row groups of the files of blocks.
        data_order: which blocks are trained on, in which order.
        batch_settings: how batches are divided into micro-batches.
        checkpoints: folder of the checkpoints.
    """

    name = "blocks"

    def __init__(
        self, row_groups: RowGroups, data_order: DataOrder, batch_settings: BatchSettings, checkpoints: Location
    ) -> None:
        super().__init__()
        self._row_groups = row_groups
        self.data_order = data_order
        self._batch_settings = batch_settings
        self._checkpoints = checkpoints

    @staticmethod
    def no_dataset() -> None:
        """Return None, a placeholder for the dataset that Ray Train wants before the number of workers is known."""

    def configure(self, *, world_size: int, **_: Any) -> list[dict[str, Any]]:
        """Return the data iterator of each worker, by rank, as `{"blocks": iterator}`.

        Ray Train calls this in an actor, when all workers ask for data.
        """
        first_step = steps_done(self._checkpoints, self.data_order)
        source = _Source(self._row_groups, self.data_order, self._batch_settings, first_step, world_size)
        dataset = ray.data.read_datasource(
            source,
            num_cpus=0,
            concurrency=1 + world_size // _WORKERS_PER_TASK,
            override_num_blocks=source.num_tasks,
        )
        context = dataset.context
        context.execution_options = ExecutionOptions(
            preserve_order=True,
            resource_limits=ExecutionResources.for_limits(object_store_memory=(4 + world_size) * _BYTES_PER_WORKER),
        )
        context.enable_progress_bars = False
        context.execution_no_progress_timeout_s = -1
        # Each row becomes a block. Blocks of several rows would be merged and cut by size, and not be given in turn.
        context.target_max_block_size = 1
        return [{self.name: each} for each in dataset.streaming_split(world_size, equal=False)]


class _Source(Datasource):  # type: ignore[misc]
    """A source of rows for all workers: one row per worker for each chunk of steps, by rank."""

    def __init__(
        self,
        row_groups: RowGroups,
        data_order: DataOrder,
        batch_settings: BatchSettings,
        first_step: int,
        num_workers: int,
    ) -> None:
        shared = ray.put(row_groups)
        self._tasks = [
            _read_task(shared, piece, data_order.batch_size, batch_settings, num_workers)
            for piece in blocks.pieces(row_groups, data_order, first_step)
        ]
        self.num_tasks = len(self._tasks)

    def estimate_inmemory_data_size(self) -> int | None:
        """Return None: the size is unknown."""
        return None

    def get_read_tasks(self, *_: Any, **__: Any) -> list[ReadTask]:
        """Return one read task per piece of the steps."""
        return self._tasks


def _read_task(
    row_groups: Any, piece: Piece, batch_size: int, batch_settings: BatchSettings, num_workers: int
) -> ReadTask:
    def read() -> Iterator[pa.Table]:
        return rows_of(ray.get(row_groups), piece, batch_size, batch_settings, num_workers)

    return ReadTask(read, BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None))


def rows_of(
    row_groups: RowGroups, piece: Piece, batch_size: int, batch_settings: BatchSettings, num_workers: int
) -> Iterator[pa.Table]:
    """Yield the rows of a piece: for each chunk of up to 64 steps, one row per worker with its shares, by rank.

    Each row is a table of one row and the column `shares`; `decode_shares` reads it.

    Args:
        row_groups: row groups of the files of blocks.
        piece: the steps to read.
        batch_size: blocks per step, over all workers.
        batch_settings: how batches are divided into micro-batches.
        num_workers: number of workers.
    """
    most_slots = min(_ROW_TOKENS * num_workers, _CHUNK_TOKENS)
    waiting: list[list[Share]] = []
    num_slots = 0
    for step, batch in enumerate(blocks.read_steps(row_groups, piece, batch_size), start=piece.first_step):
        shares = batch_settings.shares(batch, num_workers, step)
        waiting.append(shares)
        num_slots += shares[0].num_slots
        if len(waiting) == _ROW_STEPS or num_slots >= most_slots:
            yield from map(_row, zip(*waiting, strict=True))
            waiting, num_slots = [], 0
    yield from map(_row, zip(*waiting, strict=True))


def _row(shares: tuple[Share, ...]) -> pa.Table:
    """Return a table of one row, whose cell holds the shares as an Arrow IPC stream."""
    table = shares_to_table(shares)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data = sink.getvalue()
    offsets = pa.array([0, len(data)], pa.int64()).buffers()[1]
    row = pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, data])
    return pa.table({"shares": row})


def decode_shares(rows: pa.Table) -> Iterator[Share]:
    """Yield the shares in rows that `rows_of` made: one per step, in the order of the steps."""
    for data in rows["shares"]:
        yield from table_to_shares(pa.ipc.open_stream(data.as_buffer()).read_all())


def receive(num_steps: int) -> Callable[[int], Iterator[Share]]:
    """Start a thread that fetches this Ray Train worker's shares; return a function that yields one share per step.

    Call it before the model is loaded, so that the stream fills meanwhile.

    Args:
        num_steps: number of steps of the run.

    Returns:
        A function of the first step. The stream already begins after the newest checkpoint, so this must be that
        checkpoint's step: nothing is skipped, and the shares of `first_step` to `num_steps - 1` follow. While it
        yields, it raises what a read task raised, or RuntimeError if the data ends early.
    """
    fetched = _ahead(_fetched())

    def shares(first_step: int) -> Iterator[Share]:
        for step in range(first_step, num_steps):
            if (share := next(fetched, None)) is None:
                raise RuntimeError(f"the data of step {step} and after did not come")
            yield share

    return shares


def _fetched() -> Iterator[Share]:
    try:
        iterator = ray.train.get_dataset_shard(BlockStream.name)
        for row in iterator.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=_ROWS_AHEAD):
            yield from decode_shares(row)
    except ray.exceptions.RayError as error:
        cause = cause_of(error)
        # Keep Ray's error for a lost process or node: then the workers are restarted.
        raise error if isinstance(cause, WorkerError) else cause from None


def _ahead(shares: Iterator[Share]) -> Iterator[Share]:
    """Start fetching in a thread; return an iterator over the shares as they arrive."""
    thread = ThreadPoolExecutor(1, thread_name_prefix="shares")
    pending = deque(thread.submit(next, shares, None) for _ in range(_SHARES_AHEAD))

    def arrived() -> Iterator[Share]:
        while (share := pending.popleft().result()) is not None:
            pending.append(thread.submit(next, shares, None))
            yield share

    return arrived()
