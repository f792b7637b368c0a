"""What tune measures on: a sample that keeps what is judged, and queries that can be measured."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from readapt_ray.errors import CorpusError, InputError
from readapt_ray.records import Passage, Qrel, Query
from readapt_ray.stages import tune
from readapt_ray.stages.tune import TuneConfig
from tests import factories


def config(folder: Path, **changes: object) -> TuneConfig:
    names = ("pretrained", "retriever", "adapter")
    values = dict.fromkeys(names, "x") | {"corpus": str(folder / "corpus"), "output": str(folder / "out")}
    return TuneConfig.parse(values | changes)


def judged(folder: Path, **changes: object) -> TuneConfig:
    labels = {"queries": str(folder / "corpus/queries"), "qrels": str(folder / "corpus/qrels/test.parquet")}
    return config(folder, **labels, **changes)


def test_a_sample_keeps_every_judged_passage_and_fills_up_evenly(tmp_path: Path) -> None:
    passages = factories.small_corpus(100)
    queries, qrels = factories.small_queries(passages, 10)
    corpus = factories.ingest_artifact(tmp_path / "corpus", passages, queries, qrels)
    wanted = {qrel.doc_id for qrel in qrels}
    times: Counter[str] = Counter()
    for seed in range(60):
        sample = tune._judged_sample(judged(tmp_path, max_passages=40, seed=seed), corpus)
        found = [passage.doc_id for passage in sample.passages]
        assert len(found) == len(set(found)) == 40
        assert wanted <= set(found)
        times.update(found)
    others = [times[passage.doc_id] for passage in passages if passage.doc_id not in wanted]
    assert min(others) > 5, "20 is the mean of 60 draws of 30 among 90: none is left out for where it stands"
    assert max(others) < 40
    alone = tune._judged_sample(judged(tmp_path, max_passages=3), corpus)
    assert {passage.doc_id for passage in alone.passages} == wanted
    assert len(tune._judged_sample(judged(tmp_path), corpus).passages) == 100


def test_only_queries_with_a_relevant_passage_are_taken_and_no_more_than_wanted(tmp_path: Path) -> None:
    passages = factories.small_corpus(30)
    queries, qrels = factories.small_queries(passages, 8)
    hopeless = [Qrel("none", passages[-1].doc_id, 0)]
    more = [*queries, Query("none", "judged, and nothing relevant"), Query("nobody", "not judged")]
    corpus = factories.ingest_artifact(tmp_path / "corpus", passages, more, [*qrels, *hopeless])
    sample = tune._judged_sample(judged(tmp_path), corpus)
    assert [query.query_id for query in sample.queries] == [query.query_id for query in queries]
    few = tune._judged_sample(judged(tmp_path, max_queries=3), corpus)
    assert len(few.queries) == len(few.judgements) == 3
    assert {query.query_id for query in few.queries} == set(few.judgements) < {query.query_id for query in queries}
    factories.ingest_artifact(tmp_path / "one" / "corpus", passages, queries[:1], qrels[:1])
    with pytest.raises(InputError, match=r"has 1 queries with a relevant passage .* at least 2 are needed"):
        tune._judged_sample(judged(tmp_path / "one"), corpus)


def test_pseudo_queries_are_found_by_their_passage_alone(tmp_path: Path) -> None:
    passages = [
        Passage(each.doc_id, "", f"How does {each.doc_id} lock a thread? {each.text} {each.text}")
        for each in factories.small_corpus(20)
    ]
    corpus = factories.ingest_artifact(tmp_path / "corpus", passages)
    sample = tune._pseudo_sample(config(tmp_path, max_queries=5), corpus)
    assert len(sample.queries) == 5
    assert len(sample.passages) == 20
    texts = {passage.doc_id: passage.text for passage in sample.passages}
    for query in sample.queries:
        [(doc_id, relevance)] = sample.judgements[query.query_id].items()
        assert relevance == 1
        assert query.text == f"How does {doc_id} lock a thread?"
        assert query.text not in texts[doc_id]
    short = factories.ingest_artifact(
        tmp_path / "short" / "corpus", [Passage("a", "", "too short"), Passage("b", "", "x")]
    )
    with pytest.raises(CorpusError, match=r"gives 0 pseudo-queries .* give queries and qrels"):
        tune._pseudo_sample(config(tmp_path / "short"), short)


def test_a_pair_is_measured_on_the_best_hundred(tmp_path: Path) -> None:
    passages = factories.small_corpus(150)
    sample = tune._Sample(
        passages,
        [Query("a", "x"), Query("b", "x")],
        {"a": {passages[0].doc_id: 1}, "b": {passages[149].doc_id: 1}},
    )
    scores = np.stack([np.arange(150.0)[::-1], -np.arange(150.0)])
    measured = tune._measured(sample, scores, "RR")
    assert dict(zip(measured.query_ids, measured.values["RR"], strict=True)) == {"a": 1.0, "b": 0.0}
    few = tune._Sample(passages[:2], sample.queries[:1], {"a": {passages[1].doc_id: 1}})
    two = tune._measured(few, scores[:1, :2], "RR")
    assert two.values["RR"].tolist() == [0.5]
