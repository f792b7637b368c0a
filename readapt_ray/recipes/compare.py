"""Choosing a retriever for one's domain: several of them over one corpus, in one table.

In: retrievers, an ingested corpus, queries and judgements. Out, under one folder: vectors and a run for each,
`report/` (the evaluation of all runs against the first), and `compare.json` and `compare.md`: quality, time of a
query, bytes and dimension. On demand each retriever stands there also after `finetune` on the corpus's training
split, RE-adapted to its passages, and both together. Every artifact is made by its stage, so a comparison that
was killed goes on, and a retriever more costs only itself.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from readapt_ray import artifacts
from readapt_ray.artifacts import Artifact, open_artifact
from readapt_ray.catalog import models, retrievers
from readapt_ray.catalog.encoding import Encoding
from readapt_ray.config import Config
from readapt_ray.errors import ArtifactConflictError, InputError, ModelError
from readapt_ray.evaluation.measure_options import depth_of, drops_self_hits
from readapt_ray.evaluation.report import table
from readapt_ray.recipes.chain import Section, SectionRules, Step, pack_options, run_stage, stage_config
from readapt_ray.storage import Location

logger = logging.getLogger("readapt_ray")

_MAX_TIMED_ROWS = 1_000_000


class CompareConfig(Config):
    """Which retrievers, on which corpus."""

    retrievers: tuple[str, ...]
    """Models to compare, separated by commas: catalog names, folders, URIs or hub ids. The first is the
    baseline."""
    corpus: str
    """Passages: the output of `readapt ingest`."""
    queries: str | None = None
    """Queries: a file or folder. If omitted, the corpus's own."""
    qrels: str | None = None
    """File of judgements. If omitted, the corpus's own of the split test."""
    output: str
    """Folder or URI to write all artifacts and the comparison to."""
    measures: tuple[str, ...] = ("nDCG@10", "R@10", "R@100")
    """Measures such as nDCG@10 or R@100, separated by commas. The first one is tested for significance."""
    drop_self_hits: bool | None = None
    """Leave out a result whose doc_id equals the query_id. If omitted, as the catalog says for the corpus's
    source."""
    finetune: bool = False
    """Also compare each retriever after `readapt finetune` on the corpus's qrels of the split train."""
    readapt: bool = False
    """Also compare each retriever after RE-AdaptIR on the passages, if the catalog knows its pretrained model. With
    finetune, also after both."""
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

    inputs: ClassVar[frozenset[str]] = frozenset({"retrievers", "corpus", "queries", "qrels"})

    @field_validator("retrievers", mode="after")
    @classmethod
    def _distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        labels = [_label(each) for each in value]
        if not labels or len(set(labels)) < len(labels):
            raise ValueError("give at least one, and none whose last part is that of another")
        return value


NOT_IN_A_COMPARISON: dict[str, dict[str, str]] = {
    "embed": {
        "sample": "a comparison needs vectors of all passages; estimate with `readapt embed --sample` first",
        "previous": "older vectors fit only one of the models; a comparison that is run again encodes nothing twice",
    },
    "merge": {
        "bundle": "the comparison trains its own adapters; merge a bundle with `readapt merge --bundle` and compare the output",
        "factors": "the comparison embeds with whole models; leave it out",
        "encoding": "each model is encoded as its retriever is; leave it out",
    },
    "finetune": {"encoding": "each model is encoded as its retriever is; leave it out"},
}
"""Options of stages that a comparison refuses, each with the reason and what to do instead."""

RULES = SectionRules(recipe="the comparison", where="{stage}_options", refused=NOT_IN_A_COMPARISON)


@dataclass(frozen=True)
class Candidate:
    """A model that is compared, and the stages that make it, embed with it and search with it."""

    name: str
    """What the table calls it."""
    model: str
    """MODEL: the retriever, or the folder that is made from it."""
    making: tuple[Step, ...]
    """The stages that make the model; a candidate before this one may have made some of what they need."""
    embed: Step
    search: Step


