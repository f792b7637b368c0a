"""Embed and index on earlier artifacts read what changed, and find what reading everything finds."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from readapt_ray import dead_rows
from readapt_ray.artifacts import Artifact
from readapt_ray.catalog.models import open_model
from readapt_ray.cluster import earlier_plan
from readapt_ray.records import Passage, content_hash
from readapt_ray.retrieval import footers, index_changes
from readapt_ray.retrieval.encoder import Encoder
from readapt_ray.retrieval.index_files import ShardRecord, read_ids
from readapt_ray.retrieval.index_shard import DELETED
from readapt_ray.retrieval.parquet_rows import ParquetRows
from readapt_ray.retrieval.shard_ledger import Origin, counts_and_origins
from readapt_ray.retrieval.unread_parts import EarlierVectors, to_read
from readapt_ray.stages.embed import EmbedConfig, embed
from readapt_ray.stages.index import IndexConfig, index
from readapt_ray.stages.ingest import IngestConfig, ingest
from readapt_ray.storage import Location
from tests import factories
from tests.recipes.refreshing.in_process import without_ray

ROWS_PER_FILE, ROWS_PER_SHARD = 20, 15


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = factories.tiny_encoder(tmp_path_factory.mktemp("model") / "model", headless=True)
    factories.write_contract(folder)
    return folder


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], list[str]]]:
    """The names of the parts of passages and of the files of vectors that each comparison read."""
    without_ray(monkeypatch)
    found: list[tuple[list[str], list[str]]] = []
    join = earlier_plan.join_digests

    def noted(passages: ParquetRows, earlier: ParquetRows, folder: Location) -> earlier_plan.Joined:
        found.append(([name for name, _ in passages.counts], [name for name, _ in earlier.counts]))
        return join(passages, earlier, folder)

    monkeypatch.setattr(earlier_plan, "join_digests", noted)
    return found


def corpus(folder: Path, passages: list[Passage], previous: Path | None) -> Artifact:
    folder.mkdir(parents=True)
    rows = [{"_id": each.doc_id, "title": each.title, "text": each.text} for each in passages]
    (folder / "corpus.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    given = {"previous": str(previous / "corpus")} if previous else {}
    source, output = str(folder / "corpus.jsonl"), str(folder / "corpus")
    return ingest(IngestConfig.parse({"source": source, "output": output, "rows_per_file": ROWS_PER_FILE, **given}))


def vectors(folder: Path, model: Path, previous: Path | None) -> Artifact:
    given = {"previous": str(previous / "vectors")} if previous else {}
    values = {"retriever": str(model), "corpus": str(folder / "corpus"), "output": str(folder / "vectors")}
    values |= {"rows_per_shard": ROWS_PER_SHARD, "num_workers": 1, "dtype": "float32", "batch_tokens": 1}
    return embed(EmbedConfig.parse(values | given))


def indexed_again(folder: Path, previous: Path | None) -> Artifact:
    given = {"previous": str(previous / "index")} if previous else {}
    return index(IndexConfig.parse({"vectors": str(folder / "vectors"), "output": str(folder / "index"), **given}))


def indexed(artifact: Artifact) -> dict[str, bytes]:
    """Content hash of each doc_id that is found."""
    found: dict[str, bytes] = {}
    for record in artifact.manifest.details["shards"]:
        doc_ids, hashes = read_ids(artifact.location / "shards", ShardRecord(**record))
        here = {each: hashes[16 * row : 16 * row + 16] for row, each in enumerate(doc_ids) if each != DELETED}
        assert not here.keys() & found.keys()
        found |= here
    return found


def passage(number: int, version: int = 0) -> Passage:
    return Passage(f"d{number:04d}", "", f"passage {number} of version {version}")


def stored(artifact: Artifact) -> dict[str, tuple[bytes, bytes]]:
    """Content hash and vector of each doc_id."""
    files = (artifact.location / "vectors").files(".parquet")
    rows = [row for file in files for row in dead_rows.read_table(file).to_pylist()]
    found = {row["doc_id"]: (row["content_hash"], np.array(row["vector"], np.float32).tobytes()) for row in rows}
    assert len(found) == len(rows)
    return found


def expected(model: Path, passages: list[Passage]) -> dict[str, tuple[bytes, bytes]]:
    encoder = Encoder.load(open_model(str(model)), batch_tokens=1)
    matrix = encoder.encode([each.text for each in passages], "passage", [each.title for each in passages])
    return {
        each.doc_id: (content_hash(each.title, each.text), row.astype(np.float32).tobytes())
        for each, row in zip(passages, matrix, strict=True)
    }


def test_of_unchanged_parts_nothing_is_read(
    tmp_path: Path, model: Path, read: list[tuple[list[str], list[str]]]
) -> None:
    now = [passage(number) for number in range(100)]
    corpus(tmp_path / "0", now, None)
    vectors(tmp_path / "0", model, None)
    now[0] = passage(0, 1)
    corpus(tmp_path / "1", now, tmp_path / "0")
    made = vectors(tmp_path / "1", model, tmp_path / "0")
    parts, files = [f"part-{number:05d}.parquet" for number in range(5)], ["part-00000.parquet", "part-00001.parquet"]
    assert read == [([*parts[:2]], [*files, "part-00002.parquet"])], "the part, and what has vectors in a file with it"
    changes = {"num_unchanged": 99, "num_changed": 1, "num_new": 0, "num_deleted": 0}
    assert made.manifest.details["changes"] == changes
    assert stored(made) == expected(model, now)
    corpus(tmp_path / "2", [*now, passage(100)], tmp_path / "1")
    assert stored(vectors(tmp_path / "2", model, tmp_path / "1")) == expected(model, [*now, passage(100)])
    assert read[1][0] == parts[3:], "the part that grew, and the one before it, which has vectors in a file with it"


def test_shared_parts_are_not_opened_and_the_table_of_footers_says_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [passage(number) for number in range(100)]
    corpus(tmp_path / "0", now, None)
    read: list[str] = []
    read_footer = footers.read_footer
    monkeypatch.setattr(footers, "read_footer", lambda file: read.append(file.name) or read_footer(file))
    now[30] = passage(30, 1)
    made = corpus(tmp_path / "1", now, tmp_path / "0").location
    assert read == ["part-00001.parquet"]
    listed, opened = footers.listed_footers(made, "passages"), footers.named_footers(made / "passages")
    assert sorted(read[1:]) == list(opened) == list(listed), "none is opened for the table"
    assert listed == {name: replace(each, schema=listed[name].schema) for name, each in opened.items()}
    assert all(listed[name].schema.equals(each.schema) for name, each in opened.items())


@pytest.mark.parametrize("seed", range(6))
def test_after_random_changes_every_passage_has_its_vector_once(
    tmp_path: Path,
    model: Path,
    read: list[tuple[list[str], list[str]]],
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
) -> None:
    """Changes in one place or in many, deletions, additions, ids that come back, texts that move to other ids."""
    draw = random.Random(seed)
    now = [passage(number) for number in range(100)]
    corpus(tmp_path / "0", now, None)
    vectors(tmp_path / "0", model, None)
    indexed_again(tmp_path / "0", None)
    by_changes: list[bool] = []
    looked = index_changes.kept_and_added_by_changes
    monkeypatch.setattr(
        index_changes,
        "kept_and_added_by_changes",
        lambda *given: by_changes.append((found := looked(*given)) is not None) or found,
    )
    for step in range(1, 6):
        before = {each.doc_id: each for each in now}
        first = draw.randrange(len(now))
        some = (
            set(range(first, first + draw.randrange(1, 12))) if draw.random() < 0.7 else set(range(first % 7, 200, 7))
        )
        kinds = [draw.choice(["change", "delete", "add", "swap"]) for _ in now]
        changed: list[Passage] = []
        for place, each in enumerate(now):
            kind = kinds[place] if place in some else ""
            if kind == "change":
                changed.append(each._replace(text=f"{each.text}, step {step}"))
            elif kind == "add":
                changed += [each, passage(1000 * step + place)]
            elif kind == "swap":
                changed.append(each._replace(doc_id=f"{each.doc_id}-{step}"))
            elif kind != "delete":
                changed.append(each)
        now = changed
        corpus(tmp_path / str(step), now, tmp_path / str(step - 1))
        made = vectors(tmp_path / str(step), model, tmp_path / str(step - 1))
        assert stored(made) == expected(model, now)
        there = {each.doc_id: each for each in now}
        same = sum(before.get(doc_id) == each for doc_id, each in there.items())
        known = len(there.keys() & before.keys())
        counts = (same, known - same, len(there) - known, len(before) - known)
        assert tuple(made.manifest.details["changes"].values()) == counts
        assert indexed(indexed_again(tmp_path / str(step), tmp_path / str(step - 1))) == {
            each.doc_id: content_hash(each.title, each.text) for each in now
        }
        counts, origins = counts_and_origins(made.location)
        assert counts.keys() == origins.keys() and all(each.sources for each in origins.values())
    assert min(len(parts) for parts, _ in read) < 6
    assert len(by_changes) == 5 and by_changes[0]


def test_everything_is_read_where_a_file_does_not_say_where_its_passages_are(tmp_path: Path) -> None:
    passages = ParquetRows(Location(str(tmp_path)), (("a", 5), ("b", 5), ("c", 5)))
    rows = ParquetRows(Location(str(tmp_path)), (("v", 5), ("w", 10)))
    known = {name: {"num_left_out": 0} for name in ("v", "w")}
    origins = {"v": Origin(("A",), ""), "w": Origin(("B", "C"), "")}
    earlier = EarlierVectors(rows, known, origins)

    def read(digests: tuple[str, str, str], earlier: EarlierVectors = earlier) -> tuple[str, str, set[str]]:
        found = to_read(passages, dict(zip("abc", digests, strict=True)), earlier)
        both = ("".join(name for name, _ in each.counts) for each in (found.passages, found.earlier))
        return (*both, set(found.unchanged_files))

    assert read(("A", "B", "C")) == ("", "", {"v", "w"})
    assert read(("A", "B", "X")) == ("bc", "w", {"v"}), "passages of b have vectors in the file of c"
    assert read(("X", "B", "C")) == ("a", "v", {"w"})
    assert read(("", "B", "C")) == ("a", "v", {"w"}), "a part without a digest"
    everything = ("abc", "vw", set())
    same = ("A", "B", "C")
    assert read(same, replace(earlier, origins={"v": origins["v"]})) == everything, "an older release wrote the other"
    assert read(same, replace(earlier, origins=origins | {"w": Origin((), "")})) == everything
    without_vector = known | {"w": {"num_left_out": 1}}
    assert read(same, replace(earlier, file_counts=without_vector)) == everything, "a passage is in no file"
