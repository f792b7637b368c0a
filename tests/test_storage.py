import pickle
from pathlib import Path

import pytest

from readapt_ray.errors import InputError
from readapt_ray.storage import Location


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    file = Location(str(tmp_path)) / "a.txt"
    file.write_text("old")
    with pytest.raises(RuntimeError), file.open_output() as stream:
        stream.write(b"half")
        raise RuntimeError("cut")
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_files_are_listed_in_order_without_temporary_ones(tmp_path: Path) -> None:
    for name in ("b.parquet", "a.parquet", ".tmp-1-c.parquet", "d.json"):
        (tmp_path / name).write_text("x")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "e.parquet").write_text("x")
    folder = Location(str(tmp_path))
    assert [file.name for file in folder.files(".parquet")] == ["a.parquet", "b.parquet"]
    assert [name for name, _ in folder.listing(".parquet", recursive=True)] == [
        "a.parquet",
        "b.parquet",
        "sub/e.parquet",
    ]
    assert (folder / "absent").files() == []


def test_the_content_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text("one")
    before = Location(str(tmp_path / "a")).content_fingerprint()
    (tmp_path / "a").rename(tmp_path / "b")
    assert Location(str(tmp_path / "b")).content_fingerprint() == before
    (tmp_path / "b" / "x.txt").write_text("two")
    assert Location(str(tmp_path / "b")).content_fingerprint() != before


def test_a_location_is_joined_pickled_and_copied(tmp_path: Path) -> None:
    here = Location(str(tmp_path / "from"))
    (here / "deep" / "x.bin").write_bytes(b"123")
    there = pickle.loads(pickle.dumps(Location(str(tmp_path / "to"))))
    here.copy_to(there)
    assert (there / "deep" / "x.bin").read_bytes() == b"123"
    assert (Location("s3://bucket/a?region=x") / "b").uri == "s3://bucket/a/b?region=x"
    there.delete()
    there.delete()
    assert not there.exists()


def test_a_scheme_that_nothing_opens_is_named() -> None:
    with pytest.raises(InputError, match="gopher://x"):
        Location("gopher://x/y").exists()
