"""The search stage: queries and an index, or bare vectors, become a TREC run.

In: queries, the retriever that made the vectors, and an index or vectors. Out: one file
`FILE.trec`. Ray tasks encode the queries, others search a shard each, and their findings are
merged into what one index would have given. Memory is a shard a task, and the run in the driver.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from readapt_ray.artifacts import Artifact, Workspace, fingerprint, open_artifact, produce
from readapt_ray.catalog.encoding import Encoding, EncodingOption
from readapt_ray.catalog.models import OpenModel, open_model
from readapt_ray.cluster import connection, on_worker
from readapt_ray.cluster.bounded_tasks import run_bounded
from readapt_ray.cluster.placement import Placement, place_actors
from readapt_ray.config import OptionError, StageConfig
from readapt_ray.errors import CorpusError, FingerprintMismatchError, ModelError
from readapt_ray.records import Query, ScoredDoc
from readapt_ray.retrieval.footers import check_complete, named_footers, row_counts
from readapt_ray.retrieval.vector_files import SHARD_BYTES, RowRange, cut, iterate_vectors
from readapt_ray.storage import Location

logger = logging.getLogger("readapt_ray")

_QUERIES_A_PIECE = 512


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

    def pieces(self, num_cpus: int) -> list[tuple[RowRange, ...] | dict[str, Any]]:
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
    _check_encoder(model, encoding, source)
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


def _check_encoder(model: OpenModel, encoding: Encoding, source: _Source) -> None:
    """Refuse vectors that this model with this encoding would not have made."""
    from readapt_ray.retrieval.encoder import encoder_fingerprint

    recorded = source.encoder
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
        f"{source.artifact.uri!r} was not made by {model.name!r} as it is now: {what}; search with the model and encoding "
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

    from readapt_ray.evaluation.runs import write_run
    from readapt_ray.retrieval.exact import TopK

    if config.top_k > source.num_vectors:
        logger.info("top_k = %d is over the %d passages: each query gets all of them", config.top_k, source.num_vectors)
    depth = config.top_k + config.drop_self_hits
    best = TopK(len(queries), depth)
    try:
        vectors = _encode_queries(config, model, source, encoding, queries, workspace=workspace)
        for scores, doc_ids in _search_pieces(source, vectors, depth):
            best.merge(scores, doc_ids)
    except RayError as error:
        raise connection.cause_of(error) from None
    hits = best.hits()
    results: list[ScoredDoc] = []
    for index, query in enumerate(queries):
        found = hits.of_query(index, query.query_id)
        if config.drop_self_hits:
            found = [doc for doc in found if doc.doc_id != query.query_id]
        results.extend(found[: config.top_k])
    write_run(workspace.location.uri, results, tag=config.retriever.rstrip("/").rsplit("/", 1)[-1])
    return len(results)


def _encode_queries(
    config: SearchConfig,
    model: OpenModel,
    source: _Source,
    encoding: Encoding,
    queries: Sequence[Query],
    *,
    workspace: Workspace,
) -> np.ndarray:
    """float32 [Q, D]. Pieces of one size, a task for each GPU or core: vectors do not depend on how many there are."""
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
    found: list[np.ndarray] = []
    done = 0
    workspace.progress(done, len(texts), unit="queries")
    try:
        for number in range(len(pieces)):
            found.append(ray.get(next(streams[number % num_tasks])))
            done += len(found[-1])
            workspace.progress(done, len(texts), unit="queries")
    finally:
        for stream in streams:
            ray.cancel(stream)
    return np.concatenate(found)


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


def _search_pieces(source: _Source, queries: np.ndarray, top_k: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What each task found: scores and doc_ids [Q, K], in the order in which tasks end."""
    import ray

    total = connection.connect()
    on_gpus = bool(total.num_gpus) and source.artifact.manifest.stage == "embed"
    room = max(1, total.num_gpus if on_gpus else total.num_cpus)
    shared = ray.put(queries)
    task = ray.remote(num_cpus=1, num_gpus=1 if on_gpus else 0)(_search_piece)
    place = on_worker.absolute(source.artifact.location)
    device = "cuda" if on_gpus else "cpu"
    found = run_bounded(
        lambda piece: task.remote(place, piece, shared, top_k, device), source.pieces(room), num_at_once=room
    )
    for scores, codes, doc_ids in found:
        yield scores, np.array(doc_ids.to_pylist(), object)[codes]


def _search_piece(
    artifact: Location, piece: tuple[RowRange, ...] | dict[str, Any], queries: np.ndarray, top_k: int, device: str
) -> tuple[np.ndarray, np.ndarray, pa.Array]:
    """On a worker: an index shard in FAISS, or ranges of vectors streamed through exact search on a device.

    Returns:
        Scores [Q, K], and for each the place of its doc_id among the distinct ones: 8 bytes a hit travel, however long
        the ids are.
    """
    if isinstance(piece, dict):
        on_worker.faiss_on_threads(1)
        from readapt_ray.retrieval.index_files import ShardRecord, read_shard

        hits = read_shard(artifact / "shards", ShardRecord(**piece)).search(queries, top_k)
    else:
        import torch

        from readapt_ray.retrieval.exact import search_exact

        torch.set_num_threads(1)
        hits = search_exact(queries, iterate_vectors(artifact / "vectors", piece), top_k, device=device)
    distinct = pa.array(hits.doc_ids.ravel(), pa.string()).dictionary_encode(null_encoding="encode")
    return hits.scores, distinct.indices.to_numpy().reshape(hits.doc_ids.shape), distinct.dictionary
