"""The synthesize stage: let a language model write queries for passages, as training pairs for a corpus without labels.

In: passages, and a causal language model, on this cluster or behind an OpenAI-compatible endpoint. Out: `queries/` and
`qrels/train.parquet`, on which `finetune` trains and `tune` chooses scales; and `answers/part-00000.parquet` and so on,
with the model's answers and the reason if an answer gave no query. With vectors, a query is kept only if a search with
it finds its passage (round trip). A killed run resumes: passages with an answer are not asked again.
"""

import logging
from typing import Any, ClassVar, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from readapt_ray.artifacts import Artifact, Workspace, open_artifact, produce
from readapt_ray.catalog.models import OpenModel, open_model
from readapt_ray.catalog.shapes import objective_of
from readapt_ray.cluster import on_worker, query_writing
from readapt_ray.cluster.encoding_dtype import encoding_dtype
from readapt_ray.cluster.query_writing import WritingJob
from readapt_ray.cluster.round_trip import find_passages
from readapt_ray.config import OptionError, StageConfig, UsedWith
from readapt_ray.errors import CorpusError, FingerprintMismatchError, InputError, ModelError
from readapt_ray.progress import amount
from readapt_ray.records import QREL_SCHEMA, QUERY_SCHEMA
from readapt_ray.retrieval.footers import open_passages
from readapt_ray.seeds import random_generator
from readapt_ray.storage import Location
from readapt_ray.synthesis.endpoint import EndpointWriter, check_endpoint
from readapt_ray.synthesis.prompts import DEFAULT_PROMPT, PASSAGE_FIELD
from readapt_ray.synthesis.query_filter import REASONS

logger = logging.getLogger("readapt_ray")

PREFIX = "synthetic:"
_MIN_KEPT = 0.1


class SynthesizeConfig(StageConfig):
    """The options of `readapt synthesize`."""

    corpus: str
    """Passages: the output of `readapt ingest`."""
    model: str
    """Causal language model that writes the queries, such as an instruct model: a folder, a URI or a hub id. With
    endpoint, the name that the endpoint knows it by."""
    endpoint: str | None = None
    """URL of an OpenAI-compatible endpoint, such as http://HOST:8000/v1. Its key is read from $READAPT_ENDPOINT_KEY. If
    omitted, the model is loaded by Ray tasks, one per GPU."""
    num_passages: int = Field(default=4000, ge=1)
    """Maximum number of passages to write queries for, drawn at random."""
    queries_per_passage: int = Field(default=1, ge=1, le=16)
    """Queries to ask for per passage."""
    vectors: str | None = None
    """Vectors of the corpus: the output of `readapt embed`. A query is kept only if a search among them finds its
    passage. If omitted, queries are not tested by searching."""
    round_trip_k: int = Field(default=20, ge=1)
    """With vectors: a query's passage must be among this number of best results."""
    prompt: str = DEFAULT_PROMPT
    """Prompt for the model; title and text replace {passage}."""
    max_passage_chars: int = Field(default=2000, ge=80)
    """Characters of a passage that the model reads; the rest is cut."""
    max_query_tokens: int = Field(default=48, ge=4)
    """Maximum tokens of an answer."""
    temperature: float = Field(default=0.7, ge=0, le=2)
    """Temperature of the sampling; 0 takes the likeliest token each time."""
    budget_tokens: int | None = Field(default=None, ge=1)
    """Maximum tokens of prompts and answers at an endpoint; a request that may exceed it is not sent. The queries so far
    are then kept, and the same command with a larger budget asks for the rest. If omitted, there is no limit."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Data type that the model computes in; auto is bfloat16 on GPUs and on CPUs with AMX or AVX512_BF16, else
    float32."""
    num_requests: int = Field(default=8, ge=1)
    """Maximum number of requests to an endpoint at the same time."""
    timeout_s: float = Field(default=120.0, gt=0)
    """Seconds that one request to an endpoint may take."""
    seed: int = Field(default=0, ge=0)
    """Random seed of the choice of passages and of the sampling."""

    inputs: ClassVar[frozenset[str]] = frozenset({"corpus", "model", "vectors"})
    operational: ClassVar[frozenset[str]] = frozenset({"num_requests", "timeout_s"})
    may_change: ClassVar[frozenset[str]] = frozenset({"budget_tokens"})
    used_with: ClassVar[UsedWith] = {
        "round_trip_k": ("vectors", ()),
        **dict.fromkeys(("budget_tokens", "num_requests", "timeout_s"), ("endpoint", ())),
    }

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if PASSAGE_FIELD not in self.prompt:
            raise OptionError("{prompt} = {value!r} has no {{passage}} for the text of the passage", value=self.prompt)
        if self.endpoint is not None:
            try:
                check_endpoint(self.endpoint)
            except ValueError as error:
                raise OptionError("{endpoint}: {what}", what=str(error)) from None
            if self.dtype != "auto":
                raise OptionError("{dtype} is for a model that is loaded here; an {endpoint} has its own")
        return self


