"""The search stage: search an index or vectors for queries, and write the results as a TREC run.

In: queries, the retriever that made the vectors, and an index or vectors. Out: one file `FILE.trec`. Ray tasks encode
the queries. Other tasks search one shard each for some thousands of queries. The row numbers that they find are merged,
with the same result as one index would give. Then their doc_ids are looked up and the lines written, before the next
queries are searched. Memory is a shard per task, and in the driver the queries and four million results.
"""

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from readapt_ray.artifacts import Artifact, Workspace, fingerprint, open_artifact, produce
from readapt_ray.catalog.encoding import EncodingOption
from readapt_ray.catalog.retriever_options import RetrieverOptions
from readapt_ray.cluster import connection, query_vectors
from readapt_ray.cluster.query_vectors import encode_queries
from readapt_ray.cluster.search_pieces import Content, Pieces, vector_pieces
from readapt_ray.config import OptionError, StageConfig
from readapt_ray.errors import CorpusError, InputError
from readapt_ray.filesystems import last_part
from readapt_ray.generations import with_folders
from readapt_ray.records import Query
from readapt_ray.retrieval.bridge import Bridge
from readapt_ray.retrieval.fusion import DEPTH, reciprocal_rank_fusion
from readapt_ray.retrieval.merged_rows import merge_rows, ordered_ties
from readapt_ray.retrieval.parents import counts_of, merged_to_documents, ranks
from readapt_ray.retrieval.query_encoder import QueryEncoder, query_encoder
from readapt_ray.sources.columns import ColumnsOption

logger = logging.getLogger("readapt_ray")

_HITS_PER_ROUND = 4_000_000
"""Results that are found, looked up and written at a time, before more queries are searched."""
_ENCODED_BYTES = 1 << 30
"""Most bytes of query vectors in memory. Queries are encoded in groups of this size, and each group loads the model."""
_PASSAGES_PER_DOCUMENT = 3
"""If documents were split: passages to search for per wanted document. Each further search is deeper by this factor."""
_DEEPEST = 100
"""Most passages to search for per wanted document, if documents were split."""


class SearchConfig(RetrieverOptions, StageConfig):
    """The options of `readapt search`. The output is one file whose name ends with `.trec`."""

    retriever: str = ""
    """Model that made the vectors, or a model only for queries that was made from it, or the new model of `bridge`: a
    catalog name, a folder, a URI or a hub id. Give this or domain."""
    index: str | None = None
    """Index to search: the output of `readapt index`. Give this or vectors."""
    vectors: str | None = None
    """Vectors to search exactly: the output of `readapt embed`. Give this or index."""
    root: str | None = None
    """Root of `readapt refresh`: search the index of its present generation, with its retriever. Other options that you
    give override these."""
    as_of: int | None = Field(default=None, ge=1)
    """Number of the generation of `root` to search. If omitted, the present one."""
    bridge: str | None = None
    """Output of `readapt bridge`, if the vectors were made by an older model: queries are mapped to them."""
    queries: str
    """Queries: a file (BEIR .jsonl, .csv, .tsv, .parquet, .json, .arrow), or a folder of such files."""
    qrels: str | None = None
    """File of judgements: only queries that it judges are searched. If omitted, all queries are searched."""
    columns: ColumnsOption = ()
    """Columns of queries and qrels, if they are not called as usual: query_id=key,query=question,doc_id=docno,relevance=grade."""
    mode: Literal["dense", "bm25", "hybrid"] = "dense"
    """Search by vectors, by words, or by both, fused by reciprocal rank. Words need an index that was built with bm25."""
    top_k: int = Field(default=100, ge=1)
    """Results per query; all passages if there are fewer."""
    drop_self_hits: bool = False
    """Leave out a result whose doc_id equals the query_id, as ArguAna and Quora are scored."""
    encoding: EncodingOption = None
    """JSON file with pooling, prompts and special tokens. If omitted, those that the vectors were made with."""
    batch_tokens: int | None = Field(default=None, ge=1)
    """Maximum tokens per batch of queries, padding included. If omitted, 1,024 on a CPU, and on a
    GPU by the model's size and the free memory."""

    inputs: ClassVar[frozenset[str]] = RetrieverOptions.names_of_retriever | frozenset(
        {"index", "vectors", "root", "as_of", "bridge", "queries", "qrels", "encoding"}
    )
    operational: ClassVar[frozenset[str]] = frozenset({"batch_tokens"})

    @model_validator(mode="before")
    @classmethod
    def _of_generation(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        wanted = [name for name, other in (("retriever", "domain"), ("index", "vectors")) if not values.get(other)]
        return with_folders(values, wanted)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.index is None) == (self.vectors is None):
            raise OptionError("give exactly one of {index} and {vectors}")
        if self.mode != "dense" and self.index is None:
            raise OptionError("{mode} = {value!r} needs an {index} that was built with bm25", value=self.mode)
        if not self.output.partition("?")[0].endswith(".trec"):
            raise OptionError(
                "{output} = {value!r}: the run is one file; its name must end with .trec", value=self.output
            )
        return self


