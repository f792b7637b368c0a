"""tune: the best pair of scales, found on withheld queries without writing a model.

One actor holds the ingredients of the merge and writes each pair of scales into its live encoder. A
pair is scored by retrieval over a sample of the corpus that keeps every judged passage. Half of the
queries choose the pair; what is reported comes from the other half, which had no say.

Without judgements the corpus asks its own questions: the first sentence of a passage is the query, the
rest of it the answer. Such figures are called pseudo-queries wherever they stand.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from pydantic import Field, model_validator

from readapt_ray import artifacts
from readapt_ray.artifacts import Artifact, Workspace
from readapt_ray.catalog import models
from readapt_ray.catalog.retrievers import Encoding
from readapt_ray.config import StageConfig
from readapt_ray.errors import CorpusError, InputError
from readapt_ray.records import Passage, Query, ScoredDoc
from readapt_ray.retrieval.templates import EncodingOption
from readapt_ray.stages import cluster
from readapt_ray.storage import Location

if TYPE_CHECKING:
    from readapt_ray.retrieval.measures import Measured

_SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s+")
_MIN_QUERY_WORDS = 4
_MIN_REST_CHARS = 80


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
    measure: str = "nDCG@10"
    """What is compared."""
    max_queries: int = Field(default=1000, ge=2)
    """Queries that are used at most, tuning and reporting together."""
    max_passages: int = Field(default=20_000, ge=1)
    """Passages of the sample at most; judged ones are always kept."""
    seed: int = Field(default=0, ge=0)
    """Of the sample and of the halves."""
    encoding: EncodingOption = None
    """How the retriever wants its text, as a JSON file; default what its folder or the catalog says."""

    inputs: ClassVar[frozenset[str]] = frozenset(
        {"pretrained", "retriever", "adapter", "corpus", "queries", "qrels", "encoding"}
    )

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
    import ray

    resources = cluster.connect()
    sample = _pseudo_sample(config, corpus) if config.queries is None else _judged_sample(config, corpus)
    pairs = [(r, k) for r in config.readapter_scales for k in config.knowledge_scales]
    if (1.0, 0.0) not in pairs:
        pairs.insert(0, (1.0, 0.0))
    grid = workspace.location / "grid"
    pending = [pair for pair in pairs if not _cell(grid, pair).is_file()]
    if pending:
        names = {name: getattr(config, name) for name in ("pretrained", "retriever", "adapter")}
        num_gpus = 1 if resources.num_gpus else 0
        actor = ray.remote(num_cpus=1, num_gpus=num_gpus)(_Scorer).remote(names, encoding, sample, config.measure)
        try:
            for number, pair in enumerate(pending, len(pairs) - len(pending) + 1):
                values = ray.get(actor.score.remote(*pair))
                _cell(grid, pair).write_text(json.dumps(values))
                workspace.progress(number, len(pairs), unit="pairs")
        except ray.exceptions.RayError as error:
            raise cluster.cause_of(error) from None
        finally:
            ray.kill(actor)
    values = {pair: json.loads(_cell(grid, pair).read_text()) for pair in pairs}
    result = _choose(config, values, is_pseudo=config.queries is None)
    (workspace.location / "tune.json").write_text(json.dumps(result, indent=2) + "\n")
    workspace.counts = {
        "num_pairs": len(pairs),
        "num_queries": len(sample.queries),
        "num_passages": len(sample.passages),
    }
    workspace.details = {name: result[name] for name in ("queries", "best", "reported")}


def _cell(grid: Location, pair: tuple[float, float]) -> Location:
    return grid / f"{pair[0]:g}_{pair[1]:g}.json"


class _Scorer:
    """Actor: a live encoder whose scales can be set, and what it has to find."""

    def __init__(self, names: Mapping[str, str], encoding: Encoding, sample: _Sample, measure: str) -> None:
        import torch

        from readapt_ray.retrieval.encoder import Encoder
        from readapt_ray.weights.adapter import Adapter
        from readapt_ray.weights.checkpoint import Checkpoint
        from readapt_ray.weights.live import LiveReadapter
        from readapt_ray.weights.loading import load_model
        from readapt_ray.weights.readapter import Readapter, open_retriever

        pretrained, retriever, adapter = (
            models.find_model(names[name]) for name in ("pretrained", "retriever", "adapter")
        )
        device = "cuda" if torch.cuda.is_available() else "cpu"
        network = load_model(retriever, dtype=torch.float32, device=device)
        before = Checkpoint(pretrained.folder, name=pretrained.name)
        after = open_retriever(retriever.folder, before, name=retriever.name)
        knowledge = [Adapter(adapter.folder, before, name=adapter.name)]
        self._live = LiveReadapter(network, Readapter(before, after, knowledge))
        self._encoder = Encoder(network, models.load_tokenizer(retriever), encoding, identify=str)
        self._sample = sample
        self._measure = measure

    def score(self, readapter_scale: float, knowledge_scale: float) -> dict[str, float]:
        """The measure of every query with these scales."""
        self._live.set_scales(readapter_scale, knowledge_scale)
        sample = self._sample
        vectors = self._encoder.encode([p.text for p in sample.passages], "passage", [p.title for p in sample.passages])
        queries = self._encoder.encode([query.text for query in sample.queries], "query")
        measured = _measured(sample, queries @ vectors.T, self._measure)
        return dict(zip(measured.query_ids, measured.values[self._measure].tolist(), strict=True))


def _measured(sample: _Sample, scores_QP: np.ndarray, measure: str) -> "Measured":
    from readapt_ray.retrieval.measures import measure_run, parse_measures
    from readapt_ray.retrieval.runs import Run

    top_k = min(100, scores_QP.shape[1])
    best = np.argpartition(-scores_QP, top_k - 1, axis=1)[:, :top_k]
    results = {
        query.query_id: [
            ScoredDoc(query.query_id, sample.passages[column].doc_id, float(row[column])) for column in columns
        ]
        for query, row, columns in zip(sample.queries, scores_QP, best.tolist(), strict=True)
    }
    return measure_run(Run.of(results), sample.judgements, parse_measures([measure]))


def _choose(
    config: TuneConfig, values: Mapping[tuple[float, float], Mapping[str, float]], *, is_pseudo: bool
) -> dict[str, Any]:
    """The best pair by one half of the queries, and what it gives on the other half."""
    from readapt_ray.retrieval.significance import compare

    query_ids = sorted(next(iter(values.values())))
    order = np.random.default_rng(config.seed).permutation(len(query_ids))
    halves = {"tuning": order[: len(order) // 2], "reporting": order[len(order) // 2 :]}
    table = {pair: np.array([each[query_id] for query_id in query_ids]) for pair, each in values.items()}
    best = max(table, key=lambda pair: float(table[pair][halves["tuning"]].mean()))
    held_out = {
        name: {config.measure: table[pair][halves["reporting"]]}
        for name, pair in (("retriever", (1.0, 0.0)), ("best", best))
    }
    return {
        "queries": "pseudo-queries made from the corpus" if is_pseudo else "judged queries",
        "measure": config.measure,
        "grid": [
            {
                "readapter_scale": pair[0],
                "knowledge_scale": pair[1],
                **{name: float(row[half].mean()) for name, half in halves.items()},
                "standard_error": float(row[halves["tuning"]].std(ddof=1) / np.sqrt(len(halves["tuning"])))
                if len(row) > 3
                else None,
            }
            for pair, row in table.items()
        ],
        "best": {"readapter_scale": best[0], "knowledge_scale": best[1]},
        "reported": asdict(compare(held_out, seed=config.seed)[0]),
    }


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
    return _Sample(_sampled(corpus, keep, config.max_passages, config.seed), queries, judgements)


def _pseudo_sample(config: TuneConfig, corpus: Artifact) -> _Sample:
    """Queries that the corpus asks itself: a first sentence, to be answered by the rest of its passage."""
    passages = _sampled(corpus, {}, config.max_passages, config.seed)
    order = np.random.default_rng(config.seed).permutation(len(passages))
    queries: list[Query] = []
    for index in order:
        parts = _SENTENCE_END.split(passages[index].text, maxsplit=1)
        if len(parts) < 2 or len(parts[0].split()) < _MIN_QUERY_WORDS or len(parts[1]) < _MIN_REST_CHARS:
            continue
        queries.append(Query(f"pseudo:{passages[index].doc_id}", parts[0]))
        passages[index] = passages[index]._replace(text=parts[1])
        if len(queries) == config.max_queries:
            break
    if len(queries) < 2:
        raise CorpusError(
            f"{config.corpus!r} gives {len(queries)} pseudo-queries (a first sentence of at least {_MIN_QUERY_WORDS} words "
            f"and {_MIN_REST_CHARS} characters after it); at least 2 are needed: give queries and qrels"
        )
    judgements = {query.query_id: {query.query_id.removeprefix("pseudo:"): 1} for query in queries}
    return _Sample(passages, queries, judgements)
