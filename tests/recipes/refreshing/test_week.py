"""A week of refreshes by the real stages, each compared with vectors and searches that are computed afresh."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from readapt_ray import artifacts
from readapt_ray.catalog.models import open_model
from readapt_ray.generations import Generation
from readapt_ray.recipes.refreshing.clean import clean
from readapt_ray.recipes.refreshing.options import CleanConfig
from readapt_ray.records import Passage
from readapt_ray.retrieval.encoder import Encoder
from readapt_ray.retrieval.vector_index import VectorIndex
from readapt_ray.stages.embed import EmbedConfig, embed
from readapt_ray.stages.ingest import IngestConfig, ingest
from tests import factories
from tests.recipes.refreshing import root as roots
from tests.recipes.refreshing.root import Root

NUM_PASSAGES = 240
EMBED: dict[str, Any] = {"batch_tokens": 1, "num_workers": 1, "dtype": "float32"}
"""A text per batch: the vector of a text differs in its last bits with the texts that it shares a batch with."""


def week(passages: Sequence[Passage]) -> Iterator[tuple[str, list[Passage]]]:
    """Yield a name and the corpus of each day, each made from the day before."""
    draw, now = random.Random(0), list(passages)
    now += [each._replace(doc_id=f"new-{each.doc_id}") for each in factories.small_corpus(12, seed=5)]
    yield "added", list(now)
    for place in draw.sample(range(len(now)), 6):
        now[place] = now[place]._replace(text=f"{now[place].text} It was changed.")
    yield "changed", list(now)
    gone = [now.pop(draw.randrange(len(now))) for _ in range(9)]
    yield "deleted", list(now)
    now[3:3] = gone[:4]
    yield "added again", list(now)
    now[10] = now[10]._replace(title="a title of its own")
    yield "title only", list(now)
    now[20], now[21] = now[20]._replace(text=now[21].text), now[21]._replace(text=now[20].text)
    yield "texts swapped", list(now)
    now[30] = now[30]._replace(text=gone[8].text)
    del now[40:44]
    now.append(Passage("last", "", "a passage that is quite new"))
    draw.shuffle(now)
    yield "everything at once", list(now)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("ray_session")
def test_each_refresh_of_a_week_equals_a_fresh_run(tmp_path: Path) -> None:
    root = Root(tmp_path, roots.models(tmp_path / "models") / "model")
    encoder = Encoder.load(open_model(str(root.model)))
    queries = encoder.encode(["a file is read", "the lock of a thread", "an edge of the graph"], "query")
    passages = factories.small_corpus(NUM_PASSAGES)
    root.holds(passages)
    first = root.refresh(embed=EMBED, to=f"files:{root.uri}/collection")
    vectors = {each.doc_id: root.vectors(first)[each.doc_id] for each in passages}
    seen = dict.fromkeys(passages)
    for name, now in week(passages):
        root.holds(now)
        made = root.refresh()
        expected = {each.doc_id: _vector(encoder, each) for each in now}
        assert root.vectors(made) == expected, name
        assert root.passages(made) == {each.doc_id: each[1:3] for each in now}, name
        assert _top_ten(made, root, queries) == _best(expected, queries), name
        assert sum(made.counts.values()) == len(now) + made.counts["deleted"], name
        encoded = artifacts.open_artifact(made.folder(root.location, "vectors"), "embed").manifest.details["work"]
        assert encoded["num_encoded"] <= made.counts["added"] + made.counts["changed"], name
        vectors |= expected
        seen |= dict.fromkeys(now)
    _compare_with_fresh_stages(root, made, tmp_path / "fresh")
    clean(CleanConfig(root=root.uri, yes=True))
    _nothing_is_left(root, seen, now, vectors)


def _vector(encoder: Encoder, passage: Passage) -> bytes:
    return encoder.encode([passage.text], "passage", [passage.title])[0].astype(np.float32).tobytes()


def _top_ten(made: Generation, root: Root, queries: np.ndarray) -> list[list[str]]:
    index = VectorIndex.open(made.folder(root.location, "index"))
    return index.search(queries, 10).doc_ids.tolist()


def _best(vectors: dict[str, bytes], queries: np.ndarray) -> list[list[str]]:
    doc_ids = np.array(sorted(vectors))
    matrix = np.array([np.frombuffer(vectors[each], np.float32) for each in doc_ids])
    return [doc_ids[np.argsort(-(matrix @ query), kind="stable")[:10]].tolist() for query in queries]


def _compare_with_fresh_stages(root: Root, made: Generation, folder: Path) -> None:
    corpus = ingest(IngestConfig(source=str(root.source), output=str(folder / "corpus")))
    fresh = embed(EmbedConfig(retriever=str(root.model), corpus=corpus.uri, output=str(folder / "vectors"), **EMBED))
    there = artifacts.open_artifact(made.folder(root.location, "vectors"), "embed")
    assert there.fingerprint == fresh.fingerprint
    assert root.table(made, "vectors", "vectors").equals(_table(fresh))


def _table(vectors: artifacts.Artifact) -> "roots.pa.Table":
    files = (vectors.location / "vectors").files(".parquet")
    return roots.pa.concat_tables(roots.pq.read_table(each.path) for each in files)


def _nothing_is_left(root: Root, seen: dict[Passage, None], now: list[Passage], vectors: dict[str, bytes]) -> None:
    """Search every byte for the ids, texts and vectors that the last day does not have."""
    ids, text = "\n".join(each.doc_id for each in now), "\n".join(each.text for each in now)
    gone = [each for each in seen if each.doc_id not in ids]
    needles = {f"id {each.doc_id}": each.doc_id.encode() for each in gone}
    needles |= {f"text of {each.doc_id}": each.text.encode() for each in seen if each.text not in text}
    needles |= {f"vector of {each.doc_id}": vectors[each.doc_id] for each in gone if each.text not in text}
    assert {name.split()[0] for name in needles} == {"id", "text", "vector"}
    assert root.files_with(needles) == []
