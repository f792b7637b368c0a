"""Plan a run: which stages run, in which order, with which options.

A run is a list of steps. A step is a stage with its config. All configs are made and checked before the first stage
starts. `train_on_passages` joins the stages pack and train for the command `readapt train`.
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
"""The stages of a run, in order. For a corpus without queries, `drift` replaces search and evaluate."""


def stage_parts(stage: str) -> tuple[type[StageConfig], Any]:
    """Return the config class and the function of a stage: (EmbedConfig, embed) for "embed"."""
    module = importlib.import_module(f"readapt_ray.stages.{stage}")
    return getattr(module, STAGES[stage].config), getattr(module, stage)


Section = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class SectionRules:
    """Rules for the sections of stage options in a recipe (run, compare, refresh, paper)."""

    recipe: str
    """Name of the recipe in errors: "the run"."""
    where: str = "section {stage!r}"
    """Name of a stage's section in errors."""
    refused: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Options that the recipe refuses, by stage and name. The text says why, and what to do instead."""


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
"""Stage options that a run refuses, because they would fail or be ignored hours after the start."""

RUN_RULES = SectionRules(recipe="the run", refused=NOT_IN_A_RUN)


def stage_config(stage: str, options: Section, rules: SectionRules, **wired: Any) -> StageConfig:
    """Make the config of a stage from the user's section of options and the options that the recipe sets (`wired`).

    Raises:
        InputError: the section sets an option that the recipe sets, refuses (unless the value is the default), or that
            is unknown or wrong.
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
    """Run a stage by its name and return its artifact. A complete artifact is not made again."""
    _, function = stage_parts(stage)
    artifact: Artifact = function(config)
    return artifact


def make(stage: str, options: Section, rules: SectionRules, **wired: Any) -> Artifact:
    """Run a stage with a section of options, and return its artifact. See `stage_config` for the arguments."""
    return run_stage(stage, stage_config(stage, options, rules, **wired))


def pack_options(train_options: Section) -> Section:
    """Return those options of train that pack takes too, and `overwrite`, as far as they are given."""
    from readapt_ray.cluster.pack_options import PACK_OPTIONS

    return {name: train_options[name] for name in (*PACK_OPTIONS, "overwrite") if name in train_options}


class GeneralCollection(Config):
    """A second corpus with queries and qrels, to measure what the adaptation loses on general queries."""

    source: str
    """The general corpus, in any form that the run's `source` takes."""
    queries: str | None = None
    """File of its queries. If omitted, the queries of the source."""
    qrels: str | None = None
    """File of its judgements. If omitted, the qrels of the source."""
    split: str = "test"
    """Which split of the source's qrels to use."""


class RunConfig(Config):
    """Options of `readapt run`: from a corpus to an adapted retriever, its index and, with judgements, a report.

    Each section holds the options of the stage with its name, as on the command line, but with underscores.
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
    """File of queries to evaluate with. If omitted, the queries of the source, if it has any."""
    qrels: str | None = None
    """File of judgements to evaluate with. If omitted, the qrels of the source, if it has any."""
    split: str = "test"
    """Which split of the source's qrels to evaluate with: test, dev, train."""
    encoding: EncodingOption = None
    """JSON file with the retriever's pooling, prompts and special tokens, for merge and embed. If omitted, the encoding
    in the retriever's folder or in the catalog."""
    ingest: Section = Field(default_factory=dict)
    """Options of ingest. Its `columns` also apply to the files `queries` and `qrels`."""
    train: Section = Field(default_factory=dict)
    """Options of train. `mode`, `block_tokens`, `exclude` and `only` decide which passages are packed, and how."""
    merge: Section = Field(default_factory=dict)
    """Options of merge, such as readapter_scale, knowledge_scale and dtype."""
    embed: Section = Field(default_factory=dict)
    """Options of embed."""
    index: Section = Field(default_factory=dict)
    """Options of index."""
    search: Section = Field(default_factory=dict)
    """Options of search. If omitted, top_k is the depth that the measures need (at least 100), drop_self_hits is as the
    catalog says for the source, and only queries with judgements are searched."""
    evaluate: Section = Field(default_factory=dict)
    """Options of evaluate, such as measures."""
    general: GeneralCollection | None = None
    """A general corpus with queries and qrels: a section with `source` and, if needed, `queries`, `qrels` and `split`. Both
    retrievers are also measured on it, by exact search, and the report shows what the adaptation lost there."""


