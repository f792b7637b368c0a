"""Choosing a retriever for one's domain: several of them over one corpus, in one table.

In: retrievers, an ingested corpus, queries and judgements. Out, under one folder: vectors and a run for each,
`report/` (the evaluation of all runs against the first), and `compare.json` and `compare.md`: quality, time of a
query, bytes and dimension. On demand each retriever stands there also after `finetune` on the corpus's training
split, RE-adapted to its passages, and both together. Every artifact is made by its stage, so a comparison that
was killed goes on, and a retriever more costs only itself.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from readapt_ray import recipes
from readapt_ray.artifacts import Artifact, open_artifact
from readapt_ray.catalog import models, retrievers
from readapt_ray.config import Config
from readapt_ray.errors import InputError, ModelError
from readapt_ray.retrieval.report import table
from readapt_ray.stages.measure_options import depth_of, drops_self_hits
from readapt_ray.storage import Location

logger = logging.getLogger("readapt_ray")

Section = dict[str, Any]

_MAX_TIMED_ROWS = 1_000_000


class CompareConfig(Config):
    """Which retrievers, on which corpus."""

    retrievers: tuple[str, ...]
    """MODELs with commas between them, the first of them the baseline: catalog names, folders, URIs or hub ids."""
    corpus: str
    """Passages: the output of `readapt ingest`."""
    queries: str | None = None
    """A file or folder of queries; default the corpus's own."""
    qrels: str | None = None
    """A file of judgements; default the corpus's own of the split test."""
    output: str
    """Folder or URI that everything is written under."""
    measures: tuple[str, ...] = ("nDCG@10", "R@10", "R@100")
    """Measures by their usual names, with commas between them; the first is compared."""
    drop_self_hits: bool | None = None
    """Leave out a passage whose doc_id is the query_id; default as the catalog says of the corpus's source, else not."""
    finetune: bool = False
    """Also each retriever after `finetune` on the corpus's split train."""
    readapt: bool = False
    """Also each retriever RE-adapted to the passages, where its pretrained model is known; with finetune, both together."""
    num_timed_queries: int = Field(default=50, ge=1)
    """Queries that are timed, one by one, on this machine."""
    embed_options: Section = Field(default_factory=dict)
    """Options of embed, by name (in a YAML file)."""
    train_options: Section = Field(default_factory=dict)
    """Options of train and pack, by name (in a YAML file)."""
    merge_options: Section = Field(default_factory=dict)
    """Options of merge, by name (in a YAML file)."""
    finetune_options: Section = Field(default_factory=dict)
    """Options of finetune, by name (in a YAML file)."""

    @field_validator("retrievers", mode="after")
    @classmethod
    def _distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        labels = [_label(each) for each in value]
        if not labels or len(set(labels)) < len(labels):
            raise ValueError("give at least one, and none whose last part is that of another")
        return value


@dataclass(frozen=True)
class Contender:
    """A model that is compared: how the table calls it, where it lies, and how it wants its text."""

    name: str
    model: str
    encoding: retrievers.Encoding


