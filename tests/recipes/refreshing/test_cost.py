"""What a refresh writes follows what changed: counted on a real S3 server, with the real stages and without Ray."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from readapt_ray import artifacts
from readapt_ray.catalog.models import open_model
from readapt_ray.generations import Generation
from readapt_ray.recipes.refreshing.clean import clean
from readapt_ray.recipes.refreshing.find import find
from readapt_ray.recipes.refreshing.options import CleanConfig, FindConfig
from readapt_ray.retrieval.encoder import Encoder
from readapt_ray.retrieval.vector_index import VectorIndex
from tests import factories, object_store
from tests.recipes.refreshing import root as roots
from tests.recipes.refreshing.in_process import without_ray
from tests.recipes.refreshing.root import Root

ROWS = 40
OPTIONS: dict[str, Any] = {
    "ingest": {"rows_per_file": ROWS},
    "embed": {"batch_tokens": 1, "num_workers": 1, "dtype": "float32", "rows_per_shard": ROWS},
}
PASSAGES = [
    each._replace(doc_id=f"p{number:05d}", text=f"{each.text} {number}")
    for number, each in enumerate(factories.small_corpus(400))
]


@pytest.fixture(scope="module")
def store() -> Iterator[object_store.Store]:
    with object_store.running() as running:
        yield running


def cost(store: object_store.Store, root: Root, **options: Any) -> tuple[int, Generation]:
    """The bytes that a refresh sends to the store, and its generation."""
    before = store.bytes_written
    made = root.refresh(**options)
    return store.bytes_written - before, made


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_is_written_follows_what_changed(
    store: object_store.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    root = Root(tmp_path, roots.models(tmp_path / "models") / "model", f"s3://{object_store.BUCKET}/cost")
    encoder = Encoder.load(open_model(str(root.model)))
    root.holds(PASSAGES)
    first_bytes, first = cost(store, root, **OPTIONS)
    unchanged_bytes, same = cost(store, root)
    assert same == first and unchanged_bytes < 0.03 * first_bytes
    one_place = [*PASSAGES[:205], _new(201), *PASSAGES[205:210], _changed(210), _changed(211), *PASSAGES[213:]]
    root.holds(one_place)
    num_bytes, made = cost(store, root)
    assert made.counts == {"added": 1, "changed": 2, "deleted": 1, "kept": 397}
    assert num_bytes < 0.25 * first_bytes, "one of ten files of passages, three vectors, and the records"
    equals_fresh(root, made, one_place, encoder)
    spread = [_changed(number) if number % 21 == 5 else each for number, each in enumerate(PASSAGES) if number % 23]
    root.holds(spread)
    num_bytes, made = cost(store, root)
    assert num_bytes < 0.6 * first_bytes, "all files of passages; of vectors and index only what is new"
    assert made.counts["deleted"] > 15 and made.counts["changed"] > 15
    vectors = artifacts.open_artifact(made.folder(root.location, "vectors"), "embed").manifest
    assert 30 < vectors.details["num_dead"] < 40
    equals_fresh(root, made, spread, encoder)
    gone = [each for number, each in enumerate(PASSAGES) if number % 23 == 0]
    needles = {f"id {each.doc_id}": each.doc_id.encode() for each in gone}
    needles |= {f"text {each.doc_id}": each.text.encode() for each in (*gone, PASSAGES[5], PASSAGES[26])}
    needles |= {f"vector {each.doc_id}": _vector(encoder, each).tobytes() for each in (*gone, PASSAGES[5])}
    assert {each.split()[0] for each in root.files_with(needles)} == {"id", "text", "vector"}
    assert "deleted; `readapt clean` removes it" in {row["where"].partition(", ")[2] for row in _found(root, gone[3])}
    clean(CleanConfig(root=root.uri, yes=True))
    equals_fresh(root, root.there()[-1], spread, encoder)
    assert root.files_with(needles) == [] and _found(root, gone[3]) == []


def _new(number: int) -> factories.Passage:
    return PASSAGES[number]._replace(doc_id=f"new-{number}", text=f"{PASSAGES[number].text} new")


def _changed(number: int) -> factories.Passage:
    return PASSAGES[number]._replace(text=f"quite another text than before {number}")


def _found(root: Root, passage: factories.Passage) -> list[dict[str, Any]]:
    return find(FindConfig(root=root.uri, doc_id=passage.doc_id))


def equals_fresh(root: Root, made: Generation, now: list[factories.Passage], encoder: Encoder) -> None:
    """Passages, vectors to the bit and the ten best are those that are computed afresh."""
    queries = encoder.encode(["a file is read", "the lock of a thread"], "query")
    expected = {each.doc_id: _vector(encoder, each) for each in now}
    assert root.passages(made) == {each.doc_id: each[1:3] for each in now}
    assert root.vectors(made) == {doc_id: vector.tobytes() for doc_id, vector in expected.items()}
    found = VectorIndex.open(made.folder(root.location, "index")).search(queries, 10).doc_ids.tolist()
    doc_ids, matrix = np.array(list(expected)), np.stack(list(expected.values()))
    assert [set(each) for each in found] == [set(doc_ids[np.argsort(-(matrix @ query))[:10]]) for query in queries]


@functools.cache
def _vector(encoder: Encoder, passage: factories.Passage) -> np.ndarray:
    return encoder.encode([passage.text], "passage", [passage.title])[0].astype(np.float32)
