"""Plan a comparison of retrievers: its options, and the stages of each model, checked before the first one starts."""

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from pydantic import Field, field_validator, model_validator

from readapt_ray.artifacts import Artifact
from readapt_ray.catalog import models, retrievers
from readapt_ray.catalog.encoding import Encoding
from readapt_ray.cluster import on_worker
from readapt_ray.config import Config, OptionError
from readapt_ray.errors import InputError, ModelError
from readapt_ray.evaluation.measure_options import depth_of, drops_self_hits
from readapt_ray.filesystems import last_part
from readapt_ray.recipes.chain import Section, SectionRules, Step, pack_options, stage_config
from readapt_ray.retrieval.bm25 import import_bm25s
from readapt_ray.sources.columns import ColumnsOption
from readapt_ray.storage import Location

logger = logging.getLogger("readapt_ray")


class CompareConfig(Config):
    """Options of `readapt compare`: which retrievers to compare, and on which corpus."""

    retrievers: tuple[str, ...]
    """Models to compare, separated by commas: catalog names, folders, URIs or hub ids. The first is the
    baseline."""
    corpus: str
    """Passages: the output of `readapt ingest`."""
    queries: str | None = None
    """Queries: a file or folder. If omitted, the queries of the corpus."""
    qrels: str | None = None
    """File of judgements. If omitted, the corpus's qrels of the split test."""
    columns: ColumnsOption = ()
    """Columns of queries and qrels, if they have other names than usual: query_id=key,query=question,doc_id=docno,relevance=grade."""
    output: str
    """Folder or URI to write all artifacts and the comparison to."""
    measures: tuple[str, ...] = ("nDCG@10", "R@10", "R@100")
    """Measures such as nDCG@10 or R@100, separated by commas. The first one is tested for significance."""
    drop_self_hits: bool | None = None
    """Drop a result whose doc_id equals the query_id. If omitted, as the catalog says for the corpus's source."""
    finetune: bool = False
    """Also compare each retriever after `readapt finetune` on the corpus's qrels of the split train."""
    readapt: bool = False
    """Also compare each retriever after RE-AdaptIR on the passages, if the catalog knows its pretrained model. With
    finetune, also after both."""
    synthesize: str | None = None
    """Also compare each retriever after `readapt finetune` on queries that this language model writes for the passages. Give a
    folder, a URI or a hub id; with an endpoint in synthesize_options, the model's name there. Queries whose passage the first
    retriever does not find are dropped. With readapt, also after both."""
    queries_only: bool = False
    """With readapt, finetune or synthesize: also compare models that encode only queries, and search the retriever's vectors."""
    bridge: bool = False
    """With readapt, finetune or synthesize: also compare a bridge that maps their query vectors to the retriever's vectors."""
    bm25: bool = False
    """Also compare BM25 (search by words), and each model fused with BM25 by reciprocal rank, as `search --mode hybrid` does.
    An index of each model's vectors is written for this."""
    num_timed_queries: int = Field(default=50, ge=1)
    """Number of queries to time, one by one, on this machine."""
    embed_options: Section = Field(default_factory=dict)
    """Options of embed by name (in a YAML file)."""
    train_options: Section = Field(default_factory=dict)
    """Options of train and pack by name (in a YAML file)."""
    merge_options: Section = Field(default_factory=dict)
    """Options of merge by name (in a YAML file)."""
    finetune_options: Section = Field(default_factory=dict)
    """Options of finetune by name (in a YAML file)."""
    synthesize_options: Section = Field(default_factory=dict)
    """Options of synthesize by name (in a YAML file)."""

    inputs: ClassVar[frozenset[str]] = frozenset({"retrievers", "corpus", "queries", "qrels"})

    @model_validator(mode="after")
    def _has_models_for_queries(self) -> Self:
        for name in ("queries_only", "bridge"):
            if getattr(self, name) and not (self.readapt or self.finetune or self.synthesize):
                raise OptionError(
                    f"{{{name}}} does nothing without {{readapt}}, {{finetune}} or {{synthesize}}; give one of them"
                )
        if self.synthesize_options and not self.synthesize:
            raise OptionError("{synthesize_options} does nothing without {synthesize}; give the language model there")
        return self

    @field_validator("retrievers", mode="after")
    @classmethod
    def _distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        labels = [last_part(each) for each in value]
        if not labels or len(set(labels)) < len(labels):
            raise ValueError("give at least one, each with another last part")
        return value


