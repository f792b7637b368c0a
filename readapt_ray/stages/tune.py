"""The tune stage: find the best pair of merge scales on withheld queries, without writing a model.

In: the models of a merge, a corpus and queries. Out: `grid/` (the measure of every query with every pair of scales),
`tune.json`, `tune.md` and `tune.html`. Actors hold the models and write each pair of scales into an encoder in memory.
A pair is scored by retrieval over a sample of the corpus that contains every judged passage: first a coarse grid, then
pairs half way between the best one and its neighbours. Half of the queries choose the pair, and the reported measures
come from the other half. A pair costs one pass over the weights and one encoding of the sample.

Without given queries, the corpus's own split dev is used, or else train, but never the split that the report uses. If
there is none, pseudo-queries are made from the passages: the title or the first sentence of a passage is the query, and
the rest of it the answer.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from readapt_ray import artifacts
from readapt_ray.artifacts import Artifact, Workspace
from readapt_ray.catalog import models
from readapt_ray.catalog.encoding import EncodingOption
from readapt_ray.cluster import on_worker
from readapt_ray.cluster.encoding_dtype import encoding_dtype
from readapt_ray.cluster.scale_scoring import MODELS, Sample, ScaleScoring, ScoringJob
from readapt_ray.config import OptionError, StageConfig
from readapt_ray.errors import CorpusError, InputError, ModelError
from readapt_ray.evaluation import scale_search
from readapt_ray.evaluation.measure_options import MeasureOption, drops_self_hits
from readapt_ray.progress import amount
from readapt_ray.records import Passage
from readapt_ray.retrieval.footers import check_complete
from readapt_ray.seeds import random_generator
from readapt_ray.sources.columns import ColumnsOption
from readapt_ray.storage import Location
from readapt_ray.weights.scale_options import LayerScalesOption, layer_scales

logger = logging.getLogger("readapt_ray")

_TUNING_SPLITS = ("dev", "validation", "valid", "train")


class TuneConfig(StageConfig):
    """The options of `readapt tune`."""

    pretrained: str
    """Model before retrieval training: a catalog name, a folder, a GGUF file, a URI or a hub id."""
    retriever: str
    """Model to adapt: a catalog name, a folder, a GGUF file, a URI or a hub id."""
    adapter: str
    """Knowledge adapter: the output of `readapt train`, or a PEFT folder."""
    corpus: str
    """Passages: the output of `readapt ingest`."""
    queries: str | None = None
    """Withheld queries: a file or folder. If omitted, the corpus's split dev, else train, but never the split that is
    reported on (test, or the split of the report beside the corpus); else pseudo-queries made from the passages."""
    qrels: str | None = None
    """Judgements of the queries: a file or folder. A document that ingest split gets the score of its best passage."""
    columns: ColumnsOption = ()
    """Columns of queries and qrels, if they are not called as usual: query_id=key,query=question,doc_id=docno,relevance=grade."""
    readapter_scales: tuple[float, ...] = (1.0,)
    """Weights of the retriever's change to try, separated by commas."""
    knowledge_scales: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Weights of the adapter's change to try, separated by commas."""
    layer_scales: LayerScalesOption = ()
    """Factors of the knowledge scales in ranges of layers, such as 0-11=0.8,12-23=0.2; give `merge` the same."""
    num_refinements: int = Field(default=1, ge=0, le=6)
    """How many times to try the points half way between the best pair of scales and its neighbours."""
    measure: MeasureOption = "nDCG@10"
    """Measure that decides which pair of scales is best."""
    drop_self_hits: bool | None = None
    """Leave out a result whose doc_id equals the query_id. If omitted, as the catalog says for the corpus's
    source."""
    max_queries: int = Field(default=1000, ge=2)
    """Maximum number of queries, half for choosing the scales and half for reporting."""
    max_passages: int = Field(default=20_000, ge=1)
    """Maximum number of passages in the sample that is searched; judged ones are always in it."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Data type that the model computes in; auto is bfloat16 on GPUs and on CPUs with AMX or
    AVX512_BF16, else float32."""
    num_workers: int | None = Field(default=None, ge=1)
    """Number of actors, each with one model, that share the work. If omitted, one per GPU, or one without GPUs."""
    seed: int = Field(default=0, ge=0)
    """Random seed for the sample of passages and for the split of the queries."""
    encoding: EncodingOption = None
    """JSON file with pooling, prompts and special tokens. If omitted, what the retriever's folder or the catalog
    says."""
    accept: tuple[Literal["config", "tokenizer", "vocabulary", "base"], ...] = ()
    """Mismatches to allow, separated by commas: config, tokenizer, vocabulary (only one of retriever and pretrained has
    some tokens), base (an adapter's base model)."""

    inputs: ClassVar[frozenset[str]] = frozenset(
        {"pretrained", "retriever", "adapter", "corpus", "queries", "qrels", "encoding"}
    )
    safety: ClassVar[frozenset[str]] = StageConfig.safety | {"accept"}
    operational: ClassVar[frozenset[str]] = frozenset({"num_workers", "accept"})

    @model_validator(mode="after")
    def _both_or_none(self) -> Self:
        if (self.queries is None) != (self.qrels is None):
            raise OptionError("give both {queries} and {qrels}, or none of them")
        if not self.readapter_scales or not self.knowledge_scales:
            raise OptionError("give at least one number in {readapter_scales} and in {knowledge_scales}")
        return self


