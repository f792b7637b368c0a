"""Whole experiments: which stages run, in which order, on what.

A run is a list of steps, each a stage with its config, all made and checked before the first one
starts. `train_on_passages` is the one pair of stages that the command line joins.
"""

import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import Field

from readapt_ray import artifacts
from readapt_ray.artifacts import Artifact
from readapt_ray.catalog.encoding import EncodingOption
from readapt_ray.config import Config, StageConfig
from readapt_ray.errors import InputError
from readapt_ray.recipes.problems import Problems
from readapt_ray.stages import STAGES
from readapt_ray.storage import Location

if TYPE_CHECKING:
    from readapt_ray.stages.train import TrainConfig

RUN_NAME = "run.json"
BASE, ADAPTED, DRIFT, GENERAL = "retriever", "adapted", "drift", "general"
RUN_STAGES = ("ingest", "pack", "train", "merge", "embed", "index", "search", "evaluate", "drift")
"""The stages of a run, in order. `drift` is for a corpus without queries, instead of the two before it."""


def stage_parts(stage: str) -> tuple[type[StageConfig], Any]:
    """Return a stage's config class and function."""
    module = importlib.import_module(f"readapt_ray.stages.{stage}")
    return getattr(module, STAGES[stage].config), getattr(module, stage)


Section = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class SectionRules:
    """What the option sections of a recipe may hold."""

    recipe: str
    """What errors call the recipe: "the run"."""
    where: str = "section {stage!r}"
    """What errors call the section of a stage."""
    refused: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Options that the recipe cannot honour, by stage and name, each with the reason and what to do instead."""


NOT_IN_A_RUN: dict[str, dict[str, str]] = {
    "ingest": {"previous": "a run makes one corpus; `readapt refresh` shares files with the corpus before"},
    "merge": {
        "bundle": "the run trains its own adapter; merge a bundle with `readapt merge --bundle`",
        "factors": "the run embeds with a whole model; write factors with `readapt merge --factors` after the run",
        "push": "a run measures after it merges; send the model with `readapt merge --push` once the report holds",
        "queries_only": "the run embeds passages with the adapted model; use `readapt merge --queries-only` after the run",
    },
    "embed": {
        "sample": "the run needs vectors of all passages; estimate time and size with `readapt embed --sample` first",
        "previous": "the run embeds with two models and older vectors fit only one; use `readapt embed --previous`",
        **dict.fromkeys(("domain", "base"), "the run embeds with whole models; use `readapt embed --domain`"),
    },
    "index": {
        "previous": "the run builds two indexes and an older one fits only one; use `readapt index --previous`",
    },
    "search": {
        "vectors": "the run searches its own indexes; search vectors with `readapt search --vectors`",
        "root": "the run searches its own indexes; search the indexes of a refresh with `readapt search --root`",
        "as_of": "the run searches its own indexes; search the indexes of a refresh with `readapt search --root`",
        "bridge": "the run embeds with both models; search older vectors with `readapt search --bridge`",
        **dict.fromkeys(("domain", "base"), "the run searches with whole models; use `readapt search --domain`"),
        "encoding": "queries are encoded as the vectors were; set encoding in section 'embed' instead",
    },
}
"""Options of stages that a run refuses: they would fail, or be ignored, hours after the start."""

RUN_RULES = SectionRules(recipe="the run", refused=NOT_IN_A_RUN)


def stage_config(stage: str, options: Section, rules: SectionRules, **wired: Any) -> StageConfig:
    """Make the config of a stage from a user's section of options and the options that a recipe sets itself.

    Raises:
        InputError: the section sets what the recipe sets, or an option that the recipe refuses, is unknown or wrong.
    """
    where = rules.where.format(stage=stage)
    twice = sorted(options.keys() & wired.keys())
    if twice:
        raise InputError(
            f"{where} sets {', '.join(twice)}, which {rules.recipe} itself sets; remove it from the section"
        )
    config_class, _ = stage_parts(stage)
    for name, reason in rules.refused.get(stage, {}).items():
        if name in options and options[name] != config_class.model_fields[name].default:
            raise InputError(f"{where}: {name} = {options[name]!r} is refused: {reason}")
    return config_class.parse({**options, **wired}, where=where)


def run_stage(stage: str, config: StageConfig) -> Artifact:
    """Run a stage: the artifact is made unless it is there."""
    _, function = stage_parts(stage)
    artifact: Artifact = function(config)
    return artifact


def make(stage: str, options: Section, rules: SectionRules, **wired: Any) -> Artifact:
    """Make the artifact of a stage from a section of options; see `stage_config`."""
    return run_stage(stage, stage_config(stage, options, rules, **wired))


def pack_options(train_options: Section) -> Section:
    """Return the options of train that pack takes as well."""
    from readapt_ray.cluster.pack_options import PACK_OPTIONS

    return {name: train_options[name] for name in (*PACK_OPTIONS, "overwrite") if name in train_options}


class GeneralCollection(Config):
    """A second collection with queries and qrels, to measure what adapting to one's own costs elsewhere."""

    source: str
    """The general corpus, as `source`."""
    queries: str | None = None
    """File of its queries. If omitted, the source's own."""
    qrels: str | None = None
    """File of its judgements. If omitted, the source's own."""
    split: str = "test"
    """Which of the source's own qrels to take."""


