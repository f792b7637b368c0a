"""tune: the best pair of scales, found on withheld queries without writing a model.

Actors hold the ingredients of the merge and write each pair of scales into a live encoder. A pair is
scored by retrieval over a sample of the corpus that keeps every judged passage: first a coarse grid, then
pairs half way between the best one and its neighbours. Half of the queries choose the pair; what is
reported comes from the other half, which had no say. Leaves `grid/` (the value of every query with every
pair), `tune.json`, `tune.md` and `tune.html`. A pair costs one pass over the weights and the encoding of
the sample.

Without judgements the corpus asks its own questions: the title of a passage, or its first sentence, is
the query, the rest of it the answer. Such figures are called pseudo-queries wherever they stand.
"""

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from readapt_ray import artifacts
from readapt_ray.artifacts import Artifact, Workspace
from readapt_ray.catalog import models
from readapt_ray.catalog.retrievers import Encoding
from readapt_ray.config import StageConfig
from readapt_ray.errors import CorpusError, InputError
from readapt_ray.records import Passage, Query, ScoredDoc
from readapt_ray.retrieval import scales
from readapt_ray.retrieval.scales import Pair
from readapt_ray.retrieval.templates import EncodingOption
from readapt_ray.stages import cluster, elsewhere
from readapt_ray.storage import Location

if TYPE_CHECKING:
    from readapt_ray.retrieval.measures import Measured

logger = logging.getLogger("readapt_ray")

_TOP_K = 100


class TuneConfig(StageConfig):
    """Options of tune."""

    pretrained: str
    """MODEL before retrieval training: catalog name, folder, URI or hub id."""
    retriever: str
    """MODEL to adapt."""
    adapter: str
    """The knowledge adapter: the output of `readapt train`, or a PEFT folder."""
    corpus: str
    """Passages: the output of `readapt ingest`."""
    queries: str | None = None
    """Withheld queries, a file or folder; without them the corpus asks its own (pseudo-queries)."""
    qrels: str | None = None
    """Judgements of the queries, a file or folder."""
    readapter_scales: tuple[float, ...] = (1.0,)
    """Shares of the retrieval skill to try."""
    knowledge_scales: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Shares of the new domain to try."""
    num_refinements: int = Field(default=1, ge=0, le=6)
    """Times that pairs half way between the best one and its neighbours are tried."""
    measure: str = "nDCG@10"
    """What is compared."""
    max_queries: int = Field(default=1000, ge=2)
    """Queries that are used at most, tuning and reporting together."""
    max_passages: int = Field(default=20_000, ge=1)
    """Passages of the sample at most; judged ones are always kept."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Type that the model computes in."""
    num_workers: int | None = Field(default=None, ge=1)
    """Actors, each with the model, that share the pairs; by default one a GPU, or one without GPUs."""
    seed: int = Field(default=0, ge=0)
    """Of the sample and of the halves."""
    encoding: EncodingOption = None
    """How the retriever wants its text, as a JSON file; default what its folder or the catalog says."""

    inputs: ClassVar[frozenset[str]] = frozenset(
        {"pretrained", "retriever", "adapter", "corpus", "queries", "qrels", "encoding"}
    )
    operational: ClassVar[frozenset[str]] = frozenset({"num_workers"})

    @model_validator(mode="after")
    def _both_or_none(self) -> Self:
        if (self.queries is None) != (self.qrels is None):
            raise ValueError("give both queries and qrels, or none of them")
        if not self.readapter_scales or not self.knowledge_scales:
            raise ValueError("give at least one readapter_scale and one knowledge_scale")
        return self


@dataclass(frozen=True)
class _Sample:
    passages: list[Passage]
    queries: list[Query]
    judgements: dict[str, dict[str, int]]


def tune(config: TuneConfig) -> Artifact:
    """Find the pair of scales that retrieves best.

    Raises:
        InputError: a model, the corpus, the queries or the measure cannot be used.
    """
    from readapt_ray.retrieval.measures import parse_measures

    parse_measures([config.measure])
    corpus = artifacts.open_artifact(config.corpus, "ingest")
    found = {name: models.find_model(getattr(config, name)) for name in ("pretrained", "retriever", "adapter")}
    encoding = config.encoding or models.encoding_of(found["retriever"])
    inputs = {"corpus": corpus.fingerprint, **{name: model.fingerprint() for name, model in found.items()}}
    for name in ("queries", "qrels"):
        uri = getattr(config, name)
        if uri is not None:
            if not Location(uri).exists():
                raise InputError(f"{name} = {uri!r} does not exist; give a file, or a folder of them")
            inputs[name] = artifacts.fingerprint(Location(uri).content_fingerprint())
    return artifacts.produce(
        "tune",
        config,
        inputs=inputs,
        identity={"encoding": encoding.model_dump(mode="json")},
        work=lambda workspace: _tune(config, corpus, encoding, workspace),
    )


