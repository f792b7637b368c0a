"""Define the Ray Serve deployments of a version that compute: its encoder, and the slices of its index.

A health check does real work. The encoder encodes a fixed sentence and compares the vector with the one that it made at
its start. A slice searches for a vector. After three failed checks Ray Serve replaces the process. If a check waits
behind other work, the process counts as healthy until that work has taken five minutes.
"""

import functools
import logging
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from ray import serve

from readapt_ray.artifacts import open_artifact
from readapt_ray.catalog.models import OpenModel, open_model
from readapt_ray.catalog.query_models import passages_model
from readapt_ray.cluster import on_worker
from readapt_ray.cluster.nodes import cores_per_process
from readapt_ray.errors import FingerprintMismatchError, ModelError, WorkerError
from readapt_ray.quick_imports import import_for_models
from readapt_ray.retrieval.bridge import Bridge
from readapt_ray.retrieval.domain_encoder import DomainEncoder
from readapt_ray.serving.compute_thread import ComputeThread, set_faiss_threads, set_torch_threads
from readapt_ray.serving.doc_filter import DocFilter
from readapt_ray.serving.domains import DomainRow, DomainUnavailableError
from readapt_ray.serving.resident_domains import ResidentDomains
from readapt_ray.serving.search_batches import MAX_QUERIES, SearchBatches
from readapt_ray.serving.version_spec import VersionSpec
from readapt_ray.serving.versions import Ranked, VersionInfo
from readapt_ray.storage import Location
from readapt_ray.weights.domain_sources import DomainSource, check_domains, read_domains

if TYPE_CHECKING:
    from readapt_ray.retrieval.encoder import Encoder
    from readapt_ray.retrieval.exact import Hits
    from readapt_ray.serving.moving_slice import MovingSlice

logger = logging.getLogger("ray.serve")

_PROBE = "Is this encoder well?"
_MIN_COSINE = 0.99
_TIMED_S = 5.0
"""Approximate maximum duration of the batch that is timed at the start, in seconds."""
_TIMED_TOKENS = 32
"""Number of tokens in each row of that batch."""


