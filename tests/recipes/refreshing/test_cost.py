"""What a refresh writes follows what changed: counted on a real S3 server, with the real stages and without Ray."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from readapt_ray.catalog.models import open_model
from readapt_ray.generations import Generation
from readapt_ray.recipes.refreshing.clean import clean
from readapt_ray.recipes.refreshing.options import CleanConfig
from readapt_ray.retrieval.encoder import Encoder
from readapt_ray.retrieval.vector_index import VectorIndex
from tests import factories, object_store
from tests.recipes.refreshing import root as roots
from tests.recipes.refreshing.in_process import without_ray
from tests.recipes.refreshing.root import Root

ROWS = 50
OPTIONS: dict[str, Any] = {
    "ingest": {"rows_per_file": ROWS},
    "embed": {"batch_tokens": 1, "num_workers": 1, "dtype": "float32", "rows_per_shard": ROWS},
}
PASSAGES = [
    each._replace(doc_id=f"p{number:05d}", text=f"{each.text} {number}")
    for number, each in enumerate(factories.small_corpus(1000))
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


def test_one_percent_that_changed_in_one_place_costs_little(
    store: object_store.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    root = Root(tmp_path, roots.models(tmp_path / "models") / "model", f"s3://{object_store.BUCKET}/cost")
    root.holds(PASSAGES)
    first_bytes, first = cost(store, root, **OPTIONS)
    unchanged_bytes, same = cost(store, root)
    assert same == first and unchanged_bytes < 0.03 * first_bytes
    added = [each._replace(doc_id=f"new-{each.doc_id}", text=f"{each.text} new") for each in PASSAGES[400:404]]
    changed = [each._replace(text=f"{each.text} changed") for each in PASSAGES[410:413]]
    now = [*PASSAGES[:405], *added, *PASSAGES[405:410], *changed, *PASSAGES[416:]]
    root.holds(now)
    num_bytes, made = cost(store, root)
    assert made.counts == {"added": 4, "changed": 3, "deleted": 3, "kept": 994}
    assert num_bytes < 0.2 * first_bytes, "one of 20 files of passages, one of vectors, and the records"
    equals_fresh(root, made, now)
    clean(CleanConfig(root=root.uri, yes=True))
    equals_fresh(root, root.there()[-1], now)
    gone = {f"id {each.doc_id}": each.doc_id.encode() for each in PASSAGES[413:416]}
    assert root.files_with(gone | {f"text {each.doc_id}": each.text.encode() for each in PASSAGES[413:416]}) == []


def equals_fresh(root: Root, made: Generation, now: list[factories.Passage]) -> None:
    """Passages, vectors to the bit and the ten best are those that are computed afresh."""
    encoder = Encoder.load(open_model(str(root.model)))
    queries = encoder.encode(["a file is read", "the lock of a thread"], "query")
    expected = {each.doc_id: encoder.encode([each.text], "passage", [each.title])[0].astype(np.float32) for each in now}
    assert root.passages(made) == {each.doc_id: each[1:3] for each in now}
    assert root.vectors(made) == {doc_id: vector.tobytes() for doc_id, vector in expected.items()}
    found = VectorIndex.open(made.folder(root.location, "index")).search(queries, 10).doc_ids.tolist()
    doc_ids, matrix = np.array(list(expected)), np.stack(list(expected.values()))
    assert [set(each) for each in found] == [set(doc_ids[np.argsort(-(matrix @ query))[:10]]) for query in queries]