def compare(config: CompareConfig) -> dict[str, Any]:
    """Compare retrievers; the content of `compare.json`.

    Raises:
        InputError: a retriever cannot be found or used, a measure is unknown, or an option is wrong; found before
            anything is encoded.
        ArtifactMissingError: the corpus is not the output of ingest.
    """
    folder = Location(config.output)
    artifacts.refuse_foreign_results(folder / "compare.json", {"corpus", "rows", "measures"}, folder / "compare.md")
    _refuse_foreign_report(config)
    corpus = open_artifact(config.corpus, "ingest")
    plan = _Plan(config, corpus)
    candidates = list(plan.candidates())
    evaluate = plan.evaluate(candidates)
    plan.check_files()
    rows = []
    for candidate in candidates:
        logger.info("compare: %s", candidate.name)
        for step in candidate.making:
            run_stage(step.stage, step.config)
        vectors = run_stage("embed", candidate.embed.config)
        run_stage("search", candidate.search.config)
        rows.append({"retriever": candidate.name, **_costs(config, candidate, vectors, plan.queries)})
    report = run_stage("evaluate", evaluate.config).manifest.details
    for row in rows:
        row["means"] = report["means"][row["retriever"]]
        row["comparison"] = next(
            (each for each in report["comparisons"] if each["run"] == row["retriever"]), None
        )  # the first of a run is that by the first measure
    result = {
        "corpus": corpus.uri,
        "num_passages": corpus.manifest.counts["num_passages"],
        "num_queries": report["num_queries"],
        "measures": list(rows[0]["means"]),
        "rows": rows,
    }
    (folder / "compare.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    (folder / "compare.md").write_text(to_markdown(result))
    return result


def _refuse_foreign_report(config: CompareConfig) -> None:
    """Refuse the report of `readapt run` or `readapt evaluate`: only one of runs as they are named here is replaced.

    Raises:
        ArtifactConflictError: such a report is there.
    """
    folder = f"{config.output}/report"
    record = artifacts.read_manifest(folder) or artifacts.read_building(folder)
    if record is None:
        return
    made_with = record.config if isinstance(record, artifacts.Manifest) else record.get("config", {})
    names, runs = made_with.get("names") or [], made_with.get("runs") or []
    if not names or [Location(each).name for each in runs] != [f"{_file_name(each)}.trec" for each in names]:
        raise ArtifactConflictError(f"{folder!r} is not a report of `readapt compare`; give another output")


def _file_name(name: str) -> str:
    return name.replace(" + ", "-")


class _Plan:
    """Every stage of a comparison, with its options checked before the first one starts."""

    def __init__(self, config: CompareConfig, corpus: Artifact) -> None:
        self._config = config
        self._corpus = corpus
        self._depth = depth_of(config.measures)
        self.queries = config.queries or f"{corpus.uri}/queries"
        self._qrels = config.qrels or f"{corpus.uri}/qrels/test.parquet"
        for stage in ("embed", "train", "merge", "finetune"):
            self._check_section(stage)

    def candidates(self) -> Iterator[Candidate]:
        """Yield each retriever as it is, and what is made of it."""
        for name in self._config.retrievers:
            model = models.open_model(name)
            yield from self._of_retriever(name, model)

    def _of_retriever(self, name: str, model: models.OpenModel) -> Iterator[Candidate]:
        config, encoding, label, row = self._config, model.encoding, _label(name), models.find_row(name)
        if config.finetune and model.is_adapter and not config.readapt:
            raise ModelError(
                f"{name!r} is an adapter, and finetune starts from whole weights; add --readapt, which makes them, or give "
                f"the output of `readapt merge`"
            )
        yield self._candidate(label, name, encoding)
        readapted = self._readapted(name, row) if config.readapt and row is not None else ()
        if config.readapt and row is None:
            logger.warning(
                "%s is not in the catalog, so what it was made from is not known: it is not RE-adapted", name
            )
        if readapted:
            yield self._candidate(f"{label} + RE-AdaptIR", readapted[-1].config.output, encoding, *readapted)
        if not config.finetune or (model.is_adapter and not readapted):
            return
        start = readapted[-2].config.output if model.is_adapter else name
        tuned = self._finetuned(start, row, label)
        yield self._candidate(f"{label} + finetune", tuned.config.output, encoding, tuned)
        if readapted:
            both = self._finetuned(readapted[-1].config.output, row, f"{label}-readapted")
            yield self._candidate(f"{label} + RE-AdaptIR + finetune", both.config.output, encoding, both)

    def _candidate(self, label: str, model: str, encoding: Encoding, *making: Step) -> Candidate:
        config, name = self._config, _file_name(label)
        drop_self_hits = config.drop_self_hits
        if drop_self_hits is None:
            drop_self_hits = drops_self_hits(self._corpus.manifest.config.get("source"))
        embed = self._step(
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
            {},
            retriever=model,
            vectors=embed.config.output,
            queries=self.queries,
            qrels=self._qrels,
            top_k=self._depth,
            drop_self_hits=drop_self_hits,
        )
        return Candidate(label, model, making, embed, search)

    def _readapted(self, name: str, row: retrievers.Retriever) -> tuple[Step, ...]:
        """Plan the RE-adapted retriever: the last step but one makes it as whole weights, the last one RE-adapted."""
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

    def _finetuned(self, start: str, row: retrievers.Retriever | None, label: str) -> Step:
        targets = {} if row is None else {"target_modules": row.dora_targets}
        options = {**targets, **self._config.finetune_options}
        return self._step(f"models/{label}-finetuned", "finetune", options, model=start, corpus=self._corpus.uri)

    def evaluate(self, candidates: Sequence[Candidate]) -> Step:
        """Plan the measurement of all runs against the first."""
        return self._step(
            "report",
            "evaluate",
            {},
            runs=[each.search.config.output for each in candidates],
            names=[each.name for each in candidates],
            qrels=self._qrels,
            queries=self.queries,
            corpus=self._corpus.uri,
            measures=self._config.measures,
            overwrite=True,
        )

    def check_files(self) -> None:
        """See that queries, judgements and the labels for finetune are there.

        Raises:
            InputError: some are not.
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
        """Refuse wrong options also where this comparison does not need the stage."""
        options = getattr(self._config, f"{stage}_options")
        names = {
            "embed": ("retriever", "corpus"),
            "train": ("pretrained", "corpus"),
            "merge": ("pretrained", "retriever", "adapter"),
            "finetune": ("model", "corpus"),
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


def _costs(config: CompareConfig, candidate: Candidate, vectors: Artifact, queries: str) -> dict[str, Any]:
    """What a candidate costs: time of a query, bytes, dimension."""
    from readapt_ray.evaluation.latency import query_latency
    from readapt_ray.retrieval.encoder import Encoder
    from readapt_ray.sources.judgements import read_queries

    details, counts = vectors.manifest.details["encoder"], vectors.manifest.counts
    encoding = Encoding.parse(details["encoding"], where=vectors.uri)
    encoder = Encoder.load(models.open_model(candidate.model), encoding=encoding, dtype=details["dtype"])
    doc_ids, matrix = _in_memory(vectors)
    texts = [query.text for query in read_queries(queries)[: config.num_timed_queries]]
    latency = query_latency(encoder, texts, doc_ids, matrix)
    return {
        "encode_ms": round(latency.encode_ms, 2),
        "search_ms": round(latency.search_ms, 2),
        "device": encoder.device.type,
        "num_parameters": sum(each.numel() for each in encoder.network.parameters()),
        "dimension": details["dimension"],
        "vector_bytes": counts["num_bytes"],
    }


def _in_memory(vectors: Artifact) -> tuple[list[str], NDArray[np.float32]]:
    """The vectors, a million at most: beyond that nobody scans them one query at a time."""
    from readapt_ray.retrieval.vector_files import RowRange, iterate_vectors, read_footer

    folder = vectors.location / "vectors"
    ranges, room = [], _MAX_TIMED_ROWS
    for name, _ in folder.listing(".parquet"):
        if not room:
            break
        num_rows = min(room, read_footer(folder / name).num_rows)
        ranges.append(RowRange(name, 0, num_rows))
        room -= num_rows
    chunks = list(iterate_vectors(folder, ranges))
    return [each for doc_ids, _ in chunks for each in doc_ids], np.concatenate([matrix for _, matrix in chunks])


def to_markdown(result: dict[str, Any]) -> str:
    """The comparison as one table."""
    header = [
        "retriever",
        *result["measures"],
        "difference",
        "p (Holm)",
        "ms a query",
        "dimension",
        "vectors",
        "parameters",
    ]
    rows = []
    for row in result["rows"]:
        against = row["comparison"]
        p = against["p_holm"] if against else None
        rows.append(
            [
                row["retriever"],
                *(f"{mean:.4f}" for mean in row["means"].values()),
                f"{against['difference']:+.4f}" if against else "",
                "" if p is None else f"{p:.4f}",
                f"{row['encode_ms']:.1f} + {row['search_ms']:.1f}",
                f"{row['dimension']:,}",
                f"{row['vector_bytes'] / 1e6:,.1f} MB",
                f"{row['num_parameters'] / 1e6:,.1f} M",
            ]
        )
    title = f"{result['num_queries']:,} queries, {result['num_passages']:,} passages of {result['corpus']}"
    note = (
        f"Difference in {result['measures'][0]} from the first, paired randomisation test with Holm's correction; milliseconds "
        f"of encoding and of exact search on this machine, one query at a time, median."
    )
    return "\n".join(["# Retrievers", "", title, "", *table(header, rows), "", note]) + "\n"


def _label(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1]