def synthesize(config: SynthesizeConfig) -> Artifact:
    """Write queries for a random sample of passages with a language model, as pairs to train or tune on.

    Passages that have answers are not asked again when a stopped run resumes. If `budget_tokens` is spent, the queries
    so far make a complete output; the same command with a larger budget continues it.

    Raises:
        ArtifactMissingError: the corpus or the vectors are not the output of their stage.
        CorpusError: no answer gave a usable query.
        FingerprintMismatchError: the vectors belong to another corpus.
        InputError: the endpoint refuses the key, the model or the request.
        ModelError: the model cannot be found, or is an adapter or a masked language model.
        WorkerError: the endpoint cannot be reached, or tasks died repeatedly; answers so far are kept.
        ArtifactConflictError: the output holds something else, or a result of other options and `overwrite` is not set.
    """
    corpus = open_artifact(config.corpus, "ingest")
    vectors = None if config.vectors is None else open_artifact(config.vectors, "embed")
    if vectors is not None and vectors.manifest.inputs["corpus"] != corpus.fingerprint:
        raise FingerprintMismatchError(
            f"{config.vectors!r} are not vectors of the corpus {config.corpus!r} as it is now; embed it, or leave them out"
        )
    model = None
    if config.endpoint is None:
        model = _open_writer(config.model)
        config = config.model_copy(update={"dtype": encoding_dtype(config, config.dtype)})
    inputs = {"corpus": corpus.fingerprint, "model": model.fingerprint if model else config.model}
    if vectors is not None:
        inputs["vectors"] = vectors.fingerprint
    return produce(
        "synthesize",
        config,
        inputs=inputs,
        work=lambda workspace: _synthesize(config, corpus, model, vectors, workspace),
    )


def _open_writer(name: str) -> OpenModel:
    model = open_model(name)
    if model.is_adapter:
        raise ModelError(f"{name!r} is an adapter; give a whole model (readapt merge makes one)")
    if objective_of(model.config) == "masked_lm":
        raise ModelError(
            f"{name!r} is a masked language model; give a causal language model, such as an instruct model"
        )
    return model


def _synthesize(
    config: SynthesizeConfig, corpus: Artifact, model: OpenModel | None, vectors: Artifact | None, workspace: Workspace
) -> None:
    job = _plan(config, corpus, workspace)

    def report(num_done: int) -> None:
        workspace.progress(num_done, len(job.rows), unit="passages")

    report(0)
    is_whole = True
    if model is not None:
        query_writing.ask_on_ray(job, model, dtype=config.dtype, report=report)
    elif job.missing():
        writer = EndpointWriter(
            str(config.endpoint), config.model, timeout_s=config.timeout_s, num_at_once=config.num_requests
        )
        is_whole = query_writing.ask_here(job, writer, budget_tokens=config.budget_tokens, report=report)
    answers = query_writing.read_answers(job)
    kept, reasons = _chosen(answers, vectors, config.round_trip_k, workspace)
    if not len(kept):
        if not len(answers):
            raise InputError(f"budget_tokens = {config.budget_tokens:,} has no room for a request; give more")
        raise CorpusError(
            f"model {config.model!r} wrote no query that can be used: {_told(reasons)}; {_advice(reasons)}, and see the answers in "
            f"{job.answers}"
        )
    _write(kept, workspace)
    workspace.counts |= {
        "num_passages": len(pc.unique(answers["doc_id"])),
        "num_answers": len(answers),
        "num_queries": len(kept),
        "num_tokens": int(np.sum(answers["num_tokens"].to_numpy())),
    }
    workspace.details |= {"left_out": reasons, "is_budget_spent": not is_whole}
    _log_result(config, workspace, len(job.rows))


