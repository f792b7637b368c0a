"""Parts that are never changed, read without their dead rows."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from readapt_ray import dead_rows
from readapt_ray.errors import CorruptFileError
from readapt_ray.retrieval.parquet_rows import ParquetRows, read_rows
from readapt_ray.storage import Location

NUM_ROWS = 100


def part(folder: Path, dead: np.ndarray) -> Location:
    """A part of rows 0 to 99 in row groups of 7, shared without some of them."""
    location = Location(str(folder))
    (folder / "a").mkdir(parents=True)
    pq.write_table(pa.table({"n": np.arange(NUM_ROWS)}), folder / "a/part-00000.parquet", row_group_size=7)
    return (
        location
        / "b"
        / dead_rows.share_part(location / "a/part-00000.parquet", location / "b", "part-00003.parquet", dead)
    )


@pytest.mark.parametrize("seed", range(6))
def test_every_way_of_reading_sees_the_live_rows_alone(tmp_path: Path, seed: int) -> None:
    draw = np.random.default_rng(seed)
    dead = np.union1d(np.flatnonzero(draw.random(NUM_ROWS) < 0.3), np.arange(14, 21) if seed else np.arange(0))
    file = part(tmp_path, dead)
    assert file.name == "part-00003-partly.parquet" and (tmp_path / "b/_part-00003-partly.dead").is_file()
    assert (tmp_path / "b" / file.name).samefile(tmp_path / "a/part-00000.parquet")
    lives = np.setdiff1d(np.arange(NUM_ROWS), dead)
    assert dead_rows.read_table(file)["n"].to_pylist() == lives.tolist()
    for start, stop in ((0, len(lives)), (3, 40), (len(lives) - 1, len(lives)), (5, 5)):
        assert read_rows(file, start, stop - start, ("n", "unknown"))["n"].to_pylist() == lives[start:stop].tolist()
    with pytest.raises(CorruptFileError, match=f"has {len(lives)} rows, but {len(lives) + 1} were expected"):
        read_rows(file, 0, len(lives) + 1, ("n",))
    with dead_rows.opened(file) as opened:
        assert opened.num_rows == len(lives)
        assert [n for batch in opened.batches(11) for n in batch["n"].to_pylist()] == lives.tolist()
    wanted = draw.permutation(len(lives))[:20]
    rows = ParquetRows(Location(str(tmp_path / "b")), ((file.name, len(lives)),))
    assert rows.take(wanted, ("n",))["n"].to_pylist() == lives[wanted].tolist()
    # Shared once more, rows are numbered as they are read.
    again = dead_rows.share_part(
        file, Location(str(tmp_path / "c")), "part-00000.parquet", np.array([0, len(lives) - 1])
    )
    assert dead_rows.read_table(Location(str(tmp_path / "c" / again)))["n"].to_pylist() == lives[1:-1].tolist()
    same = dead_rows.share_part(file, Location(str(tmp_path / "d")), "part-00000.parquet", np.zeros(0, np.int64))
    assert dead_rows.read_table(Location(str(tmp_path / "d" / same)))["n"].to_pylist() == lives.tolist()


def test_a_whole_part_keeps_its_name(tmp_path: Path) -> None:
    file = part(tmp_path, np.zeros(0, np.int64))
    assert file.name == "part-00003.parquet" and [each.name for each in (tmp_path / "b").iterdir()] == [file.name]
    assert (
        dead_rows.name_without_mark("part-00003-partly.parquet") == file.name == dead_rows.name_without_mark(file.name)
    )


@pytest.mark.parametrize("damage", ["gone", "cut", "altered"])
def test_damaged_dead_rows_are_named(tmp_path: Path, damage: str) -> None:
    file = part(tmp_path, np.array([3, 8]))
    dead = tmp_path / "b/_part-00003-partly.dead"
    content = dead.read_bytes()
    dead.write_bytes(content[:-4] if damage == "cut" else content[:-1] + b"x")
    if damage == "gone":
        dead.unlink()
    with pytest.raises(
        CorruptFileError, match=rf"_part-00003-partly.dead {'is gone' if damage == 'gone' else 'was cut'}"
    ):
        read_rows(file, 0, 1, ("n",))


@pytest.mark.parametrize(
    ("uri", "other"),
    [
        ("part", "b"),
        ("/a/part", "/a/b"),
        ("s3://bucket/a/part?region=x", "s3://bucket/a/b?region=x"),
        ("file:///a/part", "file:///a/b"),
    ],
)
def test_a_sibling_lies_in_the_same_folder(uri: str, other: str) -> None:
    assert Location(uri).sibling("b").uri == other