def compare(config: CompareConfig) -> dict[str, Any]:
    """Compare retrievers; the content of `compare.json`.

    Raises:
        InputError: a retriever cannot be found or used, or a measure is unknown; found before anything is encoded.
        ArtifactMissingError: the corpus is not the output of ingest.
    """
    depth_of(config.measures)
    corpus = open_artifact(config.corpus, "ingest")
    for name in config.retrievers:
        _check(config, name)
    queries = config.queries or f"{corpus.uri}/queries"
    qrels = config.qrels or f"{corpus.uri}/qrels/test.parquet"
    missing = {what: uri for what, uri in (("queries", queries), ("qrels", qrels)) if not Location(uri).exists()}
    if missing:
        raise InputError(
            f"no {' and no '.join(f'{what} at {uri!r}' for what, uri in missing.items())}; give "
            f"{' and '.join(f'--{what}' for what in missing)}"
        )
    rows, runs = [], {}
    for contender in _contenders(config, corpus):
        logger.info("compare: %s", contender.name)
        vectors, run = _searched(config, contender, corpus, queries, qrels)
        runs[contender.name] = run.uri
        rows.append({"retriever": contender.name, **_costs(config, contender, vectors, queries)})
    report = _stage(
        "evaluate",
        {},
        runs=list(runs.values()),
        names=list(runs),
        qrels=qrels,
        queries=queries,
        corpus=corpus.uri,
        measures=config.measures,
        output=f"{config.output}/report",
        overwrite=True,
    ).manifest.details
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
    folder = Location(config.output)
    (folder / "compare.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    (folder / "compare.md").write_text(to_markdown(result))
    return result


def _check(config: CompareConfig, name: str) -> None:
    model = models.find_model(name)
    models.encoding_of(model)
    if config.finetune and model.is_adapter and not config.readapt:
        raise ModelError(
            f"{name!r} is an adapter, and finetune starts from whole weights; add --readapt, which makes them, or give "
            f"the output of `readapt merge`"
        )


def _contenders(config: CompareConfig, corpus: Artifact) -> Iterator[Contender]:
    """Each retriever as it is, and what is made of it."""
    for name in config.retrievers:
        label, model = _label(name), models.find_model(name)
        encoding = models.encoding_of(model)
        yield Contender(label, name, encoding)
        row = retrievers.find_retriever(name)
        readapted = _readapted(config, corpus, row) if config.readapt and row is not None else None
        if config.readapt and row is None:
            logger.warning(
                "%s is not in the catalog, so what it was made from is not known: it is not RE-adapted", name
            )
        if readapted is not None:
            yield Contender(f"{label} + RE-AdaptIR", readapted[1], encoding)
        if config.finetune:
            start = readapted[0] if readapted is not None and model.is_adapter else name
            if models.find_model(start).is_adapter:
                continue
            yield Contender(f"{label} + finetune", _finetuned(config, corpus, start, row, label), encoding)
            if readapted is not None:
                both = f"{label} + RE-AdaptIR + finetune"
                yield Contender(both, _finetuned(config, corpus, readapted[1], row, f"{label}-readapted"), encoding)


def _readapted(config: CompareConfig, corpus: Artifact, row: retrievers.Retriever) -> tuple[str, str]:
    """The retriever as whole weights, and RE-adapted."""
    packing: Section = {
        each: config.train_options[each] for each in ("mode", "block_tokens") if each in config.train_options
    }
    blocks = _stage(
        "pack", packing, pretrained=row.pretrained, corpus=corpus.uri, output=f"{config.output}/blocks/{row.name}"
    )
    adapter = _stage(
        "train",
        {"target_modules": row.dora_targets, **config.train_options},
        pretrained=row.pretrained,
        corpus=blocks.uri,
        output=f"{config.output}/adapters/{row.name}",
    )
    wired = {"pretrained": row.pretrained, "retriever": row.name, "adapter": adapter.uri}
    folder = f"{config.output}/models/{row.name}"
    whole = _stage("merge", {}, **wired, readapter_scale=1.0, knowledge_scale=0.0, output=f"{folder}-whole")
    return whole.uri, _stage("merge", config.merge_options, **wired, output=f"{folder}-readapted").uri


def _finetuned(
    config: CompareConfig, corpus: Artifact, start: str, row: retrievers.Retriever | None, label: str
) -> str:
    targets = {} if row is None else {"target_modules": row.dora_targets}
    return _stage(
        "finetune",
        {**targets, **config.finetune_options},
        model=start,
        corpus=corpus.uri,
        output=f"{config.output}/models/{label}-finetuned",
    ).uri


def _searched(
    config: CompareConfig, contender: Contender, corpus: Artifact, queries: str, qrels: str
) -> tuple[Artifact, Artifact]:
    """Vectors and run of a contender."""
    name = contender.name.replace(" + ", "-")
    vectors = _stage(
        "embed",
        config.embed_options,
        retriever=contender.model,
        corpus=corpus.uri,
        encoding=contender.encoding,
        output=f"{config.output}/vectors/{name}",
    )
    drop_self_hits = config.drop_self_hits
    if drop_self_hits is None:
        drop_self_hits = drops_self_hits(corpus.manifest.config.get("source"))
    run = _stage(
        "search",
        {},
        retriever=contender.model,
        vectors=vectors.uri,
        queries=queries,
        qrels=qrels,
        top_k=depth_of(config.measures),
        drop_self_hits=drop_self_hits,
        encoding=contender.encoding,
        output=f"{config.output}/runs/{name}.trec",
    )
    return vectors, run


def _costs(config: CompareConfig, contender: Contender, vectors: Artifact, queries: str) -> dict[str, Any]:
    """What a contender costs: time of a query, bytes, dimension."""
    from readapt_ray.retrieval.encoder import Encoder
    from readapt_ray.retrieval.latency import query_latency
    from readapt_ray.sources.judgements import read_queries

    details, counts = vectors.manifest.details["encoder"], vectors.manifest.counts
    encoder = Encoder.load(models.find_model(contender.model), encoding=contender.encoding, dtype=details["dtype"])
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


def _stage(stage: str, options: Section, **wired: Any) -> Artifact:
    """The artifact of a stage, made unless it is there."""
    config_class, function = recipes.stage_parts(stage)
    artifact: Artifact = function(config_class.parse({**options, **wired}, where=f"{stage}_options"))
    return artifact