def _plan(config: SynthesizeConfig, corpus: Artifact, workspace: Workspace) -> WritingJob:
    passages = open_passages(on_worker.absolute(corpus.location / "passages"), corpus, config.corpus)
    random = random_generator(config.seed, "synthesized passages")
    size = min(config.num_passages, passages.num_rows)
    return WritingJob(
        passages=passages,
        rows=np.sort(random.choice(passages.num_rows, size, replace=False, shuffle=False)),
        answers=on_worker.absolute(workspace.location / "answers"),
        prompt=config.prompt,
        queries_per_passage=config.queries_per_passage,
        max_passage_chars=config.max_passage_chars,
        temperature=config.temperature,
        max_query_tokens=config.max_query_tokens,
        seed=config.seed,
    )


def _chosen(
    answers: pa.Table, vectors: Artifact | None, round_trip_k: int, workspace: Workspace
) -> tuple[list[tuple[str, str, str]], dict[str, int]]:
    """Return query_id, doc_id and text of each query to keep, and the number of dropped answers by reason."""
    reasons = dict.fromkeys(REASONS, 0)
    kept, known, numbers = [], set(), dict[str, int]()
    columns = (answers[name].to_pylist() for name in ("doc_id", "query", "reason"))
    for doc_id, query, fault in zip(*columns, strict=True):
        reason = "repeated" if not fault and query.lower() in known else fault
        if reason:
            reasons[reason] += 1
            continue
        known.add(query.lower())
        numbers[doc_id] = numbers.get(doc_id, 0) + 1
        kept.append((f"{PREFIX}{doc_id}:{numbers[doc_id]}", doc_id, query))
    if vectors is not None:
        texts, doc_ids = [query for _, _, query in kept], [doc_id for _, doc_id, _ in kept]
        found = find_passages(
            texts,
            doc_ids,
            vectors,
            round_trip_k,
            progress=lambda done, total: workspace.progress(done, total, unit="queries tried"),
        )
        reasons["not_found"] = int((~found).sum())
        kept = [each for each, is_found in zip(kept, found, strict=True) if is_found]
    return kept, {name: count for name, count in reasons.items() if count}


def _write(kept: list[tuple[str, str, str]], workspace: Workspace) -> None:
    tables: dict[str, tuple[pa.Schema, dict[str, list[Any]]]] = {
        "queries/part-00000.parquet": (
            QUERY_SCHEMA,
            {"query_id": [each[0] for each in kept], "text": [each[2] for each in kept]},
        ),
        "qrels/train.parquet": (
            QREL_SCHEMA,
            {
                "query_id": [each[0] for each in kept],
                "doc_id": [each[1] for each in kept],
                "relevance": [1] * len(kept),
            },
        ),
    }
    for name, (schema, columns) in tables.items():
        with (workspace.location / name).open_output() as stream:
            pq.write_table(pa.table(columns, schema=schema), stream, compression="zstd")


def _told(reasons: dict[str, int]) -> str:
    return "; ".join(f"{count:,} {REASONS[name]}" for name, count in reasons.items()) or "none was asked for"


def _advice(reasons: dict[str, int]) -> str:
    """Say what may give more queries."""
    thinks = "a larger max_query_tokens if the model thinks before it answers, " if reasons.get("empty") else ""
    return f"try {thinks}an instruct model or another prompt"


def _log_result(config: SynthesizeConfig, workspace: Workspace, num_wanted: int) -> None:
    counts = workspace.counts
    left_out = workspace.details["left_out"]
    logger.info(
        "synthesize: %s from %s%s",
        amount(counts["num_queries"], "queries"),
        amount(counts["num_answers"], "answers"),
        f"; left out: {_told(left_out)}" if left_out else "",
    )
    if workspace.details["is_budget_spent"]:
        logger.warning(
            "synthesize: the budget of %s tokens was spent after %s of %s passages; run it again with a larger budget to continue",
            f"{config.budget_tokens:,}",
            f"{counts['num_passages']:,}",
            f"{num_wanted:,}",
        )
    if counts["num_queries"] < _MIN_KEPT * counts["num_answers"]:
        logger.warning(
            "synthesize: under a tenth of the answers gave a query; read some in %s, and %s",
            Location(config.output) / "answers",
            _advice(left_out),
        )
