"""Ray Data hands every worker its own shares, in order, also where workers have reserved all CPUs."""

from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import ray
import torch
from ray.exceptions import RayActorError, RayTaskError

from readapt_ray.cluster import block_stream
from readapt_ray.cluster.block_stream import BlockStream
from readapt_ray.errors import CorruptFileError, ReadaptError
from readapt_ray.storage import Location
from readapt_ray.training import blocks
from readapt_ray.training.blocks import RowGroups
from readapt_ray.training.checkpoints import CheckpointWriter, DataOrder
from readapt_ray.training.shares import BatchSettings, Share
from tests.training.reading import read_shares
from tests.training.test_blocks import order_of, write_blocks

pytestmark = pytest.mark.usefixtures("ray_session")
SETTINGS = BatchSettings(pad_id=0, micro_batch_tokens=64)


@pytest.fixture(scope="module")
def row_groups(tmp_path_factory: pytest.TempPathFactory) -> RowGroups:
    return write_blocks(tmp_path_factory.mktemp("stream") / "b")


@pytest.fixture(autouse=True)
def small_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_stream, "_BYTES_PER_WORKER", 1 << 10)


@ray.remote
class Consumer:
    """Stands for a worker: reads its iterator to the end."""

    def read(self, iterator: Any) -> list[Share]:
        rows = iterator.iter_batches(batch_size=None, batch_format="pyarrow")
        return [share for row in rows for share in block_stream.decode_shares(row)]


def streamed(stream: BlockStream, num_workers: int) -> list[list[Share]]:
    """What each worker gets, while they hold both CPUs of the cluster."""
    iterators = [each[stream.name] for each in stream.configure(world_size=num_workers)]
    workers = [Consumer.options(num_cpus=2 / num_workers).remote() for _ in iterators]
    try:
        return ray.get([worker.read.remote(each) for worker, each in zip(workers, iterators, strict=True)], timeout=600)
    finally:
        for worker in workers:
            ray.kill(worker)


def checkpoint_at(folder: Path, data_order: DataOrder, step: int) -> Location:
    location = Location(str(folder / "checkpoints"))
    writer = CheckpointWriter(location, data_order, keep=1)
    writer.save(step, {"weight": torch.zeros(1)})
    writer.wait()
    return location


@pytest.mark.parametrize(("num_workers", "first_step"), [(1, 0), (2, 301), (4, 7)])
def test_each_worker_gets_its_own_shares_in_order(
    row_groups: RowGroups, tmp_path: Path, num_workers: int, first_step: int
) -> None:
    data_order = order_of(row_groups)
    stream = BlockStream(row_groups, data_order, SETTINGS, checkpoint_at(tmp_path, data_order, first_step))
    for rank, got in enumerate(streamed(stream, num_workers)):
        due = list(read_shares(row_groups, data_order, SETTINGS, first_step, of=(rank, num_workers)))
        assert [(share.step, share.worker_rank) for share in got] == [(share.step, rank) for share in due]
        assert len(got) == data_order.num_steps - first_step
        assert all(list(one.first_passages) == list(other.first_passages) for one, other in zip(got, due, strict=True))


def test_a_worker_gets_an_nth_of_the_bytes_and_blocks_are_read_once_for_all(
    row_groups: RowGroups, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_order = order_of(row_groups, batch_size=200, num_epochs=1)
    num_read = []
    read = RowGroups.read
    monkeypatch.setattr(RowGroups, "read", lambda self, number: num_read.append(number) or read(self, number))

    def sent(num_workers: int) -> list[int]:
        """Tokens that each worker gets in an epoch."""
        tokens = [0] * num_workers
        for piece in blocks.pieces(row_groups, data_order, 0):
            for row in block_stream.rows_of(row_groups, piece, data_order.batch_size, SETTINGS, num_workers):
                for share in block_stream.decode_shares(row):
                    tokens[share.worker_rank] += sum(part.input_ids.shape[1] for part, _ in share.parts)
        return tokens

    (whole,) = sent(1)
    num_alone = len(num_read)
    for num_workers in (2, 5):
        num_read.clear()
        assert max(sent(num_workers)) < 1.2 * whole / num_workers, "but for padding"
        assert len(num_read) == num_alone


def test_a_finished_run_has_no_shares_left(row_groups: RowGroups, tmp_path: Path) -> None:
    data_order = order_of(row_groups)
    stream = BlockStream(row_groups, data_order, SETTINGS, checkpoint_at(tmp_path, data_order, data_order.num_steps))
    assert streamed(stream, 2) == [[], []]


def test_a_file_that_is_gone_comes_out_as_our_error(tmp_path: Path) -> None:
    row_groups = write_blocks(tmp_path / "b", num_files=2)
    stream = BlockStream(row_groups, order_of(row_groups), SETTINGS, Location(str(tmp_path / "none")))
    (tmp_path / "b" / "part-00001.parquet").unlink()
    with pytest.raises(ray.exceptions.RayError) as raised:
        streamed(stream, 1)
    found = block_stream.cause_of(raised.value)
    assert isinstance(found, CorruptFileError)
    assert "part-00001.parquet cannot be read" in str(found)


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (RayTaskError("read", "trace", CorruptFileError("cut")).as_instanceof_cause(), CorruptFileError),
        (RayActorError(), RayActorError),
    ],
)
def test_only_errors_of_ours_end_a_run_for_good(
    monkeypatch: pytest.MonkeyPatch, error: Exception, raised: type[Exception]
) -> None:
    """A worker that raises another one is started again."""
    monkeypatch.setattr(ray.train, "get_dataset_shard", MagicMock(side_effect=error))
    with pytest.raises(raised) as found:
        next(block_stream.receive(1)(0))
    assert isinstance(found.value, ReadaptError) == (raised is CorruptFileError)


def test_a_stream_that_ends_early_is_no_finished_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.train, "get_dataset_shard", lambda name: MagicMock(**{"iter_batches.return_value": []}))
    with pytest.raises(RuntimeError, match="the data of step 3 and after did not come"):
        list(block_stream.receive(5)(3))
    assert list(block_stream.receive(5)(5)) == []