class RunConfig(Config):
    """The main job: from a corpus to an adapted retriever, its index and, with judgements, a report.

    Each section holds options of the stage of its name, as on the command line, with underscores.
    """

    root: str = "readapt-run"
    """Folder or URI to write all artifacts to."""
    source: str
    """The corpus: a folder, a file, a URI, `ir_datasets:NAME`, `hub:OWNER/NAME` or `python-docs:PACKAGE,...`."""
    pretrained: str
    """Model before retrieval training: a catalog name, a folder, a GGUF file, a URI or a hub id."""
    retriever: str
    """Model to adapt: the same model after retrieval training, or a LoRA adapter for it."""
    queries: str | None = None
    """File of queries to evaluate with. If omitted, the source's own, if it has any."""
    qrels: str | None = None
    """File of judgements to evaluate with. If omitted, the source's own, if it has any."""
    split: str = "test"
    """Which of the source's own qrels to evaluate with: test, dev, train."""
    encoding: EncodingOption = None
    """JSON file with the retriever's pooling, prompts and special tokens, for merge and embed. If omitted, what its
    folder or the catalog says."""
    ingest: Section = Field(default_factory=dict)
    """Options of ingest. Its `columns` are those of the files `queries` and `qrels`, too."""
    train: Section = Field(default_factory=dict)
    """Options of train; `mode`, `block_tokens`, `exclude` and `only` decide which passages are packed, and how."""
    merge: Section = Field(default_factory=dict)
    """Options of merge, such as readapter_scale, knowledge_scale and dtype."""
    embed: Section = Field(default_factory=dict)
    """Options of embed."""
    index: Section = Field(default_factory=dict)
    """Options of index."""
    search: Section = Field(default_factory=dict)
    """Options of search. If omitted, top_k is what the measures need and at least 100, drop_self_hits is what the
    catalog says of the source, and only the queries that are judged are searched."""
    evaluate: Section = Field(default_factory=dict)
    """Options of evaluate, such as measures."""
    general: GeneralCollection | None = None
    """A general collection with queries and qrels (section of `source`, and where they are not its own `queries`, `qrels`,
    `split`): both retrievers are measured on it too, exactly and by vectors, and the report shows what adapting lost there."""


@dataclass(frozen=True)
class Step:
    """A stage with its options, ready to run. `needs_judgements`: only where queries and qrels are there."""

    name: str
    """Of its output under the root: corpus, vectors/adapted ..."""
    stage: str
    config: StageConfig
    needs_judgements: bool = False

    @property
    def is_general(self) -> bool:
        """Whether the step belongs to the general collection."""
        return self.name.startswith(f"{GENERAL}/")


def by_stage(steps: Iterable[Step]) -> dict[str, Any]:
    """Return the configs of the steps of one's own corpus, the last of each stage."""
    return {step.stage: step.config for step in steps if not step.is_general}


