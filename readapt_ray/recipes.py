"""Whole experiments: which stages run, in which order, on what.

A run is a list of steps, each a stage with its config, all made and checked before the first one
starts. `train_on_passages` is the one pair of stages that the command line joins.
"""

import importlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field

from readapt_ray import artifacts
from readapt_ray.artifacts import Artifact
from readapt_ray.catalog import models
from readapt_ray.config import Config, StageConfig
from readapt_ray.errors import CorpusError, InputError
from readapt_ray.storage import Location

if TYPE_CHECKING:
    from readapt_ray.stages.train import TrainConfig

logger = logging.getLogger("readapt_ray")

STAGES: dict[str, str] = {
    "ingest": "read a corpus from a source: clean it, drop duplicates, keep the ids",
    "pack": "turn passages into token blocks (train does it where it is needed)",
    "train": "train a knowledge adapter on unlabelled passages",
    "finetune": "train a retriever on labelled pairs",
    "merge": "lay the retriever and the knowledge adapter on the pretrained model",
    "embed": "turn passages into vectors",
    "index": "build a FAISS index from vectors",
    "search": "retrieve the best passages of queries into a TREC run",
    "evaluate": "measure runs against judgements, test the difference, write a report",
    "tune": "find the best pair of scales on withheld queries",
}
"""Every stage and what it does; its module, config and function go by its name."""

RUN_NAME = "run.json"
BASE, ADAPTED = "retriever", "adapted"


def stage_parts(stage: str) -> tuple[type[StageConfig], Any]:
    """A stage's config class and function."""
    module = importlib.import_module(f"readapt_ray.stages.{stage}")
    return getattr(module, f"{stage.capitalize()}Config"), getattr(module, stage)


Section = dict[str, Any]


class RunConfig(Config):
    """The main job: from a corpus to an adapted retriever, its index and, with judgements, a report.

    Each section holds options of the stage of its name, as on the command line, with underscores.
    """

    root: str = "readapt-run"
    """Folder or URI under which every artifact lies."""
    source: str
    """The corpus: a folder, a file, a URI, `ir_datasets:NAME`, `hub:OWNER/NAME` or `python-docs:PACKAGE,...`."""
    pretrained: str
    """MODEL before retrieval training: catalog name, folder, URI or hub id."""
    retriever: str
    """MODEL to adapt: the same model after retrieval training, or a LoRA adapter on it."""
    queries: str | None = None
    """Queries to evaluate with: a file; default the source's own, where it has any."""
    qrels: str | None = None
    """Judgements to evaluate with: a file; default the source's own, where it has any."""
    split: str = "test"
    """Which of the source's own qrels: test, dev, train."""
    ingest: Section = Field(default_factory=dict)
    """Options of ingest."""
    train: Section = Field(default_factory=dict)
    """Options of train; `mode`, `block_tokens`, `exclude` and `only` say which passages are packed, and how."""
    merge: Section = Field(default_factory=dict)
    """Options of merge: readapter_scale, knowledge_scale, dtype."""
    embed: Section = Field(default_factory=dict)
    """Options of embed."""
    index: Section = Field(default_factory=dict)
    """Options of index."""
    search: Section = Field(default_factory=dict)
    """Options of search: top_k, default what the measures look at and at least 100; drop_self_hits, default what the catalog
    says of the source."""
    evaluate: Section = Field(default_factory=dict)
    """Options of evaluate: measures."""


@dataclass(frozen=True)
class Step:
    """A stage with its options, ready to run. `needs_judgements`: only where queries and qrels are there."""

    name: str
    """Of its output under the root: corpus, vectors/adapted ..."""
    stage: str
    config: StageConfig
    needs_judgements: bool = False


def plan_run(config: RunConfig) -> list[Step]:
    """The steps of a run in order.

    Raises:
        InputError: an option of a section is unknown or wrong; the section is named.
    """
    return list(_steps(config))