_OF_LABELLED_QUERIES = frozenset({"split", "negatives", "num_negatives"})
"""Options of finetune that apply only to the corpus's own queries."""
_QUERIES_ONLY = "set queries_only of the comparison, which compares models for queries beside the others"
NOT_IN_A_COMPARISON: dict[str, dict[str, str]] = {
    "embed": {
        "sample": "a comparison needs vectors of all passages; estimate with `readapt embed --sample` first",
        "previous": "older vectors fit only one of the models; a comparison that is run again encodes nothing twice",
    },
    "merge": {
        "bundle": "the comparison trains its own adapters; merge a bundle with `readapt merge --bundle` and compare the output",
        "factors": "the comparison embeds with whole models; leave it out",
        "encoding": "each model is encoded as its retriever is; leave it out",
        "queries_only": _QUERIES_ONLY,
    },
    "finetune": {
        "encoding": "each model is encoded as its retriever is; leave it out",
        "queries_only": _QUERIES_ONLY,
    },
}
"""Stage options that a comparison refuses, each with the reason and what to do instead."""

BM25 = "BM25"
"""Name of the table row of BM25 alone."""
RULES = SectionRules(recipe="the comparison", where="{stage}_options", refused=NOT_IN_A_COMPARISON)


@dataclass(frozen=True)
class Candidate:
    """A row of the comparison: a model, and the steps that make it, embed with it and search with it."""

    name: str
    """Name in the table."""
    model: str
    """The retriever as given, or the folder of the model that is made from it."""
    making: tuple[Step, ...]
    """The steps that make the model. Some inputs may be outputs of an earlier candidate's steps."""
    embed: Step
    search: Step
    bridge: Step | None = None
    """Maps the candidate's query vectors to the vectors of another model. None: no bridge."""
    index: Step | None = None
    """Builds an index with BM25 scores. None if the candidate does not use BM25."""

    @property
    def stages(self) -> tuple[Step, ...]:
        """All steps of the candidate, in order."""
        return (*self.making, self.embed, *((self.index,) if self.index else ()), self.search)


