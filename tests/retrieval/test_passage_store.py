import datetime
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from readapt_ray.catalog import cache_entries
from readapt_ray.errors import ArtifactMissingError, CorruptFileError, FingerprintMismatchError, StorageError
from readapt_ray.records import Passage
from readapt_ray.retrieval import id_lookup, passage_store
from readapt_ray.retrieval.passage_files import PassageFiles
from readapt_ray.retrieval.passage_store import PassageStore
from tests.factories import ingest_artifact, small_corpus


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("READAPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/passages"


def copied_files(cache: Path) -> list[Path]:
    return sorted(path for path in cache.rglob("*.arrow") if path.is_file())


def test_every_passage_is_found_and_nothing_else(tmp_path):
    passages = [*small_corpus(100), Passage("文書", "標題", "本文"), Passage("", "", "an empty id")]
    ingest_artifact(tmp_path / "corpus", passages, num_files=3)
    store = PassageStore.open(str(tmp_path / "corpus"))
    assert len(store) == 102
    assert store.find([each.doc_id for each in passages]) == {each.doc_id: each for each in passages}
    assert store.find(["d0000", "d000000", "zzz", "D00001"]) == {}
    assert store.find([]) == {}


def test_passages_of_many_batches_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(passage_store, "_BATCH_BYTES", 1)
    passages = small_corpus(300)
    ingest_artifact(tmp_path / "corpus", passages, num_files=40)
    found = PassageStore.open(str(tmp_path / "corpus")).find(each.doc_id for each in reversed(passages))
    assert list(found.values()) == passages[::-1]


def test_no_passage_stands_for_another_one_with_the_same_hash(tmp_path, monkeypatch):
    passages = small_corpus(10)
    ingest_artifact(tmp_path / "corpus", passages)
    PassageStore.open(str(tmp_path / "corpus"))
    store = PassageStore.open(str(tmp_path / "corpus"))
    hashed = id_lookup.id_keys
    monkeypatch.setattr(id_lookup, "id_keys", lambda ids: np.repeat(hashed([passages[0].doc_id]), len(list(ids))))
    assert store.find([passages[3].doc_id]) == {}


def test_the_corpus_is_copied_once_and_read_from_the_copy(tmp_path, cache):
    passages = small_corpus(20)
    made = ingest_artifact(tmp_path / "corpus", passages)
    first = PassageStore.open(made.uri)
    [copy] = copied_files(cache)
    written_ns = copy.stat().st_mtime_ns
    second = PassageStore.open(made.uri, made.fingerprint)
    assert [each.stat().st_mtime_ns for each in copied_files(cache)] == [written_ns]
    shutil.rmtree(tmp_path / "corpus")
    # Whoever makes another corpus there changes no answer of those who opened this one.
    ingest_artifact(tmp_path / "corpus", [passages[11], passages[0], passages[2]])
    for store in (first, second):
        assert list(store.find(each.doc_id for each in passages).values()) == passages


@pytest.mark.parametrize("name", ["passages.arrow", "keys.npy", "rows.npy"])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_copy_that_is_not_whole_is_made_again(tmp_path, cache, name, how):
    passages = small_corpus(20)
    made = ingest_artifact(tmp_path / "corpus", passages)
    kept = PassageStore.open(made.uri)
    broken = cache / made.fingerprint / name
    broken.write_bytes(broken.read_bytes()[:-1]) if how == "cut" else broken.unlink()
    assert list(PassageStore.open(made.uri).find(each.doc_id for each in passages).values()) == passages
    assert len(kept) == 20, "which keeps the broken copy from being removed as unused"


def _open_and_stop_half_way(corpus: str, began: str) -> None:
    def stop(*_: object) -> None:
        Path(began).touch()
        time.sleep(3600)

    passage_store.np.save = stop
    PassageStore.open(corpus)


def test_a_process_that_is_killed_while_it_copies_leaves_nothing_that_is_taken_for_whole(tmp_path, cache):
    passages = small_corpus(20)
    made = ingest_artifact(tmp_path / "corpus", passages)
    began = tmp_path / "began"
    process = multiprocessing.get_context("spawn").Process(
        target=_open_and_stop_half_way, args=(made.uri, str(began)), daemon=True
    )
    process.start()
    while not began.exists():
        assert process.is_alive()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert copied_files(cache)  # the texts were whole, the lookup was not
    store = PassageStore.open(made.uri)
    assert list(store.find(each.doc_id for each in passages).values()) == passages
    assert {path.name for path in (cache / made.fingerprint).iterdir()} == {"passages.arrow", "keys.npy", "rows.npy"}


STORES: list[PassageStore] = []
"""Those of a process that ends."""


def _open_and_end(corpus: str) -> None:
    STORES.append(PassageStore.open(corpus))


def open_in_a_process(corpus: str) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_open_and_end, args=(corpus,))
    process.start()
    process.join()
    assert process.exitcode == 0