@serve.deployment
class EncoderReplica:
    """A process that holds the retriever of a version and encodes texts.

    Args:
        spec: what the version consists of.
        slices: handles of the deployments that hold its index. They are bound here so that they start and stop with it.
    """

    def __init__(self, spec: VersionSpec, *_slices: Any) -> None:
        import_for_models(freeze=True)
        on_worker.check_gpus()
        self._spec = spec
        self._model = open_model(spec.retriever) if not spec.base else open_first_readable(spec.bundles)
        self._compute = ComputeThread(
            functools.partial(set_torch_threads, spec.num_threads or cores_per_process(spec.num_slots))
        )
        self._domains: ResidentDomains | None = None
        if spec.base:
            loaded = self._compute.wait_for(_domain_encoder, spec, self._model)
            self._encoder, self._domains = loaded.encoder, ResidentDomains(loaded, self._compute)
        else:
            self._encoder = self._compute.wait_for(_encoder, spec, self._model)
        if spec.encoder_fingerprint not in (None, self._encoder.fingerprint):
            raise FingerprintMismatchError(
                f"{spec.retriever!r} has other weights on this node than what made the index {spec.index!r}; "
                f"put the same files on all nodes, or give a URI"
            )
        # If passages move to new vectors, the slices apply the bridge; the encoder returns the new model's vectors.
        self._bridge = None if spec.bridge is None or spec.new_vectors else Bridge.open(spec.bridge)
        if self._bridge is not None and self._bridge.artifact.fingerprint != spec.bridge_fingerprint:
            raise FingerprintMismatchError(f"bridge {spec.bridge!r} is not the one that this version was set up with")
        self._passages_by = self._bridge.old_encoder["model"] if self._bridge else _passages_by(self._model)
        self._fingerprint = spec.fingerprint(self._encoder.fingerprint)
        self._probe_ids = self._encoder.tokenize([_PROBE], "query")
        self._probe_vector = self._compute.wait_for(self._encoder.encode_ids, self._probe_ids)[0]
        self._check_probe(self._probe_vector)
        self._tokens_per_s = self._compute.wait_for(tokens_per_s, self._encoder, self._probe_ids[0])
        self._created = int(time.time())

    async def describe(self) -> VersionInfo:
        """Return what gateways need to know about this version: fingerprints, encoding, tokenizer, slices, corpus."""
        config = self._model.config
        return VersionInfo(
            fingerprint=self._fingerprint,
            encoder_fingerprint=self._bridge.query_fingerprint if self._bridge else self._encoder.fingerprint,
            passages_by=self._passages_by,
            encoding=self._encoder.encoding,
            dtype=self._spec.dtype,
            tokenizer=self._model.tokenizer,
            dimension=int(self._bridge.old_encoder["dimension"]) if self._bridge else self._encoder.dimension,
            batch_tokens=self._encoder.batch_tokens,
            num_slots=self._spec.num_slots,
            tokens_per_s=self._tokens_per_s,
            slices=self._spec.slices,
            is_moving=bool(self._spec.new_vectors),
            has_words=self._spec.has_words,
            is_split=self._spec.is_split,
            corpus=self._spec.corpus,
            corpus_fingerprint=self._spec.corpus_fingerprint,
            created=self._created,
            matryoshka=bool(config.get("is_matryoshka") or config.get("matryoshka_dimensions")),
            processes=self._spec.processes,
        )

    async def encode(self, version: str, rows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Return the vectors [N, D] of rows of token ids; with domains, each row must be a `DomainRow`.

        Args:
            version: fingerprint of the version that the caller means.
            rows: token ids, with template and special tokens.

        Raises:
            FingerprintMismatchError: the rows are meant for another version.
            DomainUnavailableError: the factors of a row's domain cannot be used.
        """
        _check_fingerprint(version, self._fingerprint)
        if self._domains is not None:
            return await self._domains.encode([row for row in rows if isinstance(row, DomainRow)])
        return await self._compute(self._encoded, rows)

    async def prepare(self, version: str, source: DomainSource) -> str:
        """Load the factors of a domain into memory; return why they cannot be used, or "" if they can.

        Call it only if this version has domains.

        Raises:
            FingerprintMismatchError: the call is meant for another version.
        """
        _check_fingerprint(version, self._fingerprint)
        assert self._domains is not None
        try:
            await self._domains.domain(source)
        except DomainUnavailableError as error:
            return str(error)
        return ""

    def _encoded(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        vectors = self._encoder.encode_ids(rows)
        return self._bridge.query_map(vectors) if self._bridge else vectors

    async def check(self, version: str) -> float:
        """Encode a fixed sentence; return the seconds that it took, with the wait for the batch before it.

        Raises:
            FingerprintMismatchError: the call is meant for another version.
            WorkerError: the vector differs from the one at the start.
        """
        _check_fingerprint(version, self._fingerprint)
        before_s = time.perf_counter()
        self._check_probe((await self._compute(self._encoder.encode_ids, self._probe_ids))[0])
        return time.perf_counter() - before_s

    async def check_health(self) -> None:
        """Check this process for Ray Serve, which replaces it when the check fails."""
        await self._compute.check(functools.partial(self.check, self._fingerprint))

    def _check_probe(self, vector: NDArray[np.float32]) -> None:
        norms = float(np.linalg.norm(vector)) * float(np.linalg.norm(self._probe_vector))
        cosine = float(vector @ self._probe_vector) / norms if norms else 0.0
        if not cosine >= _MIN_COSINE:
            raise WorkerError(
                f"the encoder's vector of a fixed sentence is off: cosine {cosine:.4f} with the first one"
            )


@serve.deployment
class IndexReplica:
    """A process that holds some shards of a version's index and searches them.

    Args:
        spec: what the version consists of.
        names: names of the shards.
        num_slices: number of slices of the index, which share the CPU cores of a node.
        others: handles of the other slices, if there is no encoder: all must be bound to one root deployment.
    """

    def __init__(self, spec: VersionSpec, names: Sequence[str], num_slices: int, *others: Any) -> None:
        del others
        from readapt_ray.retrieval.vector_index import VectorIndex
        from readapt_ray.serving.index_slice import IndexSlice
        from readapt_ray.serving.new_vectors import follow

        self._compute = ComputeThread(functools.partial(set_faiss_threads, cores_per_process(num_slices)))
        index = VectorIndex.open(str(spec.index))
        if (index.artifact.fingerprint, index.encoder["fingerprint"]) != (
            spec.index_fingerprint,
            spec.index_encoder,
        ):
            raise FingerprintMismatchError(f"index {spec.index!r} is not the one that this version was set up with")
        records = [record for record in index.records if record.name in names]
        device = "cuda" if on_worker.check_gpus() else None
        load = functools.partial(IndexSlice, is_split=spec.is_split, device=device)
        base = self._compute.wait_for(load, index.folder, records, _passage_files(spec), index.words)
        self._slice: IndexSlice | MovingSlice = base
        self._probe = np.ones((1, int(index.encoder["dimension"])), np.float32)
        if spec.new_vectors is not None:
            number = [record.name for record in index.records].index(names[0])
            self._slice, self._follower = follow(base, spec, index, number, self._compute.wait_for)
            self._probe = np.ones((1, self._slice.dimension), np.float32)
        self._search = SearchBatches(functools.partial(self._compute, self._slice.search))
        self._fingerprint = spec.fingerprint(str(spec.encoder_fingerprint))

    async def search(
        self, version: str, queries: NDArray[np.float32], top_k: int, wanted: DocFilter | None
    ) -> list[list[Ranked]]:
        """Return the k best passages per query [Q, D], best first; only those that pass the filter, if there is one.

        Raises:
            FingerprintMismatchError: the queries are meant for another version.
            InputError: the index cannot be filtered, or lacks a column of the filter.
        """
        from readapt_ray.retrieval.exact import joined

        _check_fingerprint(version, self._fingerprint)
        if wanted is None:
            hits = await self._search(queries, top_k)
        else:
            pieces = [queries[first : first + MAX_QUERIES] for first in range(0, len(queries), MAX_QUERIES)]
            hits = joined([await self._in_turns(self._slice.scan(each, top_k, wanted)) for each in pieces])
        return _ranked(hits)

    async def search_words(
        self, version: str, texts: Sequence[str], top_k: int, wanted: DocFilter | None
    ) -> list[list[Ranked]]:
        """Return the k best passages per text by BM25, best first; only those that pass the filter, if there is one.

        Raises:
            FingerprintMismatchError: the texts are meant for another version.
            InputError: the corpus lacks a column of the filter, or there is no corpus.
        """
        _check_fingerprint(version, self._fingerprint)
        return _ranked(await self._in_turns(self._slice.search_words(texts, top_k, wanted)))

    async def _in_turns(self, steps: Iterator["Hits | None"]) -> "Hits":
        """Search step by step: other searches run between two steps, and a cancelled request stops at the next one."""
        hits: Hits | None = None
        while hits is None:
            hits = await self._compute(next, steps)
        return hits

    async def check(self, version: str) -> int:
        """Search for a fixed vector; return the number of vectors in this slice, without deleted ones.

        Raises:
            FingerprintMismatchError: the call is meant for another version.
        """
        _check_fingerprint(version, self._fingerprint)
        if self._slice.num_vectors:
            await self._compute(self._slice.search, self._probe, 1)
        return self._slice.num_vectors

    async def num_reembedded(self, version: str) -> int:
        """Count the passages of this replica's slice that are searched by new vectors; 0 if passages do not move.

        Args:
            version: fingerprint of the version that the caller means.

        Raises:
            FingerprintMismatchError: the call is meant for another version.
        """
        _check_fingerprint(version, self._fingerprint)
        return getattr(self._slice, "num_reembedded", 0)

    async def check_health(self) -> None:
        """Check this process for Ray Serve, which replaces it when the check fails."""
        await self._compute.check(functools.partial(self.check, self._fingerprint))


def _encoder(spec: VersionSpec, model: OpenModel) -> "Encoder":
    from readapt_ray.retrieval.encoder import Encoder

    # Queries are short and differ in length, so without packing half of a batch would be padding.
    return Encoder.load(
        model,
        encoding=spec.encoding,
        dtype=spec.dtype,
        batch_tokens=spec.batch_tokens,
        packed=True,
        gpu_share=on_worker.gpu_share(),
    )


def tokens_per_s(encoder: "Encoder", ids: Sequence[int]) -> float:
    """Measure the throughput of an encoder in tokens per second, on a full batch or on one of about five seconds.

    Args:
        encoder: it must be warm, that is, have encoded something before.
        ids: token ids of a text, from which the rows of the batch are drawn.
    """
    before_s = time.perf_counter()
    encoder.encode_ids([ids])
    num_tokens = int(_TIMED_S * len(ids) / (time.perf_counter() - before_s))
    length = min(_TIMED_TOKENS, encoder.encoding.max_query_tokens)
    num_rows = max(1, min(num_tokens, encoder.batch_tokens) // length)
    # The encoder encodes equal rows only once, so make all rows different.
    rows = np.random.default_rng(0).choice(np.asarray(ids), (num_rows, length)).tolist()
    before_s = time.perf_counter()
    encoder.encode_ids(rows)
    return num_rows * length / (time.perf_counter() - before_s)


def _domain_encoder(spec: VersionSpec, bundle: OpenModel) -> DomainEncoder:
    (record,) = read_domains({bundle.name: bundle.name})
    base = open_model(spec.base)
    check_domains([record], base)
    return DomainEncoder(
        bundle,
        base,
        retriever_fingerprint=record.retriever_fingerprint,
        dtype=spec.dtype,
        max_bytes=spec.max_domain_bytes,
        encoding=spec.encoding,
        batch_tokens=spec.batch_tokens,
        gpu_share=on_worker.gpu_share(),
    )


def open_first_readable(bundles: Sequence[str]) -> OpenModel:
    """Open the first bundle that can be opened, and log why the ones before it cannot.

    Args:
        bundles: folders or URIs of factors (outputs of `readapt merge --factors`), at least one.

    Raises:
        ModelError: none can be opened; the error is about the last one.
    """
    for bundle in bundles[:-1]:
        try:
            return open_model(bundle)
        except ModelError as error:
            logger.warning("the retriever is not read from %s: %s", bundle, error)
    return open_model(bundles[-1])


def _passages_by(model: OpenModel) -> str:
    """Return the name of the model that encodes the passages, if this one encodes only queries; else ""."""
    passages = passages_model(model)
    return passages.name if passages else ""


def _ranked(hits: "Hits") -> list[list[Ranked]]:
    return [[Ranked(doc.doc_id, doc.score) for doc in hits.of_query(query, "")] for query in range(len(hits.scores))]


def _passage_files(spec: VersionSpec) -> list[Location]:
    """List the files with the passages of the version's corpus; none without a corpus."""
    if spec.corpus is None:
        return []
    corpus = open_artifact(spec.corpus, "ingest")
    if corpus.fingerprint != spec.corpus_fingerprint:
        raise FingerprintMismatchError(f"corpus {spec.corpus!r} is not the one that this version was set up with")
    return (corpus.location / "passages").files(".parquet")


def _check_fingerprint(meant: str, held: str) -> None:
    if meant != held:
        raise FingerprintMismatchError(f"meant for version {meant}, but this process holds {held}")
