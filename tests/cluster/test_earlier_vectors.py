"""What embed reads and writes where an earlier artifact has vectors: only what changed."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from readapt_ray import dead_rows
from readapt_ray.cluster import earlier_vectors, shard_runner, shard_source
from readapt_ray.cluster.earlier_plan import planned
from readapt_ray.cluster.embed_job import EmbedJob
from readapt_ray.cluster.placement import Placement
from readapt_ray.records import Passage
from readapt_ray.retrieval.footers import named_footers, row_counts
from readapt_ray.retrieval.parquet_rows import ParquetRows
from readapt_ray.retrieval.shard_ledger import ShardLedger, file_counts
from readapt_ray.retrieval.shard_plan import DataShard, files_to_keep, plan_rest, plan_shards
from readapt_ray.retrieval.unread_parts import EarlierVectors, ToRead
from readapt_ray.storage import Location
from tests import factories
from tests.recipes.refreshing.in_process import without_ray

pytestmark = pytest.mark.usefixtures("no_ray")
PASSAGES = factories.small_corpus(80)
ROWS = 20


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    without_ray(monkeypatch)


def opened(folder: Path) -> ParquetRows:
    location = Location(str(folder))
    return ParquetRows(location, row_counts(named_footers(location)))


def embedded(
    job: EmbedJob, passages: Sequence[Passage], folder: Path, earlier: Path | None = None
) -> list[dict[str, Any]]:
    """Embed a corpus as the stage does, in this process; return the figures of each shard."""
    factories.ingest_artifact(folder / "corpus", list(passages))
    rows = opened(folder / "corpus/passages")
    job = replace(job, passages=rows.folder, output=Location(str(folder / "out")), rows_per_shard=ROWS)
    shards = plan_shards(rows.counts, ROWS)
    if earlier is not None:
        before = opened(earlier / "out/vectors")
        joined = earlier_vectors.join_digests(rows, before, job.output / "join")
        there = EarlierVectors(before, file_counts(Location(str(earlier / "out"))), {})
        shards, matches = planned(joined, ToRead(rows, before, frozenset()), there, {}, ROWS)
        job = replace(job, earlier=before, matches=matches, dimension=job.encoder.get("dimension", 32))
    ledger = shard_runner.encode_shards(shards, job, Placement(None, None), lambda *_: None)
    resumed = ShardLedger(shards, job.output, made_by=job.encoder["fingerprint"], rows_per_shard=ROWS)
    (job.output / "shards.parquet").delete()
    resumed.find()
    assert not resumed.pending, "the files alone say what is done"
    ledger.save()
    names = ledger.figures.dtype.names or ()
    return [{name: figures[name].item() for name in names} for figures in ledger.figures]


def vectors(folder: Path) -> dict[str, bytes]:
    rows = [row for path in sorted((folder / "out/vectors").glob("*.parquet")) for row in read_table(path)]
    assert len(rows) == len({row["doc_id"] for row in rows})
    return {row["doc_id"]: np.array(row["vector"], np.float32).tobytes() for row in rows}


def read_table(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = dead_rows.read_table(Location(str(path))).to_pylist()
    return rows


def inodes(folder: Path) -> dict[int, str]:
    return {path.stat().st_ino: path.name for path in (folder / "out/vectors").iterdir()}


def shared(before: Path, now: Path) -> dict[str, str]:
    """The files that two artifacts share, with the names that they have in both."""
    one, other = inodes(before), inodes(now)
    return {one[each]: other[each] for each in one.keys() & other.keys()}


def test_files_stay_and_their_dead_rows_are_noted(job: EmbedJob, tmp_path: Path) -> None:
    embedded(job, PASSAGES, tmp_path / "0")
    changed = PASSAGES[45]._replace(text="something that is quite new")
    added = [PASSAGES[3]._replace(doc_id=f"new{number}", text=f"a new text {number}") for number in range(3)]
    now = [*PASSAGES[:5], *PASSAGES[6:45], changed, *PASSAGES[46:60], *added, *PASSAGES[60:]]
    told = embedded(job, now, tmp_path / "1", tmp_path / "0")
    names = [f"part-0000{number}" for number in range(4)]
    assert shared(tmp_path / "0", tmp_path / "1") == {
        f"{name}.parquet": f"{name}{mark}.parquet"
        for name, mark in zip(names, ("-partly", "", "-partly", ""), strict=True)
    }
    counts = [tuple(each[name] for name in ("num_rows", "num_dead", "num_encoded", "num_copied")) for each in told]
    assert counts == [(19, 1, 0, 19), (20, 0, 0, 20), (19, 1, 0, 19), (20, 0, 0, 20), (4, 0, 4, 0)]
    before, found = vectors(tmp_path / "0"), vectors(tmp_path / "1")
    assert found.keys() == {each.doc_id for each in now}
    kept = found.keys() & before.keys() - {changed.doc_id}
    assert {each: found[each] for each in kept} == {each: before[each] for each in kept}
    # Once more: a file that is one of two then, rows that die beside dead ones, one past a fifth.
    gone = {0, 7, 19, *range(40, 44)}
    later = [each for each in now if each.doc_id not in {PASSAGES[number].doc_id for number in gone}]
    told = embedded(job, later, tmp_path / "2", tmp_path / "1")
    there = shared(tmp_path / "1", tmp_path / "2")
    assert there == {
        "part-00000-partly.parquet": "part-00000-partly.parquet",
        "part-00001.parquet": "part-00001.parquet",
        "part-00003.parquet": "part-00002.parquet",
        "part-00004.parquet": "part-00003.parquet",
    }
    assert [(each["num_rows"], each["num_dead"], each["num_copied"]) for each in told] == [
        (16, 4, 16), (20, 0, 20), (20, 0, 20), (4, 0, 4), (15, 0, 15)
    ]  # fmt: skip
    assert vectors(tmp_path / "2") == {each.doc_id: found[each.doc_id] for each in later}


def test_a_file_is_not_kept_for_passages_of_other_ids(job: EmbedJob, tmp_path: Path) -> None:
    embedded(job, PASSAGES, tmp_path / "before")
    swapped = [*PASSAGES]
    for one, other in ((0, 1), (21, 22)):
        swapped[one] = PASSAGES[one]._replace(title=PASSAGES[other].title, text=PASSAGES[other].text)
        swapped[other] = PASSAGES[other]._replace(title=PASSAGES[one].title, text=PASSAGES[one].text)
    told = embedded(job, swapped, tmp_path / "now", tmp_path / "before")
    before, found = vectors(tmp_path / "before"), vectors(tmp_path / "now")
    assert set(shared(tmp_path / "before", tmp_path / "now").values()) == {
        "part-00000-partly.parquet", "part-00001-partly.parquet", "part-00002.parquet", "part-00003.parquet"
    }  # fmt: skip
    assert (told[-1]["num_encoded"], told[-1]["num_copied"]) == (0, 4), "by other ids their vectors are there"
    assert found["d00000"] == before["d00001"] and found["d00022"] == before["d00021"]


def test_texts_whose_vectors_are_there_are_not_read(
    job: EmbedJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[int, tuple[str, ...]]] = []
    take = shard_source._take

    def noted(shard: DataShard, folder: Location, rows: Any, columns: Any) -> Any:
        read.append((len(rows), tuple(columns)))
        return take(shard, folder, rows, columns)

    embedded(job, PASSAGES, tmp_path / "before")
    monkeypatch.setattr(shard_source, "_take", noted)
    now = [*PASSAGES[:70], *(each._replace(text=f"{each.text} more") for each in PASSAGES[70:])]
    embedded(job, now, tmp_path / "now", tmp_path / "before")
    assert sum(number for number, columns in read if "text" in columns) == 10
    assert sum(number for number, columns in read if "text" not in columns) == 20, (
        "the changed ones, and the rest of their file"
    )


def test_files_are_kept_until_a_fifth_is_dead_or_they_are_many() -> None:
    counts = [(f"{number}", 100) for number in range(100)]
    lives = np.ones(10_000, bool)
    lives[[*range(20), *range(100, 121), *range(300, 400), 450]] = False
    known = {name: {"num_bytes": 7, "num_left_out": 0, "num_dead": 0} for name, _ in counts}
    known["2"] |= {"num_left_out": 1}
    known["5"] |= {"num_dead": 26}
    del known["6"]
    kept = files_to_keep(counts, known, lives, rows_per_shard=200)
    assert [each.name for each in kept] == [name for name, _ in counts if name not in ("1", "2", "3", "5", "6")]
    assert [(each.num_rows, each.num_dead, each.dead.tolist()) for each in (kept[0], kept[1])] == [
        (80, 20, list(range(20))), (99, 1, [50])
    ]  # fmt: skip
    fewer = files_to_keep(counts, known, np.arange(10_000) % 100 > np.arange(10_000) // 1000, rows_per_shard=1000)
    assert len(fewer) <= 52 and {each.num_rows for each in fewer} == {95, 96, 97, 98, 99}, "the larger half"


def test_the_rest_is_cut_into_shards_with_each_row_once() -> None:
    counts = [("a", 60_000), ("b", 40_000)]
    rows = np.flatnonzero(np.random.default_rng(0).random(100_000) < 0.5)
    left = [(0, rows[rows < 70_000]), (70_000, rows[rows >= 70_000] - 70_000)]
    shards = plan_rest(counts, 20_000, left, number=3)
    assert [each.number for each in shards] == list(range(3, 11)) and sum(map(len, shards)) == len(rows)
    assert [(each.first, each.num_rows) for each in shards[:2]] == [
        (rows[0], rows[len(shards[0]) - 1] + 1 - rows[0]),
        (rows[len(shards[0])], rows[2 * len(shards[0]) - 1] + 1 - rows[len(shards[0])]),
    ]
    assert [len(each) for each in plan_rest(counts, 20_000, [(0, rows[:4000])], number=0)] == [4000]
    assert plan_rest(counts, 20_000, [], number=0) == []