@dataclass(frozen=True)
class Step:
    """A stage with its config, ready to run."""

    name: str
    """Folder of its output, relative to the root: corpus, vectors/adapted ..."""
    stage: str
    config: StageConfig
    needs_judgements: bool = False
    """Whether the step runs only if the corpus has queries and qrels."""

    @property
    def is_general(self) -> bool:
        """Whether the step works on the general corpus, not on the user's."""
        return self.name.startswith(f"{GENERAL}/")


def by_stage(steps: Iterable[Step]) -> dict[str, Any]:
    """Return the config of the last step of each stage, by stage name.

    Steps on the general corpus (a second corpus, which shows what the adaptation loses) are left out.
    """
    return {step.stage: step.config for step in steps if not step.is_general}


def plan_run(config: RunConfig) -> list[Step]:
    """Return the steps of a run on a corpus with queries, in order. See `unlabelled.steps_for_corpus` for one without.

    Raises:
        InputError: options of sections are unknown or wrong. One message names all of them with their sections.
    """
    problems = Problems()
    steps = plan_steps(config, problems)
    problems.raise_them()
    return steps


def plan_steps(config: RunConfig, problems: Problems) -> list[Step]:
    """Plan like `plan_run`, but add errors to `problems` and leave out the steps with wrong options."""
    steps = _Plan(config, problems).steps()
    for check in (_check_merge, _check_evaluate):
        with problems.collecting():
            check(by_stage(steps))
    return steps


def _check_merge(configs: Mapping[str, Any]) -> None:
    """Refuse a list of knowledge scales: merge alone accepts it, but a run has only one adapter."""
    merge = configs.get("merge")
    if merge and isinstance(merge.knowledge_scale, tuple):
        raise InputError(
            f"section 'merge': knowledge_scale = {list(merge.knowledge_scale)}: the run trains one adapter; give one number"
        )


def _check_evaluate(configs: Mapping[str, Any]) -> None:
    """Refuse `names` that do not fit the run's two retrievers, and requirements that cannot be parsed."""
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
    """Makes the steps of a run, each from the user's section and the options that the run sets."""

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
        """Return all steps in order, without those whose options are wrong."""
        from readapt_ray.evaluation.measure_options import depth_of

        report = self._report()
        if report is not None:
            with self._problems.collecting():
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
        """Yield the steps on the general corpus. Ingest comes first, so that errors in it are known before training."""
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
        with self._problems.collecting():
            config = stage_config(stage, options, RUN_RULES, **wired, output=self._at(name))
        needs_judgements = stage in ("search", "evaluate") and not name.startswith(f"{GENERAL}/")
        return None if config is None else Step(name, stage, config, needs_judgements=needs_judgements)

    def _at(self, name: str) -> str:
        return (Location(self._config.root) / name).uri


def runs_beside_next(steps: Sequence[Step], position: int) -> bool:
    """Return whether a step (merge or index, which need no GPU) can run in parallel with the next step.

    The next step must be embed and must not read this step's output. So the retriever's vectors are made during the merge,
    and the adapted model's vectors while the first index is built.
    """
    step, *later = steps[position : position + 2]
    if step.stage not in ("merge", "index") or not later or later[0].stage != "embed":
        return False
    config = later[0].config
    return step.config.output not in [getattr(config, name) for name in type(config).inputs]


def train_on_passages(config: "TrainConfig") -> Artifact:
    """Train an adapter on passages or on blocks. Passages are packed into blocks first, in the folder OUTPUT-blocks.

    Raises:
        ArtifactMissingError: the corpus is neither an output of ingest nor of pack.
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
