"""What is compared between two states of a corpus, and what calls for adapting again."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from readapt_ray.artifacts import Artifact
from readapt_ray.cluster import corpus_comparison
from readapt_ray.cluster.corpus_comparison import compare_corpora
from readapt_ray.recipes.refreshing.adapting import AdapterLoss
from readapt_ray.recipes.refreshing.signals import Signals, _samples, drift, new_words
from readapt_ray.records import Passage, content_hash
from readapt_ray.retrieval.corpus_changes import added_up, compare, is_known, known_contents
from readapt_ray.retrieval.parquet_rows import ParquetRows
from readapt_ray.retrieval.vector_files import write_vectors
from readapt_ray.stages.ingest import IngestConfig, ingest
from readapt_ray.storage import Location
from tests import factories

BEFORE = factories.small_corpus(120)
NOW = [
    *(each._replace(text=f"{each.text} more") for each in BEFORE[:10]),
    *(each._replace(title="other") for each in BEFORE[10:15]),
    BEFORE[20]._replace(text=BEFORE[21].text),
    BEFORE[21]._replace(text=BEFORE[20].text),
    *BEFORE[40:],
    *(each._replace(doc_id=f"new-{each.doc_id}") for each in BEFORE[:7]),
]


def test_a_content_is_known_whatever_its_id_and_place(tmp_path: Path) -> None:
    known = known_contents(
        corpus_comparison.opened(factories.ingest_artifact(tmp_path / "a", BEFORE, num_files=3), "passages")
    )
    before = {each[1:3] for each in BEFORE}
    found = is_known(known, [content_hash(each.title, each.text) for each in NOW])
    assert found.tolist() == [each[1:3] in before for each in NOW]
    assert 0 < found.sum() < len(NOW)
    assert not is_known(known[:0], [content_hash("", "a")]).any()


@pytest.mark.parametrize("num_parts", [1, 3])
def test_changes_are_those_that_a_dictionary_tells(tmp_path: Path, num_parts: int) -> None:
    old = corpus_comparison.opened(factories.ingest_artifact(tmp_path / "before", BEFORE, num_files=3), "passages")
    new = corpus_comparison.opened(factories.ingest_artifact(tmp_path / "now", NOW, num_files=2), "passages")
    found = added_up([compare(old, new, part, num_parts) for part in range(num_parts)])
    before, now = ({each.doc_id: each[1:] for each in side} for side in (BEFORE, NOW))
    both = before.keys() & now.keys()
    changed = {each for each in both if before[each] != now[each]}
    assert (found.added, found.changed, found.deleted, found.kept) == (
        len(now.keys() - before.keys()),
        len(changed),
        len(before.keys() - now.keys()),
        len(both) - len(changed),
    )
    ids = {name: set(new.take(rows, ("doc_id",))["doc_id"].to_pylist()) for name, rows in
           (("new", found.sample_new), ("kept", found.sample_kept))}  # fmt: skip
    assert ids == {"new": changed | (now.keys() - before.keys()), "kept": both - changed}


def test_many_passages_are_compared_by_ray_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_session: None
) -> None:
    before = factories.ingest_artifact(tmp_path / "before", BEFORE)
    now = factories.ingest_artifact(tmp_path / "now", NOW)
    here = compare_corpora(before, now)
    monkeypatch.setattr(corpus_comparison, "_PART_ROWS", 50)
    assert compare_corpora(before, now).counts() == here.counts()


def test_parts_with_the_same_rows_are_not_read_and_are_among_the_sampled(tmp_path: Path) -> None:
    """Both are seen from what is left when the other parts are gone."""
    before = ingested(tmp_path / "before", BEFORE, previous=None)
    now = ingested(tmp_path / "now", [*BEFORE[:47], *BEFORE[48:119], BEFORE[119]._replace(text="other")], before.uri)
    expected = {"added": 0, "changed": 1, "deleted": 1, "kept": 118}
    assert compare_corpora(before, now).counts() == expected
    for artifact in (before, now):
        for name, info in (artifact.location / "passages").listing():
            if name not in ("part-00002.parquet", "part-00005.parquet"):
                (artifact.location / "passages" / name).write_bytes(b"x" * info.size)
    found = compare_corpora(before, now)
    assert found.counts() == expected
    assert sorted(found.sample_kept.tolist()) == [*range(118)] and found.sample_new.tolist() == [118]


def test_kept_passages_are_sampled_from_few_places_of_a_large_corpus(tmp_path: Path) -> None:
    many = [Passage(f"d{number:07d}", "", f"text {number}") for number in range(200_000)]
    corpus = ingested(tmp_path / "many", many, previous=None)
    rows = compare_corpora(corpus, corpus).sample_kept
    assert len(rows) == len(set(rows.tolist())) == 2048
    assert 8 < len(set((rows // 4096).tolist())) <= 16


def test_vectors_are_sampled_from_shared_files_without_looking_for_doc_ids(tmp_path: Path) -> None:
    counts = []
    for number in range(20):
        vectors = np.full((3000, 2), number + 1, np.float32)
        doc_ids = [f"d{number}-{row:05d}" for row in range(3000)]
        write_vectors(
            Location(str(tmp_path / f"part-{number:05d}.parquet")), doc_ids, vectors, dtype="float32", metadata={}
        )
        counts.append((f"part-{number:05d}.parquet", 3000))
    rows = ParquetRows(Location(str(tmp_path)), tuple(counts))
    new, kept = (pa.chunked_array([names]) for names in (["d19-00007", "d3-00001"], ["d2-00001"]))
    found_new, found_kept = _samples(rows, new, kept, {name for name, _ in counts[:19]})
    assert found_new.tolist() == [[20, 20]]
    assert [each.shape for each in found_kept] == [(128, 2)] * 16
    assert len({float(each[0, 0]) for each in found_kept}) == 16
    found_new, found_kept = _samples(rows, new, kept, set())
    assert found_new.tolist() == [[4, 4], [20, 20]] and [each.tolist() for each in found_kept] == [[[3, 3]]]


def test_what_places_differ_by_is_no_drift() -> None:
    draw = np.random.default_rng(0)

    def place(size: int) -> np.ndarray:
        return (draw.normal(size=(1, 64)) + draw.normal(size=(size, 64))).astype(np.float32)

    new = np.concatenate([place(1) for _ in range(2000)])
    kept = [place(128) for _ in range(16)]
    one = drift(new, [np.concatenate(kept)])
    several = drift(new, kept)
    assert one is not None and several is not None and one > 0.15 and several < 0.1


def ingested(output: Path, passages: list[Passage], previous: str | None) -> Artifact:
    """A corpus in parts of 20 passages, or of 65,536 if it is large."""
    source = output.parent / f"{output.name}.jsonl"
    lines = (json.dumps({"_id": each.doc_id, "title": each.title, "text": each.text}) for each in passages)
    source.write_text("\n".join(lines))
    rows = 20 if len(passages) < 1000 else 65_536
    return ingest(IngestConfig(source=str(source), output=str(output), previous=previous, rows_per_file=rows))


def test_drift_is_the_distance_of_the_means_in_standard_deviations() -> None:
    draw = np.random.default_rng(0)
    kept = draw.normal(size=(2000, 64)).astype(np.float32)
    same = draw.normal(size=(200, 64)).astype(np.float32)
    # A shift of 0.1 in each of 64 dimensions, of which each has variance 1: 0.1 * 8 / 8.
    far = draw.normal(size=(2000, 64)).astype(np.float32) + 0.1
    assert drift(same, [kept]) == pytest.approx(0, abs=0.04)
    assert drift(far, [kept]) == pytest.approx(0.1, abs=0.01)
    assert drift(same[:10], [kept]) is None


def test_new_words_are_counted_above_what_kept_passages_differ_by_themselves() -> None:
    kept = [f"word{number // 2 % 10} rare{number}" for number in range(100)]
    assert new_words([f"word{number // 2 % 10} rare{number + 1000}" for number in range(100)], kept) == 0
    assert new_words(["alien being here now"] * 10, kept) == pytest.approx(0.5)  # all are new, and half of the others


@pytest.mark.parametrize(
    ("signals", "advice"),
    [
        (Signals(None, None, 0.9, 0.1), "nothing calls for adapting again"),
        (Signals(0.2, 0.05, 0.0, 0.3), "nothing calls for adapting again"),
        (Signals(0.7, 0.0, 0.0, 0.1), "adapt again: the vectors of new passages are 0.70 standard deviations from the others"),
        (Signals(0.0, 0.0, 0.0, 0.1, AdapterLoss(3.0, 2.0, 0.2, 0.3)), "nothing calls for adapting again"),
        (Signals(0.0, 0.0, 0.0, 0.1, AdapterLoss(3.0, 2.0, 0.04, 0.01)), "nothing calls for adapting again"),
        (
            Signals(0.0, 0.0, 0.0, 0.1, AdapterLoss(3.0, 2.0, 0.3, 0.2)),
            "adapt again: on new passages the adapter lowers the language-model loss 0.30 nats per token less than on the others",
        ),
        (
            Signals(0.0, 0.25, 0.0, 0.5),
            "adapt again: 25% of the words of new passages are new; 50% of the passages changed since this retriever was "
            "first used",
        ),
    ],
)  # fmt: skip
def test_the_advice_names_its_reasons(signals: Signals, advice: str) -> None:
    assert signals.advice() == advice