def test_a_copy_goes_with_the_last_store_of_it(tmp_path, cache):
    passages = small_corpus(20)
    made = ingest_artifact(tmp_path / "corpus", passages)
    first, second = PassageStore.open(made.uri), PassageStore.open(made.uri)
    del first
    assert second.find([passages[0].doc_id])
    assert copied_files(cache)
    del second
    assert not copied_files(cache)


def test_a_copy_outlives_its_process_until_another_corpus_is_opened(tmp_path, cache):
    one, two = (ingest_artifact(tmp_path / str(size), small_corpus(size)) for size in (20, 21))
    open_in_a_process(one.uri)
    [copy] = copied_files(cache)
    written_ns = copy.stat().st_mtime_ns
    again = PassageStore.open(one.uri)
    assert [each.stat().st_mtime_ns for each in copied_files(cache)] == [written_ns]
    other = PassageStore.open(two.uri)
    assert (len(again), len(other), len(copied_files(cache))) == (20, 21, 2)
    del again, other
    open_in_a_process(one.uri)
    other = PassageStore.open(two.uri)
    assert [path.parent.name for path in copied_files(cache)] == [two.fingerprint]
    assert len(other) == 21


def test_a_copy_counts_in_the_cache_and_goes_when_room_is_needed(tmp_path, cache, monkeypatch):
    made = ingest_artifact(tmp_path / "corpus", small_corpus(20))
    open_in_a_process(made.uri)
    assert copied_files(cache)
    monkeypatch.setenv("READAPT_CACHE_GB", "0")
    cache_entries.make_room()
    assert not copied_files(cache)


def test_a_disk_without_room_is_said_before_anything_is_copied(tmp_path, cache, monkeypatch):
    made = ingest_artifact(tmp_path / "corpus", small_corpus(20))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1000, 1000, 10))
    with pytest.raises(StorageError, match=r"about 0\.0 GB, and .*passages has 0\.0 GB free; set READAPT_CACHE"):
        PassageStore.open(made.uri)
    assert not copied_files(cache)


def test_a_corpus_without_passages_and_no_corpus(tmp_path):
    ingest_artifact(tmp_path / "corpus", [])
    store = PassageStore.open(str(tmp_path / "corpus"))
    assert (len(store), store.find(["d00000"])) == (0, {})
    with pytest.raises(ArtifactMissingError):
        PassageStore.open(str(tmp_path / "none"))


def test_another_corpus_at_the_same_place_is_refused(tmp_path):
    made = ingest_artifact(tmp_path / "corpus", small_corpus(10))
    assert len(PassageStore.open(made.uri, made.fingerprint)) == 10
    shutil.rmtree(tmp_path / "corpus")
    again = ingest_artifact(tmp_path / "corpus", small_corpus(11))
    with pytest.raises(FingerprintMismatchError, match=rf"{again.fingerprint}, and {made.fingerprint} is meant"):
        PassageStore.open(made.uri, made.fingerprint)


def test_a_corpus_that_is_made_again_while_it_is_copied_is_refused(tmp_path, cache, monkeypatch):
    made = ingest_artifact(tmp_path / "corpus", small_corpus(10))
    sort = id_lookup.IdLookup.sort

    def replaced(keys):
        shutil.rmtree(tmp_path / "corpus")
        ingest_artifact(tmp_path / "corpus", small_corpus(11))
        return sort(keys)

    monkeypatch.setattr(id_lookup.IdLookup, "sort", replaced)
    with pytest.raises(FingerprintMismatchError, match="made again"):
        PassageStore.open(made.uri)
    monkeypatch.undo()
    monkeypatch.setenv("READAPT_CACHE", str(cache.parent))
    assert len(PassageStore.open(made.uri)) == 11