def plan_run(config: RunConfig) -> list[Step]:
    """Return the steps of a run in order.

    Raises:
        InputError: options of sections are unknown or wrong; one message that names all, with their sections.
    """
    problems = Problems()
    steps = plan_steps(config, problems)
    problems.raise_them()
    return steps


def plan_steps(config: RunConfig, problems: Problems) -> list[Step]:
    """Plan as `plan_run`, but note what is wrong and leave out the steps that it concerns."""
    steps = _Plan(config, problems).steps()
    for check in (_check_merge, _check_evaluate):
        with problems.noted():
            check(by_stage(steps))
    return steps


def _check_merge(configs: Mapping[str, Any]) -> None:
    """Refuse what merge takes by itself, but what does not fit one adapter."""
    merge = configs.get("merge")
    if merge and isinstance(merge.knowledge_scale, tuple):
        raise InputError(
            f"section 'merge': knowledge_scale = {list(merge.knowledge_scale)}: the run trains one adapter; give one number"
        )


def _check_evaluate(configs: Mapping[str, Any]) -> None:
    """Refuse what evaluate takes by itself, but what does not fit two retrievers, and requirements that are none."""
    from readapt_ray.evaluation.requirements import parse_requirement

    evaluate = configs.get("evaluate")
    if evaluate is None:
        return
    for each in evaluate.require:
        parse_requirement(each, evaluate.measures, evaluate.measures if evaluate.general else ())
    if evaluate.names and (len(evaluate.names) != len(evaluate.runs) or len(set(evaluate.names)) < len(evaluate.names)):
        raise InputError(
            f"section 'evaluate': names = {list(evaluate.names)}: the run compares {len(evaluate.runs)} retrievers; give "
            f"two different names, or none"
        )


