"""An embedding that is resumed with other earlier vectors than it was begun with, or without them."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from readapt_ray import dead_rows
from readapt_ray.artifacts import Artifact
from readapt_ray.cluster import shard_runner
from readapt_ray.errors import ArtifactConflictError
from readapt_ray.records import Passage
from readapt_ray.retrieval.shard_ledger import open_vectors
from readapt_ray.stages.embed import EmbedConfig, embed
from tests import factories
from tests.recipes.refreshing import root as roots
from tests.recipes.refreshing.in_process import without_ray

PASSAGES = factories.small_corpus(80)
ROWS = 20


@pytest.fixture
def embedding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Embedding":
    without_ray(monkeypatch)
    return Embedding(tmp_path, monkeypatch)


class Embedding:
    """Corpora, and their vectors by a tiny model."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder, self._monkeypatch = folder, monkeypatch
        self._model = roots.models(folder / "models") / "model"

    def corpus(self, name: str, passages: Sequence[Passage]) -> str:
        factories.ingest_artifact(self._folder / name, list(passages))
        return str(self._folder / name)

    def run(self, output: str, corpus: str, previous: str | None = None, **more: Any) -> Artifact:
        return embed(
            EmbedConfig(
                retriever=str(self._model),
                corpus=corpus,
                output=str(self._folder / output),
                previous=previous and str(self._folder / previous),
                rows_per_shard=ROWS,
                batch_tokens=1,
                num_workers=1,
                dtype="float32",
                **more,
            )
        )

    def files(self, output: str) -> dict[str, int]:
        return {each.name: each.stat().st_ino for each in (self._folder / output / "vectors").iterdir()}

    def killed(self, num_shards: int, *given: Any) -> None:
        results = shard_runner._results

        def some(*args: Any) -> Iterator[dict[str, Any]]:
            yield from itertools.islice(results(*args), num_shards)
            raise KeyboardInterrupt

        with self._monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(shard_runner, "_results", some)
            self.run(*given)


def rows_of(artifact: Artifact) -> dict[str, list[float]]:
    vectors = open_vectors(artifact)
    tables = (dead_rows.read_table(vectors.folder / name) for name, _ in vectors.counts)
    rows = [row for table in tables for row in table.to_pylist()]
    assert len(rows) == len({row["doc_id"] for row in rows})
    return {row["doc_id"]: row["vector"] for row in rows}


@pytest.mark.parametrize(("begun", "resumed"), [("v1", None), ("v1", "w1"), (None, "v1")])
def test_shards_of_another_plan_are_refused_or_replaced(
    embedding: Embedding, begun: str | None, resumed: str | None
) -> None:
    now = [
        *(each._replace(doc_id=f"new-{each.doc_id}", text=f"{each.text} anew") for each in PASSAGES[:ROWS]),
        *PASSAGES,
    ]
    embedding.run("v1", embedding.corpus("c1", PASSAGES))
    embedding.run("w1", embedding.corpus("d1", now[:80]))
    corpus = embedding.corpus("c2", now)
    embedding.killed(0 if begun else 2, "v2", corpus, begun)
    with pytest.raises(ArtifactConflictError, match=r"was begun .*, and this run has previous = .* add --overwrite"):
        embedding.run("v2", corpus, resumed)
    made = embedding.run("v2", corpus, resumed, overwrite=True)
    assert rows_of(made) == rows_of(embedding.run("fresh", corpus))


def test_an_embedding_on_earlier_vectors_is_resumed(embedding: Embedding) -> None:
    embedding.run("v1", embedding.corpus("c1", PASSAGES))
    now = [each._replace(text=f"{each.text} anew") for each in PASSAGES[:50]] + PASSAGES[50:]
    corpus = embedding.corpus("c2", now)
    for num_shards in (0, 1):
        embedding.killed(num_shards, "v2", corpus, "v1")
    before = embedding.files("v2")
    made = embedding.run("v2", corpus, "v1")
    assert before and before.items() <= embedding.files("v2").items(), "what was written stays"
    assert rows_of(made) == rows_of(embedding.run("fresh", corpus))