def _steps(config: RunConfig) -> Iterator[Step]:
    from readapt_ray.stages.measure_options import depth_of, drops_self_hits
    from readapt_ray.stages.train import PACK_OPTIONS

    def at(name: str) -> str:
        return (Location(config.root) / name).uri

    queries = config.queries or at("corpus/queries")
    qrels = config.qrels or at(f"corpus/qrels/{config.split}.parquet")

    def step(name: str, stage: str, options: dict[str, Any], *, needs_judgements: bool = False, **wired: Any) -> Step:
        wired["output"] = at(name)
        twice = sorted(options.keys() & wired.keys())
        if twice:
            raise InputError(
                f"section {stage!r} sets {', '.join(twice)}, which the run itself sets; remove it from the section"
            )
        config_class, _ = stage_parts(stage)
        parsed = config_class.parse({**options, **wired}, where=f"section {stage!r}")
        return Step(name, stage, parsed, needs_judgements)

    yield step("corpus", "ingest", config.ingest, source=config.source)
    packing: Section = {name: config.train[name] for name in (*PACK_OPTIONS, "overwrite") if name in config.train}
    yield step("blocks", "pack", packing, pretrained=config.pretrained, corpus=at("corpus"))
    yield step("adapter", "train", config.train, pretrained=config.pretrained, corpus=at("blocks"))
    yield step(
        ADAPTED,
        "merge",
        config.merge,
        pretrained=config.pretrained,
        retriever=config.retriever,
        adapter=at("adapter"),
    )
    arms = {BASE: config.retriever, ADAPTED: at(ADAPTED)}
    report = step(
        "report",
        "evaluate",
        config.evaluate,
        needs_judgements=True,
        runs=[at(f"runs/{arm}.trec") for arm in arms],
        qrels=qrels,
        queries=queries,
        corpus=at("corpus"),
    )
    searching = {
        "top_k": depth_of(report.config.settings()["measures"]),
        "drop_self_hits": drops_self_hits(config.source),
    }
    for arm, model in arms.items():
        yield step(f"vectors/{arm}", "embed", config.embed, retriever=model, corpus=at("corpus"))
        yield step(f"index/{arm}", "index", config.index, vectors=at(f"vectors/{arm}"))
    for arm, model in arms.items():
        yield step(
            f"runs/{arm}.trec",
            "search",
            {**searching, **config.search},
            needs_judgements=True,
            retriever=model,
            index=at(f"index/{arm}"),
            queries=queries,
        )
    yield report


def run(config: RunConfig) -> dict[str, Artifact]:
    """Run the main job; what is complete already is not done again.

    Returns:
        The artifacts by their folder under the root (`corpus`, `adapter`, `adapted`, `report` ...).

    Raises:
        InputError: a model cannot be found or an option is wrong; found before any stage starts.
    """
    steps = plan_run(config)
    retriever = models.find_model(config.retriever)
    if config.embed.get("encoding") is None:
        models.encoding_of(retriever)
    models.find_model(config.pretrained)
    root = Location(config.root)
    outputs = [{"stage": step.stage, "output": step.name} for step in steps]
    made: dict[str, Artifact] = {}
    judged = True
    for number, step in enumerate(steps, 1):
        if step.needs_judgements and not judged:
            continue
        logger.info("[%d/%d] %s -> %s", number, len(steps), step.stage, step.config.output)
        _, stage = stage_parts(step.stage)
        made[step.name] = stage(step.config)
        if step.stage == "ingest":
            (root / RUN_NAME).write_text(
                json.dumps({"config": config.model_dump(mode="json"), "steps": outputs}, indent=2) + "\n"
            )
            judged = _has_judgements(config, steps)
    return made


def _has_judgements(config: RunConfig, steps: list[Step]) -> bool:
    """Whether there is what search and evaluate need; says so where there is not.

    Raises:
        CorpusError: only one of queries and qrels is there.
    """
    evaluation: Any = steps[-1].config
    there = {name: Location(getattr(evaluation, name)).exists() for name in ("queries", "qrels")}
    if all(there.values()):
        return True
    if any(there.values()) or config.queries or config.qrels:
        absent = next(name for name, present in there.items() if not present)
        raise CorpusError(
            f"no {absent} at {getattr(evaluation, absent)!r}; evaluation needs queries and qrels: give both, or a split that the source has"
        )
    logger.info("the corpus has no queries and qrels: nothing to evaluate with, so search and evaluate are left out")
    return False


def train_on_passages(config: "TrainConfig") -> Artifact:
    """Train on passages or on blocks: passages are first packed, into the folder OUTPUT-blocks.

    Raises:
        ArtifactMissingError: the corpus is neither the output of ingest nor of pack.
    """
    from readapt_ray.stages.pack import PackConfig, pack
    from readapt_ray.stages.train import PACK_OPTIONS, train

    manifest = artifacts.read_manifest(config.corpus)
    if manifest is not None and manifest.stage == "pack":
        return train(config)
    packed = pack(
        PackConfig(
            pretrained=config.pretrained,
            corpus=config.corpus,
            **{name: getattr(config, name) for name in PACK_OPTIONS if name in config.model_fields_set},
            output=Location(config.output).beside("-blocks").uri,
            overwrite=config.overwrite,
        )
    )
    return train(config.model_copy(update={"corpus": packed.uri}))