class Plan:
    """Plans every step of a comparison, and checks the options before the first step starts."""

    def __init__(self, config: CompareConfig, corpus: Artifact) -> None:
        self._config = config
        self._corpus = corpus
        self._depth = depth_of(config.measures)
        self.queries = config.queries or (corpus.location / "queries").uri
        self._columns = {"columns": list(config.columns)} if config.columns else {}
        self._qrels = config.qrels or (corpus.location / "qrels/test.parquet").uri
        for stage in ("embed", "train", "merge", "finetune", "synthesize"):
            self._check_section(stage)
        if config.bm25:
            import_bm25s()

    def candidates(self) -> Iterator[Candidate]:
        """Yield each retriever and each model made from it; with `bm25`, also BM25 alone and each one fused with it."""
        opened = ((name, models.open_model(name)) for name in self._config.retrievers)
        for number, each in enumerate(itertools.chain.from_iterable(itertools.starmap(self._of_retriever, opened))):
            yield each
            if self._config.bm25 and number == 0:
                yield self._by_words(each, BM25, "bm25")
            if self._config.bm25:
                yield self._by_words(each, f"{each.name} + {BM25}", "hybrid")

    def _of_retriever(self, name: str, model: models.OpenModel) -> Iterator[Candidate]:
        config, encoding, label, row = self._config, model.encoding, last_part(name), models.find_row(name)
        if (config.finetune or config.synthesize) and model.is_adapter and not config.readapt:
            raise ModelError(
                f"{name!r} is an adapter, and finetune starts from whole weights; add --readapt, which makes them, or give "
                f"the output of `readapt merge`"
            )
        as_it_is = self._candidate(label, name, encoding)
        yield as_it_is
        readapted = self._readapted(name, row) if config.readapt and row is not None else ()
        if config.readapt and row is None:
            logger.warning(
                "%s is not in the catalog, so what it was made from is not known: it is not RE-adapted", name
            )
        if readapted:
            yield from self._with_old_vectors(as_it_is, f"{label} + RE-AdaptIR", encoding, *readapted)
        if model.is_adapter and not readapted:
            return
        start = readapted[-2].config.output if model.is_adapter else name
        for kind in self._kinds_of_finetuning():
            making = self._finetuned(start, row, label, kind)
            yield from self._with_old_vectors(as_it_is, f"{label} + {kind}", encoding, *making)
            if readapted:
                both = self._finetuned(readapted[-1].config.output, row, f"{label}-readapted", kind)
                yield self._candidate(f"{label} + RE-AdaptIR + {kind}", both[-1].config.output, encoding, *both)

    def _kinds_of_finetuning(self) -> list[str]:
        """Return which queries to finetune on: "finetune" (the corpus's labelled queries), "synthesize" (written ones)."""
        config = self._config
        return ["finetune"] * config.finetune + ["synthesize"] * bool(config.synthesize)

    def _with_old_vectors(
        self, as_it_is: Candidate, name: str, encoding: Encoding, *making: Step
    ) -> Iterator[Candidate]:
        """Yield a model made from a retriever; if asked for, also its queries (alone, bridged) on the retriever's vectors."""
        made, config = self._candidate(name, making[-1].config.output, encoding, *making), self._config
        yield made
        if config.queries_only:
            last = making[-1].config
            output = Location(last.output).beside("-queries").uri
            step = Step(
                making[-1].name, making[-1].stage, last.model_copy(update={"queries_only": True, "output": output})
            )
            embed = as_it_is.embed if getattr(last, "model", as_it_is.model) == as_it_is.model else None
            yield self._candidate(f"{name} + queries-only", output, encoding, *making[:-1], step, embed=embed)
        if config.bridge:
            old = as_it_is.embed.config.output
            step = self._step(f"bridges/{file_name(name)}", "bridge", {}, old_vectors=old, retriever=made.model)
            yield self._candidate(f"{name} + bridge", made.model, encoding, step, embed=as_it_is.embed, bridge=step)

    def _candidate(
        self,
        label: str,
        model: str,
        encoding: Encoding,
        *making: Step,
        embed: Step | None = None,
        bridge: Step | None = None,
    ) -> Candidate:
        """Plan a candidate. `embed` is the step that makes the vectors it searches; None means the candidate's model."""
        config, name = self._config, file_name(label)
        drop_self_hits = config.drop_self_hits
        if drop_self_hits is None:
            drop_self_hits = drops_self_hits(self._corpus.manifest.config.get("source"))
        embed = embed or self._step(
            f"vectors/{name}",
            "embed",
            config.embed_options,
            retriever=model,
            corpus=self._corpus.uri,
            encoding=encoding,
        )
        search = self._step(
            f"runs/{name}.trec",
            "search",
            self._columns,
            retriever=model,
            vectors=embed.config.output,
            bridge=bridge.config.output if bridge else None,
            queries=self.queries,
            qrels=self._qrels,
            top_k=self._depth,
            drop_self_hits=drop_self_hits,
        )
        return Candidate(label, model, making, embed, search, bridge)

    def _by_words(self, dense: Candidate, label: str, mode: str) -> Candidate:
        """Plan a search with BM25 over a candidate's passages: alone, or fused with the candidate's search."""
        vectors = dense.embed.config.output
        index = self._step(f"indexes/{Location(vectors).name}", "index", {}, vectors=vectors, bm25=True)
        run = Location(self._config.output) / f"runs/{file_name(label)}.trec"
        changes = {"mode": mode, "index": index.config.output, "vectors": None, "output": run.uri}
        search = Step(f"runs/{run.name}", "search", dense.search.config.model_copy(update=changes))
        return replace(dense, name=label, making=(), index=index, search=search)

    def _readapted(self, name: str, row: retrievers.Retriever) -> tuple[Step, ...]:
        """Plan RE-AdaptIR. The last step makes the RE-adapted model; the step before it, the retriever as whole weights."""
        config = self._config
        blocks = self._step(
            f"blocks/{row.name}",
            "pack",
            pack_options(config.train_options),
            pretrained=row.pretrained,
            corpus=self._corpus.uri,
        )
        adapter = self._step(
            f"adapters/{row.name}",
            "train",
            {"target_modules": row.dora_targets, **config.train_options},
            pretrained=row.pretrained,
            corpus=blocks.config.output,
        )
        wired = {"pretrained": row.pretrained, "retriever": name, "adapter": adapter.config.output}
        whole = self._step(f"models/{row.name}-whole", "merge", {}, **wired, readapter_scale=1.0, knowledge_scale=0.0)
        readapted = self._step(f"models/{row.name}-readapted", "merge", config.merge_options, **wired)
        return blocks, adapter, whole, readapted

    def _finetuned(self, start: str, row: retrievers.Retriever | None, label: str, kind: str) -> tuple[Step, ...]:
        """Plan the finetuning of a model on labelled or on written queries. Written queries are made first."""
        options = {**({} if row is None else {"target_modules": row.dora_targets}), **self._config.finetune_options}
        if kind == "finetune":
            return (self._step(f"models/{label}-finetuned", "finetune", options, model=start, corpus=self._corpus.uri),)
        written = self._written_queries()
        # Written queries are in the split train, and the negatives given for other queries do not cover them.
        own = {name: value for name, value in options.items() if name not in _OF_LABELLED_QUERIES}
        tuned = self._step(f"models/{label}-synthesized", "finetune", own, model=start, corpus=written.config.output)
        return written, tuned

    def _written_queries(self) -> Step:
        """Plan the step in which a language model writes queries. It reads the vectors of the first retriever."""
        config = self._config
        vectors = (Location(config.output) / f"vectors/{file_name(last_part(config.retrievers[0]))}").uri
        wired = {"corpus": self._corpus.uri, "model": config.synthesize, "vectors": vectors}
        return self._step("queries", "synthesize", config.synthesize_options, **wired)

    def evaluate(self, candidates: Sequence[Candidate]) -> Step:
        """Plan the evaluation of all runs, with the first as the baseline."""
        return self._step(
            "report",
            "evaluate",
            self._columns,
            runs=[each.search.config.output for each in candidates],
            names=[each.name for each in candidates],
            qrels=self._qrels,
            queries=self.queries,
            corpus=self._corpus.uri,
            measures=self._config.measures,
            overwrite=True,
        )

    @staticmethod
    def check_outputs(candidates: Sequence[Candidate]) -> None:
        """Check that steps with the same output have equal options. Candidates may share a step.

        Raises:
            InputError: two different steps would write to one output. The message names their retrievers.
        """
        known: dict[str, tuple[str, Any]] = {}
        for each in candidates:
            for step in each.stages:
                name, config = known.setdefault(step.config.output, (each.name, step.config))
                if config != step.config:
                    raise InputError(
                        f"{name!r} and {each.name!r} would both be written to {step.config.output!r}; rename the folder of "
                        f"one of the retrievers, or compare them one after the other"
                    )

    def check_files(self) -> None:
        """Check that queries, judgements, labels for finetune, and files named in the options exist.

        Raises:
            InputError: one is missing, or finetune would train on the judgements of the comparison.
        """
        places = {"queries": self.queries, "qrels": self._qrels}
        missing = {what: uri for what, uri in places.items() if not Location(uri).exists()}
        if missing:
            raise InputError(
                f"no {' and no '.join(f'{what} at {uri!r}' for what, uri in missing.items())}; give "
                f"{' and '.join(f'--{what}' for what in missing)}"
            )
        split = self._config.finetune_options.get("split", "train")
        labels = self._corpus.location / "qrels" / f"{split}.parquet"
        if self._config.finetune and on_worker.absolute(Location(self._qrels)) == on_worker.absolute(labels):
            raise InputError(
                f"finetune would train on {labels.uri!r}, by which the comparison is measured; set another split in "
                f"finetune_options, or give other --queries and --qrels"
            )
        if self._config.finetune and not labels.is_file():
            raise InputError(
                f"no judgements at {labels.uri!r} to finetune with; set split in finetune_options, or leave it out"
            )
        for section, options in (("train", self._config.train_options), ("finetune", self._config.finetune_options)):
            for name in ("exclude", "only", "negatives"):
                uri = options.get(name)
                if uri is not None and not Location(uri).exists():
                    raise InputError(f"{section}_options: {name} = {uri!r} is not there; give a file that exists")

    def _check_section(self, stage: str) -> None:
        """Refuse wrong options of a stage, even if this comparison does not run it."""
        options = getattr(self._config, f"{stage}_options")
        names = {
            "embed": ("retriever", "corpus"),
            "train": ("pretrained", "corpus"),
            "merge": ("pretrained", "retriever", "adapter"),
            "finetune": ("model", "corpus"),
            "synthesize": ("model", "corpus", "vectors"),
        }[stage]
        inputs: Section = dict.fromkeys(names, "-")
        if stage == "embed":
            inputs["encoding"] = None
        made: Any = stage_config(stage, options, RULES, **inputs, output="-")
        if stage == "merge" and isinstance(made.knowledge_scale, tuple):
            raise InputError(
                f"merge_options: knowledge_scale = {list(made.knowledge_scale)}: each comparison trains one adapter; give one "
                f"number"
            )

    def _step(self, name: str, stage: str, options: Section, **wired: Any) -> Step:
        output = (Location(self._config.output) / name).uri
        return Step(name, stage, stage_config(stage, options, RULES, **wired, output=output))


def file_name(name: str) -> str:
    """Return the file name of a candidate from its name in the table: "e5 + BM25" -> "e5-BM25"."""
    return name.replace(" + ", "-")