@dataclass(frozen=True)
class _Source:
    """The index or the vectors that are searched."""

    artifact: Artifact

    @property
    def encoder(self) -> dict[str, Any]:
        return dict(self.artifact.manifest.details["encoder"])

    @property
    def words(self) -> dict[str, str]:
        """SHA-256 of the BM25 scores of each shard."""
        return dict(self.artifact.manifest.details.get("bm25", {}))

    @property
    def is_split(self) -> bool:
        """Whether ingest split documents into passages; results are then merged to documents."""
        return bool(self.artifact.manifest.details.get("is_split"))

    @property
    def truncation(self) -> dict[str, Any]:
        """What truncation cut from the passages when they were embedded; empty if not recorded."""
        return {name: value for name, value in self.artifact.manifest.details.items() if name == "truncation"}

    @property
    def num_vectors(self) -> int:
        return int(self.artifact.manifest.counts["num_vectors"])

    def pieces(self, num_at_once: int, *, on_gpus: bool) -> list[Content]:
        """Return what each task searches: the record of an index shard, or ranges of rows in files of vectors.

        Raises:
            CorruptFileError: a file of vectors was cut short or altered, or is missing.
        """
        if self.artifact.manifest.stage == "index":
            return list(self.artifact.manifest.details["shards"])
        return vector_pieces(self.artifact, num_at_once, on_gpus=on_gpus)


def search(config: SearchConfig) -> Artifact:
    """Search a corpus for queries and write the results as a TREC run, best first for each query.

    If ingest split documents, the results are documents, by their best passage. A killed run starts again. Does nothing
    if the output is complete and of the same options and inputs.

    Raises:
        ArtifactMissingError: the index or the vectors are not the output of their stage.
        FingerprintMismatchError: the vectors were made by another model or with another encoding, or the bridge is for
            other vectors.
        InputError: the mode needs BM25 and the index was built without it.
        CorpusError: there are no queries, or a row is not a query, or no query is judged.
        CorruptFileError: a shard was cut short or altered.
        ArtifactConflictError: the output holds something else, or a result of other options and `overwrite` is not set.
    """
    source = _Source(
        open_artifact(config.index, "index") if config.index else open_artifact(str(config.vectors), "embed")
    )
    model = config.open_retriever()
    bridge = Bridge.open(config.bridge) if config.bridge else None
    for_queries = query_encoder(model, source.artifact, encoding=config.encoding, bridge=bridge)
    if config.mode != "dense" and not source.words:
        raise InputError(
            f"mode = {config.mode!r}, but index {config.index!r} was built without BM25; build it with --bm25"
        )
    queries = _read_queries(config)

    def work(workspace: Workspace) -> None:
        if bridge is not None:
            bridge.warn_if_not_worth_it()
        num_results = _run(config, source, for_queries, queries, workspace=workspace)
        workspace.counts |= {"num_queries": len(queries), "num_results": num_results}
        workspace.details |= {"encoder": source.encoder, "num_vectors": source.num_vectors, **source.truncation}
        if for_queries.fingerprint != source.encoder["fingerprint"]:
            workspace.details["query_encoder"] = {
                **for_queries.description,
                "query_fingerprint": for_queries.fingerprint,
            }

    return produce(
        "search",
        config,
        inputs={
            "retriever": model.fingerprint,
            "encoding": fingerprint(for_queries.encoding.model_dump(mode="json")),
            **({"bridge": bridge.artifact.fingerprint} if bridge else {}),
            "index" if config.index else "vectors": source.artifact.fingerprint,
            "queries": fingerprint([list(query) for query in queries]),
        },
        work=work,
    )


