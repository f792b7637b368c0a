"""A file under two names: which bytes it has, and what is left when one name goes."""

import os
from pathlib import Path

import pytest

from readapt_ray.shared_files import share
from readapt_ray.storage import Location
from tests import object_store


def locations(folder: Path) -> tuple[Location, Location]:
    source, target = Location(str(folder / "a/one")), Location(str(folder / "b/two"))
    source.write_text("content")
    return source, target


def test_a_local_file_is_linked_and_outlives_its_first_name(tmp_path: Path) -> None:
    source, target = locations(tmp_path)
    share(source, target)
    share(source, target)  # a killed process had done so
    assert os.stat(target.path).st_nlink == 2
    assert [each.name for each in (tmp_path / "b").iterdir()] == ["two"]
    source.write_text("another")
    assert target.read_text() == "content"
    source.delete()
    assert target.read_text() == "content"


def test_what_is_there_is_replaced(tmp_path: Path) -> None:
    source, target = locations(tmp_path)
    target.write_text("old")
    share(source, target)
    assert target.read_text() == "content"


def test_a_disk_without_links_gets_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("links are not supported")

    source, target = locations(tmp_path)
    monkeypatch.setattr(os, "link", refuse)
    share(source, target)
    assert target.read_text() == "content" and os.stat(target.path).st_nlink == 1


def test_an_object_store_copies_by_itself(tmp_path: Path) -> None:
    with object_store.running() as store:
        source, target = (Location(f"s3://{object_store.BUCKET}/{name}") for name in ("a/one", "b/two"))
        source.write_bytes(b"x" * 100_000)
        store.requests.clear()
        share(source, target)
        assert not any(each.startswith(("GET", "POST")) for each in store.requests), store.requests
        assert target.read_bytes() == b"x" * 100_000
        local = Location(str(tmp_path / "local"))
        share(source, local)
        assert local.size_bytes() == 100_000
