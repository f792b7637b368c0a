"""Compare several retrievers on one corpus, to choose one for your domain.

In: retrievers, an ingested corpus, queries and judgements. Out, under one folder: vectors and a run per retriever,
`report/` (the evaluation of all runs against the first), and the table in `compare.json` and `compare.md`: quality, time
per query, bytes and dimension.

Options add more rows: each retriever after `finetune` (on the corpus's training split, or on queries that a language
model writes), after RE-AdaptIR, and after both; and BM25, alone and fused with each row. Every artifact is made by its
stage. So a killed comparison resumes, and adding a retriever costs only that retriever's work.
"""

import json
import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray

from readapt_ray import artifacts, outputs
from readapt_ray.artifacts import Artifact, open_artifact
from readapt_ray.catalog import models
from readapt_ray.errors import ArtifactConflictError
from readapt_ray.evaluation.tables import markdown_table, p_value, signed, value
from readapt_ray.recipes.chain import run_stage
from readapt_ray.recipes.compare_plan import BM25, Candidate, CompareConfig, Plan, file_name
from readapt_ray.storage import Location

logger = logging.getLogger("readapt_ray")

_MAX_TIMED_ROWS = 1_000_000


def compare(config: CompareConfig) -> dict[str, Any]:
    """Compare retrievers, write `compare.json` and `compare.md`, and return the content of `compare.json`.

    Both files of an earlier comparison are replaced. `rows` has a row per retriever and model made from it: `means` of
    the measures, `comparison` with the first row (None there), times per query in ms, bytes and dimension.

    Raises:
        InputError: a retriever cannot be found or used, a measure is unknown, or an option is wrong. This is checked
            before anything is encoded.
        ArtifactMissingError: the corpus is not an output of ingest.
        ArtifactConflictError: the output holds results that are not of a comparison.
    """
    folder = Location(config.output)
    outputs.refuse_foreign_results(folder / "compare.json", {"corpus", "rows", "measures"}, folder / "compare.md")
    _refuse_foreign_report(config)
    corpus = open_artifact(config.corpus, "ingest")
    plan = Plan(config, corpus)
    candidates = list(plan.candidates())
    plan.check_outputs(candidates)
    evaluate = plan.evaluate(candidates)
    plan.check_files()
    for step in (step for each in candidates for step in each.making):
        if step.stage == "merge":
            _check_layers(step.config)
    rows: list[dict[str, Any]] = []
    for candidate in candidates:
        logger.info("compare: %s", candidate.name)
        for step in candidate.stages:
            run_stage(step.stage, step.config)
        rows.append({"retriever": candidate.name, **_costs(config, candidate, plan.queries, rows)})
    report = run_stage("evaluate", evaluate.config).manifest.details
    for row in rows:
        row["means"] = report["means"][row["retriever"]]
        row["comparison"] = next(
            (each for each in report["comparisons"] if each["run"] == row["retriever"]), None
        )  # the first comparison of a run is by the first measure
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


def _check_layers(merge: Any) -> None:
    """Check, before an adapter is trained, that the model has the layers named in `layer_scales`."""
    from readapt_ray.weights.merge_plan import check_pair

    if merge.layer_scales:
        pretrained, retriever = models.open_model(merge.pretrained), models.open_model(merge.retriever)
        check_pair(pretrained, retriever, accept=merge.accept, layer_scales=merge.layer_scales)


def _refuse_foreign_report(config: CompareConfig) -> None:
    """Refuse to replace a report of `readapt run` or `readapt evaluate`. A report of `compare` is known by its names of runs.

    Raises:
        ArtifactConflictError: the output holds such a report.
    """
    folder = (Location(config.output) / "report").uri
    record = artifacts.read_manifest(folder) or artifacts.read_lease(folder)
    if record is None:
        return
    made_with = record.config if isinstance(record, artifacts.Manifest) else record.get("config", {})
    names, runs = made_with.get("names") or [], made_with.get("runs") or []
    if not names or [Location(each).name for each in runs] != [f"{file_name(each)}.trec" for each in names]:
        raise ArtifactConflictError(f"{folder!r} is not a report of `readapt compare`; give another output")


