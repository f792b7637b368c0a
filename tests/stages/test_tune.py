"""What tune measures on: a sample that keeps what is judged, and queries that can be measured; and its actors."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from readapt_ray.artifacts import Workspace, produce
from readapt_ray.catalog.models import open_model
from readapt_ray.cluster import scale_scoring
from readapt_ray.config import StageConfig
from readapt_ray.errors import (
    CorpusError,
    CorruptFileError,
    InputError,
    ModelError,
    PlacementError,
    WeightMismatchError,
    WorkerError,
)
from readapt_ray.progress import ProgressReporter
from readapt_ray.records import Passage, Qrel, Query
from readapt_ray.stages import tune
from readapt_ray.stages.tune import TuneConfig
from readapt_ray.storage import Location
from readapt_ray.weights.scale_options import layer_scales
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
    with pytest.raises(InputError, match=r"has 1 query with a relevant passage .* at least 2 are needed"):
        tune._judged_sample(judged(tmp_path / "one"), corpus)


def test_judgements_are_read_from_the_columns_that_are_given(tmp_path: Path) -> None:
    passages = factories.small_corpus(30)
    queries, qrels = factories.small_queries(passages, 4)
    corpus = factories.ingest_artifact(tmp_path / "corpus", passages)
    rows = ["topic\tpaper\tgrade", *(f"{each.query_id}\t{each.doc_id}\t{each.relevance}" for each in qrels)]
    (tmp_path / "judged.tsv").write_text("\n".join(rows) + "\n")
    lines = ["topic\twording", *(f"{each.query_id}\t{each.text}" for each in queries)]
    (tmp_path / "asked.tsv").write_text("\n".join(lines) + "\n")
    files = {"queries": str(tmp_path / "asked.tsv"), "qrels": str(tmp_path / "judged.tsv")}
    columns = "query_id=topic,query=wording,doc_id=paper,relevance=grade"
    sample = tune._judged_sample(config(tmp_path, **files, columns=columns), corpus)
    assert [query.text for query in sample.queries] == [query.text for query in queries]
    assert sample.judgements == {each.query_id: {each.doc_id: each.relevance} for each in qrels}


def test_the_pairs_that_are_tried_are_of_the_given_scales_and_refinements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passages = factories.small_corpus(30)
    corpus = factories.ingest_artifact(tmp_path / "corpus", passages, *factories.small_queries(passages, 8))
    tried: list[list[tuple[float, float]]] = []

    class Scoring:
        seconds: dict[str, float] = {}  # noqa: RUF012

        def __init__(self, num_workers: int, job: object, sample: scale_scoring.Sample, _: object) -> None:
            assert num_workers == 3
            self.values: dict[tuple[float, float], dict[str, float]] = {}
            self.query_ids = [query.query_id for query in sample.queries]

        def score(self, pairs: list[tuple[float, float]]) -> None:
            tried.append(pairs)
            self.values |= {pair: dict.fromkeys(self.query_ids, sum(pair)) for pair in pairs}

        def stop(self) -> None: ...

    monkeypatch.setattr(tune, "ScaleScoring", Scoring)
    scales = {"readapter_scales": "0.5,1", "knowledge_scales": "0,2", "num_refinements": 2, "num_workers": 3}
    workspace = Workspace(Location(str(tmp_path / "out")), "", ProgressReporter("tune"))
    job: Any = SimpleNamespace(layers=())
    tune._tune(judged(tmp_path, **scales, max_queries=4), corpus, job, workspace, split=None)
    coarse, finer, finest = tried
    assert set(coarse) == {(0.5, 0.0), (0.5, 2.0), (1.0, 0.0), (1.0, 2.0)}
    assert set(finer) == {(1.0, 1.0), (0.75, 1.0), (0.75, 2.0)}
    assert set(finest) == {(1.0, 1.5), (0.875, 1.5), (0.875, 2.0)}
    assert workspace.details["best"]["knowledge_scale"] == 2.0
    assert workspace.counts["num_queries"] == 4


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


def test_a_pair_is_measured_as_deep_as_its_measure_says(tmp_path: Path) -> None:
    passages = factories.small_corpus(150)
    sample = scale_scoring.Sample(
        passages,
        [Query("a", "x"), Query("b", "x")],
        {"a": {passages[0].doc_id: 1}, "b": {passages[149].doc_id: 1}},
    )
    scores = np.stack([np.arange(150.0)[::-1], -np.arange(150.0)])
    measurement = scale_scoring.measure_sample(sample, scores, "RR@100")
    assert dict(zip(measurement.query_ids, measurement.values["RR@100"], strict=True)) == {"a": 1.0, "b": 0.0}
    few = scale_scoring.Sample(passages[:2], sample.queries[:1], {"a": {passages[1].doc_id: 1}})
    two = scale_scoring.measure_sample(few, scores[:1, :2], "RR@100")
    assert two.values["RR@100"].tolist() == [0.5]


def test_a_measure_is_one_and_known_by_its_canonical_name(tmp_path: Path) -> None:
    for alias, name in (("MRR@10", "RR@10"), ("Recall@10", "R@10"), ("MAP", "AP"), ("nDCG@10", "nDCG@10")):
        assert config(tmp_path, measure=alias).measure == name
    with pytest.raises(InputError, match=r'measure = "nDCG@10,R@5": give one measure'):
        config(tmp_path, measure="nDCG@10,R@5")
    with pytest.raises(InputError, match="unknown measure 'nDGC@10'"):
        config(tmp_path, measure="nDGC@10")


def test_a_measure_is_taken_as_deep_as_it_says() -> None:
    passages = factories.small_corpus(300)
    sample = scale_scoring.Sample(passages, [Query("a", "x")], {"a": {passages[150].doc_id: 1}})
    scores = -np.arange(300.0)[None]
    assert scale_scoring.measure_sample(sample, scores, "R@200").values["R@200"].tolist() == [1.0]
    assert scale_scoring.measure_sample(sample, scores, "R@150").values["R@150"].tolist() == [0.0]


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_score_that_ranks_nothing_is_refused(broken: float) -> None:
    passages = factories.small_corpus(300)
    sample = scale_scoring.Sample(passages, [Query("a", "x")], {"a": {passages[250].doc_id: 1}})
    scores = -np.arange(300.0)[None]
    scores[0, 250] = broken
    with pytest.raises(
        InputError, match=rf"scales \(1, 2\): query 'a' has the score {broken} with 'd00250'; .*--dtype"
    ):
        scale_scoring.measure_sample(sample, scores, "RR", name="scales (1, 2)")


def test_a_query_does_not_find_itself_where_that_is_asked() -> None:
    passages = [Passage("q", "", "the argument itself"), *factories.small_corpus(20)]
    sample = scale_scoring.Sample(passages, [Query("q", "x"), Query("p", "x")], {each: {"d00000": 1} for each in "qp"})
    scores = -np.arange(21.0)[None].repeat(2, axis=0)
    assert scale_scoring.measure_sample(sample, scores, "RR").values["RR"].tolist() == [0.5, 0.5]
    assert scale_scoring.measure_sample(sample, scores, "RR", drop_self_hits=True).values["RR"].tolist() == [1.0, 0.5]
    assert scores[0, 0] == 0, "what is given stays as it is"


def test_a_corpus_that_was_copied_in_part_is_refused(tmp_path: Path) -> None:
    corpus = factories.ingest_artifact(tmp_path / "corpus", factories.small_corpus(40), num_files=4)
    (tmp_path / "corpus/passages/part-00002.parquet").unlink()
    with pytest.raises(CorruptFileError, match="passages holds 30 passages, and its manifest says 40"):
        tune._pseudo_sample(config(tmp_path), corpus)


def search(folder: Path, num_workers: int | None = None) -> scale_scoring.ScaleScoring:
    job = scale_scoring.ScoringJob(
        models=dict.fromkeys(scale_scoring.MODELS, "x"),
        fingerprints={},
        encoding=open_model(str(factories.write_contract(factories.tiny_decoder(folder / "m")))).encoding,
        measure="RR",
        drop_self_hits=False,
        dtype="float32",
        accept_vocabulary=False,
    )
    workspace = Workspace(Location(str(folder / "out")), "", ProgressReporter("tune"))
    return scale_scoring.ScaleScoring(num_workers, job, scale_scoring.Sample([], [], {}), workspace)


def scorer(folder: Path, *, dies: int) -> type:
    """An actor that scores nothing, and dies when it is told of a pair, so many times."""
    marks = folder / "marks"
    marks.mkdir()

    class Scorer:
        def __init__(self, job: object, sample: object) -> None: ...

        def load(self) -> None: ...

        def score(self, pair: tuple[float, float]) -> tuple[object, dict[str, float], dict[str, float]]:
            import os

            died = len(list(marks.iterdir()))
            if died < dies:
                (marks / str(died)).touch()
                os._exit(1)
            return pair, {"q": pair[1]}, {"weights": 0.5}

    return Scorer


PAIRS = [(1.0, number / 10) for number in range(6)]


def test_more_actors_than_there_is_room_for_are_refused(ray_session: None, tmp_path: Path) -> None:
    with pytest.raises(PlacementError, match="3 actors of 1 CPU each cannot be placed: there is room for 2"):
        search(tmp_path, num_workers=3).score(PAIRS)


def test_an_actor_that_waits_for_room_keeps_no_pair_from_being_scored(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scale_scoring, "_ScaleScorer", scorer(tmp_path, dies=0))
    # As where another job has the room.
    monkeypatch.setattr(scale_scoring.placement, "check_placement", lambda *_, **__: None)
    tried = search(tmp_path, num_workers=3)
    tried.score(PAIRS)
    tried.score([*PAIRS, (0.5, 0.5)])
    tried.stop()
    assert tried.values == {pair: {"q": pair[1]} for pair in [*PAIRS, (0.5, 0.5)]}
    assert tried.seconds == {"weights": 3.5}


def test_no_more_actors_start_than_there_are_pairs(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scale_scoring, "_ScaleScorer", scorer(tmp_path, dies=0))
    tried = search(tmp_path, num_workers=2)
    tried.score(PAIRS[:1])
    assert len(tried._idle) + len(tried._busy) == 1
    tried.stop()


def test_the_pair_of_an_actor_that_died_is_anothers_and_not_for_ever(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(scale_scoring, "_ScaleScorer", scorer(tmp_path, dies=2))
    tried = search(tmp_path)
    tried.score(PAIRS)
    tried.stop()
    assert tried.values.keys() == set(PAIRS)
    assert caplog.text.count("another actor takes its place") == 2
    (tmp_path / "again").mkdir()
    monkeypatch.setattr(scale_scoring, "_ScaleScorer", scorer(tmp_path / "again", dies=99))
    with pytest.raises(WorkerError):
        search(tmp_path / "again").score(PAIRS)
    assert len(list((tmp_path / "again/marks").iterdir())) == 3


def test_pairs_are_scored_with_the_factors_of_layers(ray_session: None, tmp_path: Path) -> None:
    base = factories.tiny_decoder(tmp_path / "base")
    models = {
        "pretrained": base,
        "retriever": factories.write_contract(factories.full_retriever(tmp_path / "retriever", base)),
        "adapter": factories.dora_adapter(tmp_path / "adapter", base),
    }
    passages = factories.small_corpus(20)
    queries, qrels = factories.small_queries(passages, 6)
    factories.ingest_artifact(tmp_path / "corpus", passages, queries, qrels)
    sample = scale_scoring.Sample(passages, queries, {each.query_id: {each.doc_id: 1} for each in qrels})
    names = {name: str(folder) for name, folder in models.items()}
    job = scale_scoring.ScoringJob(
        models=names,
        fingerprints={name: open_model(folder).fingerprint for name, folder in names.items()},
        encoding=open_model(names["retriever"]).encoding,
        measure="RR@100",
        drop_self_hits=False,
        dtype="float32",
        accept_vocabulary=False,
    )
    found = {}
    for layers in ("0-1=0", "0-1=2", ""):
        actor = scale_scoring._ScaleScorer(
            replace(job, layers=layer_scales(layers.split(",") if layers else [])), sample
        )
        actor.load()
        found[layers] = {scale: actor.score((1.0, scale))[1] for scale in (0.0, 0.5, 1.0)}
    assert found["0-1=0"][1.0] == found[""][0.0] != found[""][1.0]
    assert found["0-1=2"][0.5] == found[""][1.0]
    with pytest.raises(InputError, match=r"layer_scales = '0-5=0.5': the model has the layers 0 to 1"):
        tune.tune(judged(tmp_path, **names, layer_scales="0-5=0.5"))
    assert not (tmp_path / "out").exists()


def test_models_that_do_not_belong_together_are_refused_before_anything_is_scored(tmp_path: Path) -> None:
    """With an adapter of another base, whose shapes are the same, every pair of scales would score badly."""
    base = factories.tiny_decoder(tmp_path / "base")
    models = {
        "pretrained": str(base),
        "retriever": str(factories.write_contract(factories.full_retriever(tmp_path / "retriever", base))),
    }
    passages = factories.small_corpus(20)
    factories.ingest_artifact(tmp_path / "corpus", passages, *factories.small_queries(passages, 6))
    with pytest.raises(ModelError, match="retriever' is not an adapter; give the output of `readapt train`"):
        tune.tune(judged(tmp_path, **models, adapter=models["retriever"]))

    def write(workspace: Workspace) -> None:
        factories.dora_adapter(workspace.location.local_path, base)
        (workspace.location / "README.md").delete()

    other = StageConfig(output=str(tmp_path / "adapter"))
    produce("train", other, inputs={"corpus": "89ab", "pretrained": "0123"}, work=write)
    with pytest.raises(WeightMismatchError, match=r"fingerprint 0123.*--accept base"):
        tune.tune(judged(tmp_path, **models, adapter=str(tmp_path / "adapter")))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_retriever_with_more_words_is_tuned_where_that_is_accepted(ray_session: None, tmp_path: Path) -> None:
    import json

    import torch

    base = factories.tiny_decoder(tmp_path / "base")
    retriever = factories.write_contract(factories.full_retriever(tmp_path / "retriever", base))
    tensors = factories.read_tensors(retriever)
    words = tensors["embed_tokens.weight"]
    factories.write_tensors(retriever, tensors | {"embed_tokens.weight": torch.cat([words, words[:6]])})
    settings = json.loads((retriever / "config.json").read_text())
    (retriever / "config.json").write_text(json.dumps(settings | {"vocab_size": len(words) + 6}))
    tokenizer = factories.decoder_tokenizer()
    tokenizer.add_tokens(["<query>"])
    tokenizer.save_pretrained(retriever)
    passages = factories.small_corpus(20)
    factories.ingest_artifact(tmp_path / "corpus", passages, *factories.small_queries(passages, 6))
    models = {"pretrained": str(base), "retriever": str(retriever)}
    models["adapter"] = str(factories.dora_adapter(tmp_path / "adapter", base))
    options = {**models, "knowledge_scales": [0.5], "num_refinements": 0}
    with pytest.raises(ModelError, match="--accept vocabulary"):
        tune.tune(judged(tmp_path, **options))
    made = tune.tune(judged(tmp_path, **options, accept="vocabulary"))
    assert made.manifest.counts["num_pairs"] == 2
