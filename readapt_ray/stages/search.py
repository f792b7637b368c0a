"""The search stage: queries and an index, or bare vectors, become a TREC run.

In: queries, the retriever that made the vectors, and an index or vectors. Out: one file
`FILE.trec`. Ray tasks encode the queries, others search a shard each for some thousands of queries, and the row numbers
that they find are merged into what one index would have given. Their doc_ids are looked up at the end, and the lines
written before the next queries are searched. Memory is a shard per task, and in the driver the queries and the results of
four million hits.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from readapt_ray.artifacts import Artifact, Workspace, fingerprint, open_artifact, produce
from readapt_ray.catalog.encoding import Encoding, EncodingOption
from readapt_ray.catalog.models import OpenModel, open_model
from readapt_ray.cluster import connection, on_worker
from readapt_ray.cluster.placement import Placement, place_actors
from readapt_ray.cluster.search_pieces import Content, Pieces
from readapt_ray.config import OptionError, StageConfig
from readapt_ray.errors import CorpusError, FingerprintMismatchError, ModelError
from readapt_ray.records import Query
from readapt_ray.retrieval.footers import check_complete, named_footers, row_counts
from readapt_ray.retrieval.merged_rows import cut_ties, merge_rows
from readapt_ray.retrieval.vector_files import SHARD_BYTES, cut

logger = logging.getLogger("readapt_ray")

_QUERIES_A_PIECE = 512
_HITS_A_ROUND = 4_000_000
"""Results that are searched, looked up and written before the next queries have their turn."""


class SearchConfig(StageConfig):
    """The options of `readapt search`. The output is one file whose name ends with `.trec`."""

    retriever: str
    """Model that made the vectors: a catalog name, a folder, a URI or a hub id."""
    index: str | None = None
    """Index to search: the output of `readapt index`. Give this or vectors."""
    vectors: str | None = None
    """Vectors to search exactly: the output of `readapt embed`. Give this or index."""
    queries: str
    """Queries: a file (BEIR .jsonl, .tsv, .parquet), or a folder of such files."""
    qrels: str | None = None
    """File of judgements: only queries that are judged in it are searched. If omitted, all queries are."""
    top_k: int = Field(default=100, ge=1)
    """Results per query; all passages if there are fewer."""
    drop_self_hits: bool = False
    """Leave out a result whose doc_id equals the query_id, as ArguAna and Quora are scored."""
    encoding: EncodingOption = None
    """JSON file with pooling, prompts and special tokens. If omitted, those that the vectors were made with."""
    batch_tokens: int | None = Field(default=None, ge=1)
    """Maximum tokens per batch of queries, padding included. If omitted, it depends on the device."""

    inputs: ClassVar[frozenset[str]] = frozenset({"retriever", "index", "vectors", "queries", "qrels", "encoding"})
    operational: ClassVar[frozenset[str]] = frozenset({"batch_tokens"})

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.index is None) == (self.vectors is None):
            raise OptionError("give exactly one of {index} and {vectors}")
        if not self.output.partition("?")[0].endswith(".trec"):
            raise OptionError(
                "{output} = {value!r}: the run is one file; its name must end with .trec", value=self.output
            )
        return self


@dataclass(frozen=True)
class _Source:
    """What is searched: the shards of an index, or ranges of vector files."""

    artifact: Artifact

    @property
    def encoder(self) -> dict[str, Any]:
        return dict(self.artifact.manifest.details["encoder"])

    @property
    def num_vectors(self) -> int:
        return int(self.artifact.manifest.counts["num_vectors"])

    def pieces(self, num_cpus: int) -> list[Content]:
        """What each task searches: the record of an index shard, or ranges of rows.

        Raises:
            CorruptFileError: a file of vectors was cut short or altered, or is gone.
        """
        if self.artifact.manifest.stage == "index":
            return list(self.artifact.manifest.details["shards"])
        counts = row_counts(named_footers(self.artifact.location / "vectors"))
        check_complete(self.artifact, sum(count for _, count in counts), "vectors")
        most = max(1, SHARD_BYTES // (4 * int(self.encoder["dimension"])))
        even = -(-self.num_vectors // num_cpus)
        return [tuple(each) for each in cut(counts, min(most, even))]


def search(config: SearchConfig) -> Artifact:
    """Search a corpus for queries.

    Raises:
        ArtifactMissingError: the index or the vectors are not the output of their stage.
        FingerprintMismatchError: they were made by another model, or with another encoding.
        CorpusError: there are no queries, or a row is not one.
        CorruptFileError: a shard was cut short or altered.
    """
    source = _Source(
        open_artifact(config.index, "index") if config.index else open_artifact(str(config.vectors), "embed")
    )
    model = open_model(config.retriever)
    encoding = config.encoding or Encoding.parse(source.encoder["encoding"], where=source.artifact.uri)
    check_encoder(model, encoding, source.artifact)
    queries = _read_queries(config)

    def work(workspace: Workspace) -> None:
        num_results = _run(config, model, source, encoding, queries, workspace=workspace)
        workspace.counts |= {"num_queries": len(queries), "num_results": num_results}
        workspace.details |= {"encoder": source.encoder, "num_vectors": source.num_vectors}

    return produce(
        "search",
        config,
        inputs={
            "retriever": model.fingerprint,
            "encoding": fingerprint(encoding.model_dump(mode="json")),
            "index" if config.index else "vectors": source.artifact.fingerprint,
            "queries": fingerprint([list(query) for query in queries]),
        },
        work=work,
    )


def check_encoder(model: OpenModel, encoding: Encoding, made: Artifact) -> None:
    """Refuse vectors, or an index of them, that this model with this encoding would not have made.

    Raises:
        FingerprintMismatchError: another model or encoding made them.
    """
    from readapt_ray.retrieval.encoder import encoder_fingerprint

    recorded = made.manifest.details["encoder"]
    if encoder_fingerprint(model, encoding, recorded["dtype"]) == recorded["fingerprint"]:
        return
    wanted = encoding.model_dump(mode="json")
    differing = [
        f"{name} is {recorded['encoding'].get(name)!r} there and {value!r} here"
        for name, value in wanted.items()
        if recorded["encoding"].get(name) != value
    ]
    what = (
        "; ".join(differing) or f"the weights, tokenizer or configuration are not those of {recorded['model']!r} then"
    )
    raise FingerprintMismatchError(
        f"{made.uri!r} was not made by {model.name!r} as it is now: {what}; search with the model and encoding "
        f"that made it, or run `readapt embed` with this one into another output"
    )


def _read_queries(config: SearchConfig) -> list[Query]:
    from readapt_ray.sources.judgements import keep_judged, read_qrels, read_queries

    queries = read_queries(config.queries)
    if config.qrels is None:
        return queries
    judged = keep_judged(queries, read_qrels(config.qrels))
    if not judged:
        raise CorpusError(
            f"no query of {config.queries!r} is judged in {config.qrels!r}; give files that belong together"
        )
    return judged


def _run(
    config: SearchConfig,
    model: OpenModel,
    source: _Source,
    encoding: Encoding,
    queries: Sequence[Query],
    *,
    workspace: Workspace,
) -> int:
    """Encode, search, merge, write; the number of results."""
    from ray.exceptions import RayError

    from readapt_ray.evaluation.runs import write_tables

    if config.top_k > source.num_vectors:
        logger.info("top_k = %d is over the %d passages: each query gets all of them", config.top_k, source.num_vectors)
    num_results = 0

    def tables() -> Iterator[pa.Table]:
        nonlocal num_results
        pieces = _encode_queries(config, model, source, encoding, queries, workspace=workspace)
        searched = _pieces(source)
        depth = min(config.top_k + config.drop_self_hits, source.num_vectors)
        size = max(1, _HITS_A_ROUND // max(1, depth * _QUERIES_A_PIECE))
        for first in range(0, len(pieces), size):
            asked = queries[first * _QUERIES_A_PIECE : (first + size) * _QUERIES_A_PIECE]
            table = _results(config, searched, pieces[first : first + size], asked)
            num_results += len(table)
            yield table

    tag = config.retriever.rstrip("/").rsplit("/", 1)[-1]
    try:
        write_tables(workspace.location.uri, tables(), tag=tag)
    except RayError as error:
        raise connection.cause_of(error) from None
    return num_results


def _pieces(source: _Source) -> Pieces:
    """Cut what is searched into a piece per task; footers of vectors are read here, once."""
    total = connection.connect()
    on_gpus = bool(total.num_gpus) and source.artifact.manifest.stage == "embed"
    num_at_once = max(1, total.num_gpus if on_gpus else total.num_cpus)
    return Pieces(source.artifact, source.pieces(num_at_once), on_gpus=on_gpus, num_at_once=num_at_once)


def _results(config: SearchConfig, searched: Pieces, vectors: Sequence[Any], queries: Sequence[Query]) -> pa.Table:
    """Return what some queries find: query_id, doc_id, score.

    Args:
        searched: the pieces of the index or of the vectors.
        vectors: Ray's references to pieces of the queries' vectors.
        queries: the queries.
    """
    depth = config.top_k + config.drop_self_hits
    best = merge_rows(searched.search(vectors, depth), len(queries), depth)
    distinct, codes = np.unique(best.rows, return_inverse=True)
    names = searched.names(distinct)
    scores, codes = cut_ties(best.scores, codes.reshape(best.rows.shape), names, depth)
    counted = scores > -np.inf
    owners = np.repeat(np.arange(len(queries)), counted.sum(axis=1))
    query_ids = pa.array([query.query_id for query in queries], pa.string()).take(pa.array(owners))
    table = pa.table(
        {
            "query_id": query_ids,
            "doc_id": names.take(pa.array(codes[counted])),
            "score": pa.array(scores[counted].astype(np.float64)),
        }
    )
    if not config.drop_self_hits:
        return table
    others = pc.not_equal(table["doc_id"], table["query_id"]).to_numpy()
    before = np.concatenate([[0], np.cumsum(others)])
    starts = np.searchsorted(owners, owners)
    places = before[1:] - before[starts]  # from 1 on, among the kept ones of the same query
    return table.filter(pa.array(others & (places <= config.top_k)))


def _encode_queries(
    config: SearchConfig,
    model: OpenModel,
    source: _Source,
    encoding: Encoding,
    queries: Sequence[Query],
    *,
    workspace: Workspace,
) -> list[Any]:
    """Return references to float32 [512, D] each: vectors do not depend on the number of tasks, one per GPU or core."""
    import ray

    texts = [query.text for query in queries]
    pieces = [texts[first : first + _QUERIES_A_PIECE] for first in range(0, len(texts), _QUERIES_A_PIECE)]
    num_tasks, num_cpus, num_gpus = place_actors(Placement(None, None), len(pieces))
    task = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, num_returns="streaming")(_encoded)
    streams = [
        task.remote(
            pieces[number::num_tasks],
            retriever=on_worker.model_name(model),
            encoding=encoding,
            encoder=source.encoder,
            driver_node=on_worker.this_node(),
            batch_tokens=config.batch_tokens,
            num_threads=num_cpus,
        )
        for number in range(num_tasks)
    ]
    found: list[Any] = []
    done = 0
    workspace.progress(done, len(texts), unit="queries")
    try:
        for number in range(len(pieces)):
            found.append(next(streams[number % num_tasks]))
            done += len(ray.get(found[-1]))
            workspace.progress(done, len(texts), unit="queries")
    finally:
        for stream in streams:
            ray.cancel(stream)
    return found


def _encoded(
    pieces: Sequence[Sequence[str]],
    *,
    retriever: str,
    encoding: Encoding,
    encoder: dict[str, Any],
    driver_node: str,
    batch_tokens: int | None,
    num_threads: int,
) -> Iterator[np.ndarray]:
    """On a worker: the vectors of each piece's queries."""
    loaded = on_worker.load_encoder(
        retriever,
        encoding,
        encoder["dtype"],
        due=encoder["fingerprint"],
        driver_node=driver_node,
        num_threads=num_threads,
        batch_tokens=batch_tokens,
    )
    for piece in pieces:
        vectors = loaded.encode(piece, "query")
        broken = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(broken):
            raise ModelError(
                f"the model gives NaN or infinity for the query {piece[broken[0]]!r} in {encoder['dtype']}; make vectors and "
                f"run in bfloat16 or float32 (`readapt embed --dtype`), or leave the query out"
            )
        yield vectors
