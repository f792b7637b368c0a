from pathlib import Path

import pytest
import torch

from readapt_ray.errors import CorruptFileError
from readapt_ray.storage import Location
from readapt_ray.training import checkpoints
from readapt_ray.training.checkpoints import CheckpointWriter, DataOrder, newest_checkpoint

ORDER = DataOrder(num_units=25, batch_size=10, num_epochs=2, seed=3)


def saved(folder: Path, *steps: int, keep: int = 2) -> Location:
    """Checkpoints whose only tensor holds their step."""
    location = Location(str(folder))
    writer = CheckpointWriter(location, ORDER, keep=keep)
    for step in steps:
        writer.save(step, {"weight": torch.full((1000,), float(step))})
    writer.wait()
    return location


def newest_step(location: Location) -> int:
    found = newest_checkpoint(location, ORDER)
    assert found is not None
    step, state = found
    assert state["weight"].eq(step).all()
    return step


def test_a_course_says_what_was_consumed() -> None:
    assert (ORDER.steps_per_epoch, ORDER.num_steps) == (3, 6)
    assert [ORDER.consumed(step) for step in range(7)] == [(0, 0), (0, 10), (0, 20), (1, 0), (1, 10), (1, 20), (2, 0)]


def test_the_newest_are_kept_and_the_newest_is_found(tmp_path: Path) -> None:
    assert newest_checkpoint(Location(str(tmp_path / "none")), ORDER) is None
    location = saved(tmp_path / "c", 1, 2, 3, 5, keep=2)
    assert [file.name for file in location.files()] == ["step-000000003.safetensors", "step-000000005.safetensors"]
    assert newest_step(location) == 5


@pytest.mark.parametrize("kept_bytes", [0, 5, 100, 3000])
def test_a_checkpoint_cut_short_is_never_taken_for_a_whole_one(tmp_path: Path, kept_bytes: int) -> None:
    location = saved(tmp_path / "c", 1, 2)
    cut = tmp_path / "c" / "step-000000002.safetensors"
    cut.write_bytes(cut.read_bytes()[:kept_bytes])
    assert newest_step(location) == 1
    other = tmp_path / "c" / "step-000000001.safetensors"
    other.write_bytes(other.read_bytes()[:kept_bytes])
    with pytest.raises(CorruptFileError, match=r"no checkpoint can be read: .*step-000000002.*step-000000001"):
        newest_checkpoint(location, ORDER)


def test_a_damaged_checkpoint_takes_no_others_place(tmp_path: Path) -> None:
    """The run went on from an earlier one, and has not come as far again."""
    saved(tmp_path / "c", 2, 5)
    (tmp_path / "c" / "step-000000005.safetensors").write_bytes(b"damaged")
    for step in (3, 4):
        assert newest_step(saved(tmp_path / "c", step, keep=1)) == step
    assert [file.name[5:14] for file in Location(str(tmp_path / "c")).files()] == ["000000004", "000000005"]
    assert newest_step(saved(tmp_path / "c", 5, 6, keep=1)) == 6
    assert len(Location(str(tmp_path / "c")).files()) == 1


def test_files_that_are_no_checkpoints_are_neither_removed_nor_read(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    for name in ("adapter.safetensors", "zzz.safetensors"):
        (tmp_path / "c" / name).write_text("precious")
    location = saved(tmp_path / "c", 1, 2, 3, keep=1)
    names = ["adapter.safetensors", "step-000000003.safetensors", "zzz.safetensors"]
    assert [file.name for file in location.files()] == names
    assert newest_step(location) == 3


def test_what_a_killed_writer_left_is_no_checkpoint(tmp_path: Path) -> None:
    location = saved(tmp_path / "c", 1)
    whole = (tmp_path / "c" / "step-000000001.safetensors").read_bytes()
    (tmp_path / "c" / ".tmp-0123456789ab-step-000000002.safetensors").write_bytes(whole)
    assert newest_step(location) == 1


def test_a_checkpoint_of_another_course_is_refused(tmp_path: Path) -> None:
    location = saved(tmp_path / "c", 1)
    other = DataOrder(num_units=25, batch_size=5, num_epochs=2, seed=3)
    with pytest.raises(CorruptFileError, match="batch_size is 10 there and 5 now"):
        newest_checkpoint(location, other)


def test_a_checkpoint_of_another_order_of_the_same_seed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    location = saved(tmp_path / "c", 1)
    monkeypatch.setattr(checkpoints, "_ORDER_VERSION", 3)
    with pytest.raises(CorruptFileError, match="the same seed gives another order"):
        newest_checkpoint(location, ORDER)


def test_a_write_that_failed_is_told_at_the_next(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("a file where the folder should be")
    writer = CheckpointWriter(Location(str(tmp_path / "c")), ORDER, keep=1)
    writer.save(1, {"weight": torch.zeros(1)})
    with pytest.raises(OSError, match="c"):
        writer.save(2, {"weight": torch.zeros(1)})