def _tune(config: TuneConfig, corpus: Artifact, encoding: Encoding, workspace: Workspace) -> None:
    sample = _pseudo_sample(config, corpus) if config.queries is None else _judged_sample(config, corpus)
    search = _Search(config, encoding, sample, workspace)
    try:
        search.score(scales.coarse_pairs(config.readapter_scales, config.knowledge_scales))
        for _ in range(config.num_refinements):
            search.score(scales.finer_pairs(search.values, scales.best_pair(search.values, config.seed)))
    finally:
        search.stop()
    kind = "judged queries" if config.queries else "pseudo-queries made from the corpus"
    result = scales.describe_search(search.values, measure=config.measure, seed=config.seed, queries=kind)
    _write_report(workspace, result)
    workspace.counts = {
        "num_pairs": len(search.values),
        "num_queries": len(sample.queries),
        "num_passages": len(sample.passages),
    }
    workspace.details = {name: result[name] for name in ("queries", "best", "reported")}
    workspace.details["seconds"] = {name: round(spent, 2) for name, spent in search.seconds.items()}


def _write_report(workspace: Workspace, result: Mapping[str, Any]) -> None:
    from readapt_ray.retrieval import scale_report

    folder = workspace.location
    (folder / "tune.json").write_text(json.dumps(result, indent=2) + "\n")
    (folder / "tune.md").write_text(scale_report.to_markdown(result))
    (folder / "tune.html").write_text(scale_report.to_html(result))
    logger.info("tune: %s", scale_report.verdict(result))


class _Search:
    """Scores pairs on actors, which start with the first pair that is not there already."""

    def __init__(self, config: TuneConfig, encoding: Encoding, sample: _Sample, workspace: Workspace) -> None:
        self.values: dict[Pair, dict[str, float]] = {}
        self.seconds: dict[str, float] = {}
        """What the pairs of this process took, in all actors."""
        self._config, self._encoding, self._sample, self._workspace = config, encoding, sample, workspace
        self._actors: list[Any] = []

    def score(self, pairs: Sequence[Pair]) -> None:
        """Score these pairs; what an earlier process scored is read."""
        from ray.exceptions import RayError

        waiting = []
        for pair in pairs:
            if self._cell(pair).is_file():
                self.values[pair] = json.loads(self._cell(pair).read_text())
            else:
                waiting.append(pair)
        total = len(self.values) + len(waiting)
        try:
            for pair, values, seconds in self._scored(waiting):
                self._cell(pair).write_text(json.dumps(values))
                self.values[pair] = values
                self.seconds = {name: self.seconds.get(name, 0.0) + spent for name, spent in seconds.items()}
                self._workspace.progress(len(self.values), total, unit="pairs")
        except RayError as error:
            raise cluster.cause_of(error) from None

    def _scored(self, pairs: Sequence[Pair]) -> Iterator[tuple[Pair, dict[str, float], dict[str, float]]]:
        if not pairs:
            return
        from ray.util import ActorPool

        if not self._actors:
            self._actors = self._started()
        pool = ActorPool(self._actors)
        yield from pool.map_unordered(lambda actor, pair: actor.score.remote(pair), list(pairs))

    def _started(self) -> list[Any]:
        import ray

        resources = cluster.connect()
        names = {
            name: elsewhere.model_name(models.find_model(getattr(self._config, name)))
            for name in ("pretrained", "retriever", "adapter")
        }
        count = self._config.num_workers or max(1, resources.num_gpus)
        remote = ray.remote(num_cpus=1, num_gpus=1 if resources.num_gpus else 0)(_Scorer)
        sample = ray.put(self._sample)
        return [
            remote.remote(names, self._encoding, sample, self._config.measure, self._config.dtype) for _ in range(count)
        ]

    def stop(self) -> None:
        """End the actors."""
        import ray

        for actor in self._actors:
            ray.kill(actor)

    def _cell(self, pair: Pair) -> Location:
        return self._workspace.location / "grid" / f"{pair[0]:g}_{pair[1]:g}.json"


class _Scorer:
    """Actor: a live encoder whose scales can be set, and what it has to find."""

    def __init__(self, names: Mapping[str, str], encoding: Encoding, sample: _Sample, measure: str, dtype: str) -> None:
        import torch

        from readapt_ray.retrieval.encoder import DTYPES, Encoder
        from readapt_ray.weights.adapter import Adapter
        from readapt_ray.weights.checkpoint import Checkpoint
        from readapt_ray.weights.live import LiveReadapter
        from readapt_ray.weights.loading import load_model
        from readapt_ray.weights.readapter import Readapter, open_retriever

        pretrained, retriever, adapter = (
            models.find_model(names[name]) for name in ("pretrained", "retriever", "adapter")
        )
        device = "cuda" if torch.cuda.is_available() else "cpu"
        network = load_model(retriever, dtype=DTYPES[dtype], device=device)
        before = Checkpoint(pretrained.folder, name=pretrained.name)
        after = open_retriever(retriever.folder, before, name=retriever.name)
        knowledge = [Adapter(adapter.folder, before, name=adapter.name)]
        self._live = LiveReadapter(network, Readapter(before, after, knowledge))
        self._encoder = Encoder(network, models.load_tokenizer(retriever), encoding, identify=str)
        self._sample = sample
        self._measure = measure
        self._passage_ids = self._encoder.tokenize(
            [each.text for each in sample.passages], "passage", [each.title for each in sample.passages]
        )
        self._query_ids = self._encoder.tokenize([each.text for each in sample.queries], "query")

    def score(self, pair: Pair) -> tuple[Pair, dict[str, float], dict[str, float]]:
        """The pair, the measure of every query with these scales, and the seconds of each part."""
        marks = [time.monotonic()]
        self._live.set_scales(*pair)
        marks.append(time.monotonic())
        passages, queries = self._encoder.encode_ids(self._passage_ids), self._encoder.encode_ids(self._query_ids)
        marks.append(time.monotonic())
        measured = _measured(self._sample, queries @ passages.T, self._measure)
        marks.append(time.monotonic())
        values = dict(zip(measured.query_ids, measured.values[self._measure].tolist(), strict=True))
        return pair, values, dict(zip(("weights", "encoding", "measuring"), np.diff(marks).tolist(), strict=True))