class _Plan:
    """The steps of a run, each made from the user's section and what the run itself sets."""

    def __init__(self, config: RunConfig, problems: Problems) -> None:
        self._config = config
        self._problems = problems
        self._encoding = {} if config.encoding is None else {"encoding": config.encoding}
        self._retrievers = {BASE: config.retriever, ADAPTED: self._at(ADAPTED)}
        self._depth: Section = {}
        is_given = (config.queries or config.qrels) and "columns" in config.ingest
        self._columns: Section = {"columns": config.ingest["columns"]} if is_given else {}
        self._queries = config.queries or self._at("corpus/queries")
        self._qrels = config.qrels or self._at(f"corpus/qrels/{config.split}.parquet")

    def steps(self) -> list[Step]:
        """Return all steps in order; without those whose options are wrong."""
        from readapt_ray.evaluation.measure_options import depth_of

        report = self._report()
        if report is not None:
            with self._problems.noted():
                self._depth = {"top_k": depth_of(report.config.settings()["measures"])}
        corpus, *adapt = self._adapt()
        general, *measured = self._on_general()
        steps = [corpus, general, *adapt, *self._embed(), *self._search(), *measured, report]
        return [step for step in steps if step is not None]

    def _adapt(self) -> Iterator[Step | None]:
        config = self._config
        models = {"pretrained": config.pretrained, "retriever": config.retriever, "adapter": self._at("adapter")}
        blocks = {"pretrained": config.pretrained, "corpus": self._at("blocks")}
        passages = {"pretrained": config.pretrained, "corpus": self._at("corpus")}
        yield self._step("corpus", "ingest", config.ingest, source=config.source)
        yield self._step("blocks", "pack", pack_options(config.train), **passages)
        yield self._step("adapter", "train", config.train, **blocks)
        yield self._step(ADAPTED, "merge", {**self._encoding, **config.merge}, **models)

    def _embed(self) -> Iterator[Step | None]:
        for name, model in self._retrievers.items():
            options = {**self._encoding, **self._config.embed}
            yield self._step(f"vectors/{name}", "embed", options, retriever=model, corpus=self._at("corpus"))
            yield self._step(f"index/{name}", "index", self._config.index, vectors=self._at(f"vectors/{name}"))

    def _search(self) -> Iterator[Step | None]:
        from readapt_ray.evaluation.measure_options import drops_self_hits

        defaults = {
            **self._depth,
            "drop_self_hits": drops_self_hits(self._config.source),
            "qrels": self._qrels,
            **self._columns,
        }
        for name, model in self._retrievers.items():
            yield self._step(
                f"runs/{name}.trec",
                "search",
                {**defaults, **self._config.search},
                retriever=model,
                index=self._at(f"index/{name}"),
                queries=self._queries,
            )

    def _on_general(self) -> Iterator[Step | None]:
        """Yield the same on the general collection: its corpus first, so that what is wrong with it is known before
        training.
        """
        from readapt_ray.evaluation.measure_options import drops_self_hits

        general = self._config.general
        if general is None:
            yield None
            return
        corpus = self._at(f"{GENERAL}/corpus")
        queries = general.queries or self._at(f"{GENERAL}/corpus/queries")
        qrels = general.qrels or self._at(f"{GENERAL}/corpus/qrels/{general.split}.parquet")
        yield self._step(f"{GENERAL}/corpus", "ingest", {}, source=general.source)
        for name, model in self._retrievers.items():
            options = {**self._encoding, **self._config.embed}
            yield self._step(f"{GENERAL}/vectors/{name}", "embed", options, retriever=model, corpus=corpus)
        wired = {"queries": queries, "qrels": qrels, "drop_self_hits": drops_self_hits(general.source)}
        for name, model in self._retrievers.items():
            vectors = self._at(f"{GENERAL}/vectors/{name}")
            run = f"{GENERAL}/runs/{name}.trec"
            yield self._step(run, "search", self._depth, retriever=model, vectors=vectors, **wired)
        options = {
            name: value
            for name, value in self._config.evaluate.items()
            if name not in ("require", "columns", "general")
        }
        runs = [self._at(f"{GENERAL}/runs/{name}.trec") for name in self._retrievers]
        wired = {"runs": runs, "qrels": qrels, "queries": queries, "corpus": corpus}
        yield self._step(f"{GENERAL}/report", "evaluate", options, **wired)

    def _report(self) -> Step | None:
        return self._step(
            "report",
            "evaluate",
            {**self._columns, **self._config.evaluate},
            runs=[self._at(f"runs/{name}.trec") for name in self._retrievers],
            qrels=self._qrels,
            queries=self._queries,
            corpus=self._at("corpus"),
            general=self._at(f"{GENERAL}/report") if self._config.general else "",
        )

    def _step(self, name: str, stage: str, options: Section, **wired: Any) -> Step | None:
        config = None
        with self._problems.noted():
            config = stage_config(stage, options, RUN_RULES, **wired, output=self._at(name))
        needs_judgements = stage in ("search", "evaluate") and not name.startswith(f"{GENERAL}/")
        return None if config is None else Step(name, stage, config, needs_judgements=needs_judgements)

    def _at(self, name: str) -> str:
        return (Location(self._config.root) / name).uri


def runs_beside_next(steps: Sequence[Step], position: int) -> bool:
    """Return whether a step that needs no GPU goes before one that embeds and does not read it, so both can run at
    once.

    So the retriever's vectors are made while the adapted model is merged, and the adapted ones while the first index is built.
    """
    step, *later = steps[position : position + 2]
    if step.stage not in ("merge", "index") or not later or later[0].stage != "embed":
        return False
    config = later[0].config
    return step.config.output not in [getattr(config, name) for name in type(config).inputs]


def train_on_passages(config: "TrainConfig") -> Artifact:
    """Train on passages or on blocks: passages are first packed, into the folder OUTPUT-blocks.

    Raises:
        ArtifactMissingError: the corpus is neither the output of ingest nor of pack.
    """
    from readapt_ray.stages.pack import PackConfig, pack
    from readapt_ray.stages.train import check_pretrained, train

    manifest = artifacts.read_manifest(config.corpus)
    if manifest is not None and manifest.stage == "pack":
        return train(config)
    check_pretrained(config)
    given = {name: getattr(config, name) for name in config.model_fields_set}
    packed = pack(
        PackConfig(
            **pack_options(given),
            pretrained=config.pretrained,
            corpus=config.corpus,
            output=Location(config.output).beside("-blocks").uri,
        )
    )
    return train(config.model_copy(update={"corpus": packed.uri}))