def _costs(config: CompareConfig, candidate: Candidate, queries: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the costs of a candidate: milliseconds per query, bytes, dimension. `rows` are the earlier rows."""
    from readapt_ray.sources.judgements import read_queries

    texts = [query.text for query in read_queries(queries, config.columns)[: config.num_timed_queries]]
    if candidate.index is None:
        return _costs_of_vectors(candidate, texts)
    if candidate.name == BM25:
        return _costs_of_words(open_artifact(candidate.index.config.output, "index"), texts)
    of = {row["retriever"]: row for row in rows}
    words, dense = of[BM25], of[candidate.name.removesuffix(f" + {BM25}")]
    both = {name: round(dense[name] + words[name], 2) for name in ("search_ms", "num_bytes")}
    return {name: value for name, value in dense.items() if name != "retriever"} | both


def _costs_of_vectors(candidate: Candidate, texts: list[str]) -> dict[str, Any]:
    from readapt_ray.evaluation.latency import query_latency
    from readapt_ray.retrieval.bridge import Bridge
    from readapt_ray.retrieval.encoder import Encoder
    from readapt_ray.retrieval.query_encoder import query_encoder

    vectors = open_artifact(candidate.embed.config.output, "embed")
    bridge = Bridge.open(candidate.bridge.config.output) if candidate.bridge else None
    for_queries = query_encoder(models.open_model(candidate.model), vectors, bridge=bridge)
    encoder = Encoder.load(for_queries.model, encoding=for_queries.encoding, dtype=for_queries.description["dtype"])
    doc_ids, matrix = _in_memory(vectors)
    latency = query_latency(encoder, texts, doc_ids, matrix, query_map=bridge.query_map if bridge else None)
    return {
        "encode_ms": round(latency.encode_ms, 2),
        "search_ms": round(latency.search_ms, 2),
        "device": encoder.device.type,
        "num_parameters": sum(each.numel() for each in encoder.network.parameters()),
        "dimension": vectors.manifest.details["encoder"]["dimension"],
        "num_bytes": vectors.manifest.counts["num_bytes"],
    }


def _costs_of_words(index: Artifact, texts: list[str]) -> dict[str, Any]:
    from readapt_ray.evaluation.latency import words_latency
    from readapt_ray.retrieval.index_files import ShardRecord, read_ids, read_words, words_file

    folder, sha256s = index.location / "shards", index.manifest.details["bm25"]
    records, num_rows = [], 0
    for record in (ShardRecord(**each) for each in index.manifest.details["shards"]):
        if num_rows < _MAX_TIMED_ROWS:
            records.append(record)
            num_rows += record.num_vectors
    parts = [read_words(folder, each.name, sha256s[each.name]) for each in records]
    doc_ids = [read_ids(folder, each)[0] for each in records]
    return {
        "encode_ms": 0.0,
        "search_ms": round(words_latency(parts, np.concatenate(doc_ids), texts), 2),
        "device": "cpu",
        "num_parameters": 0,
        "dimension": 0,
        "num_bytes": sum(words_file(folder, name).info().size or 0 for name in sha256s),
    }


def _in_memory(vectors: Artifact) -> tuple[list[str], NDArray[np.float32]]:
    """Read up to a million vectors, to time exact search. Larger corpora are not scanned one query at a time."""
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
    """Return a comparison (the content of `compare.json`) as a Markdown table."""
    header = [
        "retriever",
        *result["measures"],
        "difference",
        "p (Holm)",
        "ms a query",
        "dimension",
        "size",
        "parameters",
    ]
    rows = []
    for row in result["rows"]:
        against = row["comparison"]
        rows.append(
            [
                row["retriever"],
                *map(value, row["means"].values()),
                signed(against["difference"]) if against else "",
                p_value(against["p_holm"]) if against else "",
                f"{row['encode_ms']:.1f} + {row['search_ms']:.1f}",
                f"{row['dimension']:,}" if row["dimension"] else "",
                f"{row['num_bytes'] / 1e6:,.1f} MB",
                f"{row['num_parameters'] / 1e6:,.1f} M" if row["dimension"] else "",
            ]
        )
    title = f"{result['num_queries']:,} queries, {result['num_passages']:,} passages of {result['corpus']}"
    note = (
        f"Difference in {result['measures'][0]} from the first, paired randomisation test with Holm's correction; milliseconds "
        f"of encoding and of exact search on this machine, one query at a time, median; size of the vectors, and of the scores "
        f"of BM25 where it is searched."
    )
    return "\n".join(["# Retrievers", "", title, "", *markdown_table(header, rows), "", note]) + "\n"