def tune(config: TuneConfig) -> Artifact:
    """Find the pair of merge scales with the best retrieval on withheld queries, and write a report.

    The best pair is in the manifest's `best`, for the options of merge; no model is written. Half of the queries choose
    it, and `reported` comes from the other half. Does nothing if the output is complete and of the same options and
    inputs.

    Raises:
        ArtifactMissingError: the corpus is not the output of `readapt ingest`.
        InputError: a layer or the queries cannot be used; at least two queries need a relevant passage.
        CorpusError: no queries are given, and the corpus gives fewer than two pseudo-queries.
        ModelError: a model cannot be found or read, or `adapter` is not an adapter.
        WeightMismatchError: the models do not fit each other, as in merge.
        CorruptFileError: a file of the corpus is missing.
        PlacementError: the cluster does not have the CPUs or GPUs that the actors need.
        WorkerError: actors died repeatedly.
        ArtifactConflictError: the output holds something else, or a result of other options and `overwrite` is not set.
    """
    corpus = artifacts.open_artifact(config.corpus, "ingest")
    if config.drop_self_hits is None:
        config = config.model_copy(update={"drop_self_hits": drops_self_hits(corpus.manifest.config.get("source"))})
    split = None if config.queries is not None else _own_split(config, corpus)
    if split is not None:
        own = {"queries": (corpus.location / "queries").uri, "qrels": (corpus.location / f"qrels/{split}.parquet").uri}
        config = config.model_copy(update=own)
    found = {name: models.open_model(getattr(config, name)) for name in MODELS}
    layers = layer_scales(config.layer_scales)
    _check_models(config, found)
    config = config.model_copy(update={"dtype": encoding_dtype(config, config.dtype)})
    encoding = config.encoding or found["retriever"].encoding
    inputs = {"corpus": corpus.fingerprint, **{name: model.fingerprint for name, model in found.items()}}
    for name in ("queries", "qrels"):
        uri = getattr(config, name)
        if uri is not None:
            if not Location(uri).exists():
                raise InputError(f"{name} = {uri!r} does not exist; give a file, or a folder of them")
            inputs[name] = artifacts.fingerprint(Location(uri).content_fingerprint())
    job = ScoringJob(
        models={name: on_worker.model_name(model) for name, model in found.items()},
        fingerprints=inputs,
        encoding=encoding,
        measure=config.measure,
        drop_self_hits=bool(config.drop_self_hits),
        dtype=config.dtype,
        accept_vocabulary="vocabulary" in config.accept,
        layers=layers,
    )
    return artifacts.produce(
        "tune",
        config,
        inputs=inputs,
        identity={"encoding": encoding.model_dump(mode="json")},
        work=lambda workspace: _tune(config, corpus, job, workspace, split=split),
    )


def _check_models(config: TuneConfig, found: Mapping[str, models.OpenModel]) -> None:
    """Check what merge would refuse, since scales of models that do not belong together say nothing."""
    from readapt_ray.weights.merge_plan import check_pair

    pretrained, retriever, adapter = (found[name] for name in MODELS)
    if not adapter.is_adapter:
        raise ModelError(f"adapter = {config.adapter!r} is not an adapter; give the output of `readapt train`")
    check_pair(pretrained, retriever, accept=config.accept, layer_scales=config.layer_scales, adapters=[adapter])


def _own_split(config: TuneConfig, corpus: Artifact) -> str | None:
    """Return the split of the corpus whose queries choose the scales; None if no split may. Log the reason."""
    there = {file.name.removesuffix(".parquet") for file in (corpus.location / "qrels").files(".parquet")}
    reported = _reported_splits(config.corpus)
    found = next((name for name in _TUNING_SPLITS if name in there - reported), None)
    if found is not None:
        logger.info("tune: the corpus's own queries of the split %s choose the scales", found)
    elif there:
        logger.info(
            "tune: pseudo-queries choose the scales: the corpus has judgements of %s, and what is reported on (%s) must not "
            "choose; give others with --queries and --qrels",
            *(", ".join(sorted(there)), ", ".join(sorted(reported))),
        )
    else:
        logger.info("tune: pseudo-queries choose the scales, since the corpus has no judgements of its own")
    return found


def _reported_splits(corpus: str) -> set[str]:
    """Return the splits that must not choose: test, and the split used by a run's report beside the corpus."""
    path, mark, options = Location(corpus).uri.partition("?")
    report = artifacts.read_manifest(f"{path.rstrip('/').rpartition('/')[0] or '.'}/report{mark}{options}")
    qrels = str(report.config.get("qrels", "")) if report is not None else ""
    found = PurePosixPath(qrels.partition("?")[0])
    return {"test", found.stem} if found.parent.name == "qrels" else {"test"}