def _measured(sample: _Sample, scores_QP: np.ndarray, measure: str) -> "Measured":
    from readapt_ray.retrieval.measures import measure_run, parse_measures
    from readapt_ray.retrieval.runs import Run

    top_k = min(_TOP_K, scores_QP.shape[1])
    best = np.argpartition(-scores_QP, top_k - 1, axis=1)[:, :top_k]
    results = {
        query.query_id: [
            ScoredDoc(query.query_id, sample.passages[column].doc_id, float(row[column])) for column in columns
        ]
        for query, row, columns in zip(sample.queries, scores_QP, best.tolist(), strict=True)
    }
    return measure_run(Run.of(results), sample.judgements, parse_measures([measure]))


def _passages(corpus: Artifact) -> Iterator[Passage]:
    import pyarrow.parquet as pq

    for file in (corpus.location / "passages").files(".parquet"):
        with file.open_input() as stream:
            for batch in pq.ParquetFile(stream).iter_batches():
                yield from (Passage(row["doc_id"], row["title"] or "", row["text"]) for row in batch.to_pylist())


def _sampled(corpus: Artifact, keep: Mapping[str, Any], size: int, seed: int) -> list[Passage]:
    """The passages to keep, filled up to `size` by a reservoir over the rest, in one pass."""
    random = np.random.default_rng(seed)
    kept: list[Passage] = []
    rest: list[Passage] = []
    room = max(0, size - len(keep))
    seen = 0
    for passage in _passages(corpus):
        if passage.doc_id in keep:
            kept.append(passage)
            continue
        seen += 1
        if len(rest) < room:
            rest.append(passage)
        elif room and (place := int(random.integers(seen))) < room:
            rest[place] = passage
    return kept + rest


def _judged_sample(config: TuneConfig, corpus: Artifact) -> _Sample:
    from readapt_ray.retrieval.measures import group_judgements
    from readapt_ray.retrieval.report import named
    from readapt_ray.sources.judgements import read_qrels, read_queries

    judgements = group_judgements(read_qrels(str(config.qrels)))
    queries = [
        query
        for query in read_queries(str(config.queries))
        if max(judgements.get(query.query_id, {}).values(), default=0) > 0
    ]
    if len(queries) < 2:
        raise InputError(
            f"{config.queries!r} has {len(queries)} queries with a relevant passage in {config.qrels!r}; at least 2 are needed"
        )
    order = np.random.default_rng(config.seed).permutation(len(queries))[: config.max_queries]
    queries = [queries[index] for index in sorted(order)]
    judgements = {query.query_id: judgements[query.query_id] for query in queries}
    keep = {doc_id: None for judged in judgements.values() for doc_id in judged}
    passages = _sampled(corpus, keep, config.max_passages, config.seed)
    if missing := list(keep.keys() - {passage.doc_id for passage in passages}):
        logger.warning(
            "tune: %d of %d judged passages are not in %s, so no pair can find them: %s",
            len(missing),
            len(keep),
            config.corpus,
            named(sorted(missing)),
        )
    return _Sample(passages, queries, judgements)


def _pseudo_sample(config: TuneConfig, corpus: Artifact) -> _Sample:
    from readapt_ray.retrieval.pseudo_queries import MIN_QUERY_WORDS, MIN_REST_CHARS, PREFIX, with_pseudo_queries

    passages = _sampled(corpus, {}, config.max_passages, config.seed)
    order = np.random.default_rng(config.seed).permutation(len(passages)).tolist()
    passages, queries = with_pseudo_queries(passages, order, config.max_queries)
    if len(queries) < 2:
        raise CorpusError(
            f"{config.corpus!r} gives {len(queries)} pseudo-queries (a title or first sentence of at least "
            f"{MIN_QUERY_WORDS} words and {MIN_REST_CHARS} characters after it); at least 2 are needed: give queries and qrels"
        )
    judgements = {query.query_id: {query.query_id.removeprefix(PREFIX): 1} for query in queries}
    return _Sample(passages, queries, judgements)
