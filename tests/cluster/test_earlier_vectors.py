"""What embed reads and writes where an earlier artifact has vectors: only what changed."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from readapt_ray.cluster import digest_join, shard_source
from readapt_ray.cluster.digest_join import Matches, _join_whole
from readapt_ray.cluster.embed_job import EmbedJob
from readapt_ray.cluster.shard_encoder import ShardEncoder
from readapt_ray.cluster.shard_source import ShardSource
from readapt_ray.records import Passage
from readapt_ray.retrieval.footers import named_footers, row_counts
from readapt_ray.retrieval.parquet_rows import ParquetRows
from readapt_ray.retrieval.shard_plan import DataShard, plan_shards, plan_shards_like
from readapt_ray.storage import Location
from tests import factories

PASSAGES = factories.small_corpus(80)
ROWS = 20


def opened(folder: Path) -> ParquetRows:
    location = Location(str(folder))
    return ParquetRows(location, row_counts(named_footers(location)))


def embedded(
    job: EmbedJob, passages: Sequence[Passage], folder: Path, earlier: Path | None = None
) -> list[dict[str, Any]]:
    """Embed a corpus as the stage does, in this process; return what the encoder says of each shard."""
    factories.ingest_artifact(folder / "corpus", list(passages))
    rows = opened(folder / "corpus/passages")
    job = replace(job, passages=rows.folder, output=Location(str(folder / "out")))
    shards = plan_shards(rows.counts, ROWS)
    if earlier is not None:
        before = opened(earlier / "out/vectors")
        _join_whole(rows, before, job.output / "join")
        job = replace(job, earlier=before, matches=Matches(job.output / "join", digest_join._CHUNK_ROWS, ()))
        shards = plan_shards_like(rows.counts, ROWS, before.counts, job.matches.pieces(rows.num_rows))
    encoder = ShardEncoder(job)
    found = [row for task in ShardSource(shards, job, tokenizes=True).get_read_tasks() for row in task()]
    told = [encoder(row).to_pylist()[0] for row in found]
    assert [each["error"] for each in told] == [""] * len(told), told
    return told


def vectors(folder: Path) -> dict[str, bytes]:
    table = pq.read_table(folder / "out/vectors")
    return {row["doc_id"]: np.array(row["vector"], np.float32).tobytes() for row in table.to_pylist()}


def inodes(folder: Path) -> dict[int, str]:
    return {path.stat().st_ino: path.name for path in (folder / "out/vectors").iterdir()}


def test_only_shards_that_changed_are_written(job: EmbedJob, tmp_path: Path) -> None:
    embedded(job, PASSAGES, tmp_path / "before")
    changed = PASSAGES[45]._replace(text="something that is quite new")
    added = [PASSAGES[3]._replace(doc_id=f"new{number}", text=f"a new text {number}") for number in range(3)]
    now = [*PASSAGES[:5], *PASSAGES[6:45], changed, *PASSAGES[46:60], *added, *PASSAGES[60:]]
    told = embedded(job, now, tmp_path / "now", tmp_path / "before")
    shared = inodes(tmp_path / "before").keys() & inodes(tmp_path / "now").keys()
    assert {inodes(tmp_path / "before")[each] for each in shared} == {"part-00001.parquet", "part-00003.parquet"}
    counts = [(each["num_rows"], each["num_encoded"], each["num_copied"]) for each in told]
    assert counts == [(19, 0, 19), (20, 0, 20), (23, 4, 19), (20, 0, 20)]
    before, found = vectors(tmp_path / "before"), vectors(tmp_path / "now")
    assert found.keys() == {each.doc_id for each in now}
    kept = found.keys() & before.keys() - {changed.doc_id}
    assert {each: found[each] for each in kept} == {each: before[each] for each in kept}


def test_a_file_is_not_kept_for_passages_of_other_ids(job: EmbedJob, tmp_path: Path) -> None:
    embedded(job, PASSAGES, tmp_path / "before")
    swapped = [*PASSAGES]
    for one, other in ((0, 1), (21, 22)):
        swapped[one] = PASSAGES[one]._replace(title=PASSAGES[other].title, text=PASSAGES[other].text)
        swapped[other] = PASSAGES[other]._replace(title=PASSAGES[one].title, text=PASSAGES[one].text)
    embedded(job, swapped, tmp_path / "now", tmp_path / "before")
    before, found = vectors(tmp_path / "before"), vectors(tmp_path / "now")
    shared = inodes(tmp_path / "before").keys() & inodes(tmp_path / "now").keys()
    assert {inodes(tmp_path / "before")[each] for each in shared} == {"part-00002.parquet", "part-00003.parquet"}
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
    assert sum(number for number, columns in read if "text" not in columns) == 80


def test_shards_follow_earlier_files_and_stay_within_bounds() -> None:
    draw = np.random.default_rng(0)
    counts = (("a", 600), ("b", 400))
    for rows in (np.arange(1000), draw.permutation(1000), np.full(1000, -1), np.repeat(np.arange(500), 2)):
        for pieces in (np.split(rows, 1), np.split(rows, [1, 333, 334, 900])):
            shards = plan_shards_like(counts, 100, [(f"{number}", 90) for number in range(12)], pieces)
            sizes = [len(each) for each in shards]
            assert sum(sizes) == 1000 and max(sizes) <= 150 and min(sizes[:-1]) >= 50
            assert [each.first for each in shards] == np.cumsum([0, *sizes[:-1]]).tolist()
            assert [each.number for each in shards] == list(range(len(shards)))
    like = plan_shards_like(counts, 100, [(f"{number}", 90) for number in range(12)], [np.arange(1000)])
    assert [len(each) for each in like] == [90] * 11 + [10]
    larger = plan_shards_like(counts, 100, [(f"{number}", 110) for number in range(12)], [np.arange(1000)])
    assert [len(each) for each in larger] == [110] * 9 + [10], "as many as the earlier files have"