def test_a_file_cut_short_or_without_a_column_is_named(tmp_path):
    made = ingest_artifact(tmp_path / "corpus", small_corpus(10))
    [file] = (tmp_path / "corpus/passages").iterdir()
    whole = file.read_bytes()
    flipped = whole[:30] + bytes(each ^ 255 for each in whole[30:60]) + whole[60:]
    for damaged in (whole[:-20], flipped):
        file.write_bytes(damaged)
        with pytest.raises(CorruptFileError, match=r"part-00000\.parquet was cut short or altered"):
            PassageStore.open(made.uri)
    pq.write_table(pa.table({"doc_id": ["a"], "title": ["b"]}), file)
    with pytest.raises(CorruptFileError, match=r"part-00000\.parquet lacks the columns \['text'\]"):
        PassageStore.open(made.uri)


def test_some_passages_of_files_are_found_without_a_copy(tmp_path, cache):
    passages = small_corpus(50)
    ingest_artifact(tmp_path / "corpus", passages, num_files=3)
    files = PassageFiles.open(str(tmp_path / "corpus"))
    chosen = {passages[at].doc_id: passages[at] for at in (0, 13, 49)}
    assert files.find([*chosen, "none"]) == chosen
    assert files.missing(["x", *chosen, "none", "x"]) == ["x", "none"]
    assert (files.has_any(["x", passages[49].doc_id]), files.has_any(["x"]), files.has_any([])) == (True, False, False)
    assert not copied_files(cache)


def test_columns_that_were_kept_come_with_the_passages(tmp_path):
    made = ingest_artifact(tmp_path / "corpus", small_corpus(10))
    [file] = (tmp_path / "corpus/passages").iterdir()
    day = datetime.date(2020, 1, 2)
    columns = {"doc_id": ["a", "b"], "title": ["", "t"], "text": ["x", None], "year": [2020, None], "day": [day, day]}
    pq.write_table(pa.table(columns | {"nested": [{"k": 1}, None]}), file)
    store = PassageStore.open(made.uri)
    assert store.columns == {"year": "int64", "day": "date32[day]"}
    assert store.find(["b", "a"]) == {
        "b": Passage("b", "t", "", {"year": None, "day": day}),
        "a": Passage("a", "", "x", {"year": 2020, "day": day}),
    }


def test_a_time_that_python_cannot_hold_comes_as_text(tmp_path):
    """A passage of the year 12023 or -1 must not fail every search that finds it."""
    made = ingest_artifact(tmp_path / "corpus", small_corpus(10))
    [file] = (tmp_path / "corpus/passages").iterdir()
    seconds = pa.array([317_270_000_000, -63_000_000_000, 0], pa.timestamp("s"))
    lists = pa.array([[0, 317_270_000_000], [], None], pa.list_(pa.timestamp("s")))
    texts = {"doc_id": ["a", "b", "c"], "title": ["", "", ""], "text": ["x", "y", "z"]}
    pq.write_table(pa.table(texts | {"day": seconds, "days": lists}), file)
    found = PassageStore.open(made.uri).find(["a", "b", "c"])
    assert [str(each.columns["day"])[:5] for each in found.values()] == ["12023", "-0027", "1970-"]
    assert found["a"].columns["days"][0] == datetime.datetime(1970, 1, 1)
    assert found["a"].columns["days"][1][:5] == "12023"


def test_a_document_that_was_split_is_its_first_passage(tmp_path):
    pieces = [Passage("d#1", "t", "one"), Passage("d#2", "t", "two"), Passage("e", "", "whole")]
    made = ingest_artifact(tmp_path / "corpus", pieces)
    store = PassageStore.open(made.uri)
    files = PassageFiles.open(made.uri)
    assert store.find(["d", "d#2"]) == files.find(["d", "d#2"]) == {"d#2": pieces[1]}
    store.is_split, files = True, PassageFiles(files.files, is_split=True)
    expected = {"d": pieces[0]._replace(doc_id="d"), "d#2": pieces[1], "e": pieces[2]}
    assert store.find(["d", "d#2", "e", "none"]) == files.find(["d", "d#2", "e", "none"]) == expected
    assert files.missing(["d", "d#2", "d#3", "e"]) == ["d#3"]
    assert (files.has_any(["d"]), files.has_any(["d", "d#1"])) == (False, True)