def _tune(config: TuneConfig, corpus: Artifact, job: ScoringJob, workspace: Workspace, *, split: str | None) -> None:
    sample = _pseudo_sample(config, corpus) if config.queries is None else _judged_sample(config, corpus)
    search = ScaleScoring(config.num_workers, job, sample, workspace)
    try:
        search.score(scale_search.coarse_pairs(config.readapter_scales, config.knowledge_scales))
        for _ in range(config.num_refinements):
            search.score(scale_search.finer_pairs(search.values, scale_search.best_pair(search.values, config.seed)))
    finally:
        search.stop()
    kind = "judged queries" if config.queries else "pseudo-queries made from the corpus"
    kind += f" of the corpus's split {split}" if split else ""
    result = scale_search.describe_search(search.values, measure=config.measure, seed=config.seed, queries=kind)
    if job.layers:
        result["layer_scales"] = list(map(str, job.layers))
    _write_report(workspace, result)
    workspace.counts = {
        "num_pairs": len(search.values),
        "num_queries": len(sample.queries),
        "num_passages": len(sample.passages),
    }
    names = ("queries", "best", "reported", "layer_scales")
    workspace.details = {name: result[name] for name in names if name in result}
    workspace.details["seconds"] = {name: round(spent, 2) for name, spent in search.seconds.items()}


def _write_report(workspace: Workspace, result: Mapping[str, Any]) -> None:
    from readapt_ray.evaluation import scale_report

    folder = workspace.location
    (folder / "tune.json").write_text(json.dumps(result, indent=2) + "\n")
    (folder / "tune.md").write_text(scale_report.to_markdown(result))
    (folder / "tune.html").write_text(scale_report.to_html(result))
    logger.info("tune: %s", scale_report.verdict(result))


def _passages(corpus: Artifact) -> Iterator[Passage]:
    """Yield the passages of a corpus; passages of a split document get the document's id, since that is judged."""
    import pyarrow.parquet as pq

    num_rows = 0
    for file in (corpus.location / "passages").files(".parquet"):
        with file.open_input() as stream:
            for batch in pq.ParquetFile(stream).iter_batches():
                num_rows += batch.num_rows
                for row in batch.to_pylist():
                    yield Passage(row.get("parent_id") or row["doc_id"], row["title"] or "", row["text"])
    check_complete(corpus, num_rows, "passages")


def _sampled(corpus: Artifact, keep: Mapping[str, Any], size: int, seed: int) -> list[Passage]:
    """Return the passages in `keep`, and a random sample of the others up to `size`, read in one pass."""
    random = random_generator(seed, "passages")
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


def _judged_sample(config: TuneConfig, corpus: Artifact) -> Sample:
    from readapt_ray.evaluation.measures import group_judgements, of_documents
    from readapt_ray.evaluation.tables import named
    from readapt_ray.retrieval.passage_files import PassageFiles
    from readapt_ray.sources.judgements import read_qrels, read_queries

    judgements = group_judgements(read_qrels(str(config.qrels), config.columns))
    queries = [
        query
        for query in read_queries(str(config.queries), config.columns)
        if max(judgements.get(query.query_id, {}).values(), default=0) > 0
    ]
    if len(queries) < 2:
        raise InputError(
            f"{config.queries!r} has {amount(len(queries), 'queries')} with a relevant passage in {config.qrels!r}; at "
            "least 2 are needed"
        )
    order = random_generator(config.seed, "queries").permutation(len(queries))[: config.max_queries]
    queries = [queries[index] for index in sorted(order)]
    judgements = {query.query_id: judgements[query.query_id] for query in queries}
    documents = PassageFiles.open(corpus.uri).documents_of(doc_id for each in judgements.values() for doc_id in each)
    judgements = of_documents(judgements, documents)
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
    return Sample(passages, queries, judgements)


def _pseudo_sample(config: TuneConfig, corpus: Artifact) -> Sample:
    from readapt_ray.evaluation.pseudo_queries import MIN_QUERY_WORDS, MIN_REST_CHARS, PREFIX, with_pseudo_queries

    passages = _sampled(corpus, {}, config.max_passages, config.seed)
    order = random_generator(config.seed, "pseudo-queries").permutation(len(passages)).tolist()
    passages, queries = with_pseudo_queries(passages, order, config.max_queries)
    if len(queries) < 2:
        raise CorpusError(
            f"{config.corpus!r} gives {len(queries)} pseudo-queries (a title or first sentence of at least "
            f"{MIN_QUERY_WORDS} words and {MIN_REST_CHARS} characters after it); at least 2 are needed: give queries and qrels"
        )
    judgements = {query.query_id: {query.query_id.removeprefix(PREFIX): 1} for query in queries}
    return Sample(passages, queries, judgements)