def _read_queries(config: SearchConfig) -> list[Query]:
    from readapt_ray.sources.judgements import keep_judged, read_qrels, read_queries

    queries = read_queries(config.queries, config.columns)
    if config.qrels is None:
        return queries
    judged = keep_judged(queries, read_qrels(config.qrels, config.columns))
    if not judged:
        raise CorpusError(
            f"no query of {config.queries!r} is judged in {config.qrels!r}; give files that belong together"
        )
    return judged


def _run(
    config: SearchConfig,
    source: _Source,
    for_queries: QueryEncoder,
    queries: Sequence[Query],
    *,
    workspace: Workspace,
) -> int:
    """Encode the queries, search, merge and write; return the number of results."""
    from ray.exceptions import RayError

    from readapt_ray.evaluation.runs import write_tables

    if config.top_k > source.num_vectors:
        logger.info("top_k = %d is over the %d passages: each query gets all of them", config.top_k, source.num_vectors)
    num_results = 0

    def tables() -> Iterator[pa.Table]:
        nonlocal num_results
        searched = _pieces(source)
        depth = min(_depth(config) * (_PASSAGES_PER_DOCUMENT if source.is_split else 1), source.num_vectors)
        size = query_vectors.QUERIES_A_PIECE
        step = size * max(1, _HITS_PER_ROUND // max(1, depth * size))
        at_once = step * max(1, _ENCODED_BYTES // (step * 4 * int(source.encoder["dimension"])))
        for begin in range(0, len(queries), at_once):
            some = queries[begin : begin + at_once]
            progress = functools.partial(_tell_encoded, workspace, begin, len(queries))
            pieces = [] if config.mode == "bm25" else _encoded(config, for_queries, some, progress)
            for first in range(0, len(some), step):
                vectors = pieces[first // size : (first + step) // size]
                table = _found(config, source, searched, vectors, some[first : first + step])
                num_results += len(table)
                yield table

    tag = last_part(for_queries.model.name) + ("" if config.mode == "dense" else f"-{config.mode}")
    try:
        write_tables(workspace.location.uri, tables(), tag=tag)
    except RayError as error:
        raise connection.cause_of(error) from None
    return num_results


def _tell_encoded(workspace: Workspace, before: int, total: int, done: int, _: int) -> None:
    workspace.progress(before + done, total, unit="queries")


def _encoded(
    config: SearchConfig, for_queries: QueryEncoder, queries: Sequence[Query], progress: Callable[[int, int], None]
) -> list[Any]:
    return encode_queries(
        [query.text for query in queries],
        for_queries.model,
        for_queries.encoding,
        for_queries.description,
        bridge=for_queries.bridge,
        batch_tokens=config.batch_tokens,
        progress=progress,
    )


def _depth(config: SearchConfig) -> int:
    """Return how many results per query a search must give; at least a hundred if two searches are fused."""
    return config.drop_self_hits + (max(config.top_k, DEPTH) if config.mode == "hybrid" else config.top_k)


def _found(
    config: SearchConfig, source: _Source, searched: Pieces, vectors: Sequence[Any], queries: Sequence[Query]
) -> pa.Table:
    """Search for some queries in the mode of the config; return a table of query_id, doc_id, score."""
    find = _find_documents if source.is_split else _find
    found, words = [], functools.partial(searched.search_words, [query.text for query in queries], source.words)
    if config.mode != "bm25":
        found.append(find(config, source, searched, functools.partial(searched.search, vectors), queries))
    if config.mode != "dense":
        found.append(find(config, source, searched, words, queries))
    return found[0] if len(found) == 1 else _fused(found, queries, config.top_k)


_Search = Callable[[int], Iterator[tuple[np.ndarray, np.ndarray]]]
"""A function that searches every piece for a number of results per query."""


def _find(
    config: SearchConfig, source: _Source, searched: Pieces, search: _Search, queries: Sequence[Query]
) -> pa.Table:
    """Return the best passages of each query."""
    del source
    depth = _depth(config)
    table = _results(searched, search(depth), queries, depth)
    return _without_self(table, depth - 1) if config.drop_self_hits else table


def _find_documents(
    config: SearchConfig, source: _Source, searched: Pieces, search: _Search, queries: Sequence[Query]
) -> pa.Table:
    """Return the best documents of each query, ranked by best passage; search deeper until there are enough."""
    wanted = _depth(config)
    depth = min(_PASSAGES_PER_DOCUMENT * wanted, source.num_vectors)
    while True:
        passages = _results(searched, search(depth), queries, depth)
        table = merged_to_documents(passages, wanted)
        query_ids = [query.query_id for query in queries]
        lacking = (counts_of(table, query_ids) < wanted) & (counts_of(passages, query_ids) == depth)
        if depth == source.num_vectors or not lacking.any() or depth >= _DEEPEST * wanted:
            break
        depth = min(_PASSAGES_PER_DOCUMENT * depth, source.num_vectors)
    if lacking.any() and depth < source.num_vectors:
        logger.warning(
            "%d of %d queries found fewer than %d documents among their %d best passages",
            *(lacking.sum(), len(queries), wanted, depth),
        )
    return _without_self(table, wanted - 1) if config.drop_self_hits else table


def _fused(tables: Sequence[pa.Table], queries: Sequence[Query], top_k: int) -> pa.Table:
    """Fuse several result tables per query by reciprocal rank; rows are in the order of the queries."""
    rankings: list[dict[str, list[str]]] = []
    for table in tables:
        ranked: dict[str, list[str]] = {}
        for query_id, doc_id in zip(table["query_id"].to_pylist(), table["doc_id"].to_pylist(), strict=True):
            ranked.setdefault(query_id, []).append(doc_id)
        rankings.append(ranked)
    rows = [
        (query.query_id, doc_id, score)
        for query in queries
        for doc_id, score in reciprocal_rank_fusion([each.get(query.query_id, []) for each in rankings], top_k)
    ]
    columns = zip(*rows, strict=True) if rows else ([], [], [])
    kinds = (("query_id", pa.string()), ("doc_id", pa.string()), ("score", pa.float64()))
    return pa.table({name: pa.array(column, kind) for (name, kind), column in zip(kinds, columns, strict=True)})


def _pieces(source: _Source) -> Pieces:
    """Divide the index or the vectors into one piece per task."""
    total = connection.connect()
    on_gpus = bool(total.num_gpus) and source.artifact.manifest.stage == "embed"
    num_at_once = max(1, total.num_gpus if on_gpus else total.num_cpus)
    contents = source.pieces(num_at_once, on_gpus=on_gpus)
    return Pieces(source.artifact, contents, on_gpus=on_gpus, num_at_once=num_at_once)


def _results(
    searched: Pieces, parts: Iterator[tuple[np.ndarray, np.ndarray]], queries: Sequence[Query], depth: int
) -> pa.Table:
    """Merge the results of all pieces into a table of query_id, doc_id, score.

    Args:
        searched: the pieces of the index or of the vectors.
        parts: scores and row numbers [Q, K] that each piece found.
        queries: the Q queries.
        depth: results to keep per query.
    """
    best = merge_rows(parts, len(queries), depth)
    distinct, codes = np.unique(best.rows, return_inverse=True)
    names = searched.names(distinct)
    scores, codes = ordered_ties(best.scores, codes.reshape(best.rows.shape), names, depth)
    counted = scores > -np.inf
    owners = np.repeat(np.arange(len(queries)), counted.sum(axis=1))
    return pa.table(
        {
            "query_id": pa.array([query.query_id for query in queries], pa.string()).take(pa.array(owners)),
            "doc_id": names.take(pa.array(codes[counted])),
            "score": pa.array(scores[counted].astype(np.float64)),
        }
    )


def _without_self(table: pa.Table, top_k: int) -> pa.Table:
    """Drop results whose doc_id equals the query_id, then keep the `top_k` best of each query."""
    others = table.filter(pc.not_equal(table["doc_id"], table["query_id"]))
    return others.filter(pa.array(ranks(others) < top_k))
