"""Shards of an index in an object store are copied to the node once, and mapped; whatever is cut, killed or full."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from readapt_ray.catalog import cache_entries
from readapt_ray.errors import CorruptFileError
from readapt_ray.retrieval import cached_files
from readapt_ray.retrieval.exact import search_exact
from readapt_ray.retrieval.index_files import ShardRecord, carry_over, read_ids, write_shard
from readapt_ray.retrieval.index_shard import build_shard
from readapt_ray.serving.index_slice import IndexSlice
from readapt_ray.storage import Location
from tests import object_store, small_disk
from tests.object_store import Store

REPOSITORY = Path(__file__).parent.parent.parent
NEAR = """import sys
from readapt_ray.retrieval import cached_files
from readapt_ray.storage import Location
print(cached_files.local_copy(Location(sys.argv[1]), sys.argv[2]), flush=True)
sys.stdin.read()
"""
IDS = [str(row) for row in range(60)]
VECTORS = np.random.default_rng(1).normal(size=(60, 16)).astype(np.float32)


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with object_store.running() as running:
        yield running


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, of which this process uses nothing afterwards."""
    monkeypatch.setenv("READAPT_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache/shards"
    ended()


def ended() -> None:
    """Let go of the cache as a process does that ends."""
    while cache_entries._in_use:
        cache_entries._in_use.popitem()[1].close()


@pytest.fixture
def folder(store: Store, request: pytest.FixtureRequest) -> Location:
    store.busy = lambda method, path: False
    return Location(f"s3://{object_store.BUCKET}/{request.node.name}")


@pytest.fixture
def records(folder: Location) -> list[ShardRecord]:
    """Three flat shards of 20 vectors."""
    parts = [slice(first, first + 20) for first in (0, 20, 40)]
    shards = [build_shard("Flat", 16, [(IDS[part], VECTORS[part])]) for part in parts]
    shards = [replace(each, hashes=bytes(16 * 20)) for each in shards]
    return [write_shard(folder, f"{number:05d}", shard, encoder="e") for number, shard in enumerate(shards)]


def fetched(store: Store, suffix: str = "") -> list[str]:
    """The objects that were asked for, by the name of each."""
    gets = [each for each in store.requests if each.startswith("GET") and "?" not in each]
    return sorted(each.rpartition("/")[2] for each in gets if each.endswith(suffix))


def check(searchable: IndexSlice, *, without: int | None = None) -> None:
    rows = [row for row in range(60) if row != without]
    due = search_exact(VECTORS[:3], [([IDS[row] for row in rows], VECTORS[rows])], 5)
    assert searchable.search(VECTORS[:3], 5).doc_ids.tolist() == due.doc_ids.tolist()


def test_a_start_loads_what_is_new_alone_and_maps_it(
    store: Store, folder: Location, records: list[ShardRecord], cache: Path
) -> None:
    store.requests.clear()
    searchable = IndexSlice(folder, records)
    check(searchable)
    assert fetched(store, ".faiss") == ["00000.faiss", "00001.faiss", "00002.faiss"]
    assert str(cache / records[0].index_sha256[:32]) in Path("/proc/self/maps").read_text()
    del searchable
    ended()
    store.requests.clear()
    check(IndexSlice(folder, records))
    assert not fetched(store)
    kept = np.ones(20, bool)
    kept[7] = False
    changed = carry_over(folder, records[0], kept, folder / "next", encoder="e")
    carried = [carry_over(folder, each, np.ones(20, bool), folder / "next", encoder="e") for each in records[1:]]
    store.requests.clear()
    check(IndexSlice(folder / "next", [changed, *carried]), without=7)
    assert fetched(store) == ["00000.dead"]


def test_only_what_is_mapped_is_held_open(
    folder: Location, records: list[ShardRecord], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process may have some thousand open files, and ids of a shard are in memory."""
    IndexSlice(folder, records)
    assert {each.name for each in cache_entries._in_use} == {each.index_sha256[:32] for each in records}
    monkeypatch.setattr("readapt_ray.retrieval.index_files.local_copy", lambda *_, **__: Location(str(cache / "gone")))
    assert read_ids(folder, records[0], use_cache=True)[0].tolist() == IDS[:20]


def test_slices_that_want_a_shard_at_once_load_it_once(
    store: Store, folder: Location, records: list[ShardRecord], cache: Path
) -> None:
    second = threading.Event()
    asked = []

    def busy(method: str, path: str) -> bool:
        if method == "GET" and path.endswith(".faiss"):
            asked.append(path)
            if len(asked) > 1:
                second.set()
            second.wait(0.3)
        return False

    store.busy = busy
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: IndexSlice(folder, records[:1]).num_vectors, range(2)))
    assert found == [20, 20]
    assert len(asked) == 1


def test_what_a_killed_process_left_is_loaded_again(
    store: Store, folder: Location, records: list[ShardRecord], cache: Path
) -> None:
    under_way, over = threading.Event(), threading.Event()

    def busy(method: str, path: str) -> bool:
        if method == "GET" and path.endswith(".faiss"):
            under_way.set()
            over.wait(300)
        return False

    store.busy = busy
    file, sha256 = folder / "00000.faiss", records[0].index_sha256
    process = subprocess.Popen([sys.executable, "-c", NEAR, file.uri, sha256], stdin=subprocess.PIPE, cwd=REPOSITORY)
    assert under_way.wait(300)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    over.set()
    entry = cache / sha256[:32]
    (half,) = entry.iterdir()
    assert half.name.startswith(".tmp-")
    store.busy = lambda method, path: False
    check(IndexSlice(folder, records))
    assert [path.name for path in entry.iterdir()] == ["content"]


@pytest.mark.parametrize("damage", ["cut short", "altered", "gone"])
def test_a_copy_that_was_damaged_is_loaded_again(
    store: Store, folder: Location, records: list[ShardRecord], cache: Path, damage: str
) -> None:
    before = IndexSlice(folder, records)
    copy = cache / records[1].index_sha256[:32] / "content"
    content = copy.read_bytes()
    copy.unlink()
    if damage != "gone":
        copy.write_bytes(content[:100] if damage == "cut short" else content[:-1] + bytes([content[-1] ^ 1]))
    store.requests.clear()
    check(IndexSlice(folder, records))
    assert fetched(store) == ["00001.faiss"]
    assert copy.read_bytes() == content
    check(before)


@pytest.mark.parametrize("damage", ["altered", "gone"])
def test_what_is_damaged_in_the_store_is_refused_by_its_name(
    folder: Location, records: list[ShardRecord], cache: Path, damage: str
) -> None:
    file = folder / "00002.faiss"
    content = file.read_bytes()
    if damage == "gone":
        file.delete()
    else:
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CorruptFileError, match=rf"{re.escape(file.uri)} (is gone|was cut short or altered)"):
        IndexSlice(folder, records)
    assert not list(cache.glob(f"{records[2].index_sha256[:32]}*/*"))
    assert not (cache / f"{records[2].index_sha256[:32]}.json").exists()


def test_the_cache_holds_what_it_may_and_what_processes_map_stays(
    folder: Location,
    records: list[ShardRecord],
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    files = [folder / f"{each.name}.faiss" for each in records]
    size = files[0].size_bytes()
    monkeypatch.setenv("READAPT_CACHE_GB", str(2.5 * size / 1e9))
    first, second, third = zip(files, (each.index_sha256 for each in records), strict=True)
    with subprocess.Popen(
        [sys.executable, "-c", NEAR, first[0].uri, first[1]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    ) as process:
        assert process.stdout is not None
        mapped = Path(process.stdout.readline().strip())
        os.utime(mapped.parent.with_suffix(".use"), (0, 0))
        unused = cached_files.local_copy(*second).local_path
        ended()
        found = cached_files.local_copy(*third)
        assert (mapped.exists(), unused.exists(), found.is_local) == (True, False, True)
        assert cached_files.local_copy(*second) == second[0]  # both others are in use
        assert "READAPT_CACHE_GB) the rest is in use" in caplog.text
        check(IndexSlice(folder, records))
        process.communicate()
    ended()
    assert cached_files.local_copy(*second) == Location(str(unused))


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache that is a small disk."""
    with small_disk.mounted(tmp_path / "disk", 1 << 20) as is_there:
        if not is_there:
            pytest.skip("mounting is not permitted here")
        monkeypatch.setenv("READAPT_CACHE", str(tmp_path / "disk"))
        yield tmp_path / "disk"
        ended()


@pytest.mark.parametrize("seen", ["before", "under way"])
def test_what_has_no_room_on_the_disk_goes_to_memory_with_a_warning(
    folder: Location, records: list[ShardRecord], disk: Path, seen: str, request: pytest.FixtureRequest
) -> None:
    small_disk.fill(disk, leave_bytes=24 << 10)
    if seen == "under way":  # by another program, which took the room
        request.getfixturevalue("monkeypatch").setattr(cache_entries, "reserve", lambda *args, **options: None)
    check(IndexSlice(folder, records))
    assert "is read into memory, not mapped from a copy on this node: " in request.getfixturevalue("caplog").text
    assert not list(disk.glob("shards/*/.tmp-*"))


def test_without_a_cache_that_can_be_written_shards_go_to_memory(
    folder: Location, records: list[ShardRecord], cache: Path
) -> None:
    cache.parent.mkdir()
    cache.write_text("no folder")
    check(IndexSlice(folder, records))
