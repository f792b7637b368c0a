"""Serve many domains with one encoder: what a gateway knows about each domain, and the rows that it sends.

The encoder does not know the domains. Each row of token ids says where the factors of its domain are, and gives their
fingerprint and scales. So rows of many domains share a batch, and gateways add and remove domains while it runs.
"""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from readapt_ray.errors import FingerprintMismatchError
from readapt_ray.retrieval.domain_encoder import domain_fingerprint
from readapt_ray.serving.doc_filter import DocFilter
from readapt_ray.serving.schema import RequestError, invalid
from readapt_ray.serving.versions import Backend, Found, LossPolicy, Version, VersionInfo
from readapt_ray.weights.domain_sources import DomainSource


class DomainRow(list[int]):
    """The token ids of a text, with the domain whose factors encode it and their scales."""

    def __init__(self, ids: Iterable[int], source: DomainSource, scales: tuple[float, ...]) -> None:
        super().__init__(ids)
        self.source = source
        self.scales = scales

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return DomainRow, (list(self), self.source, self.scales)


@dataclass(frozen=True, kw_only=True)
class DomainIndex:
    """Description of a domain's index, with which a gateway is configured."""

    app: str
    """Name of its Ray Serve application."""
    fingerprint: str
    """Fingerprint of encoder, index and corpus together."""
    encoder_fingerprint: str
    """Fingerprint of the encoder that made its vectors."""
    slices: Mapping[str, int]
    """Number of vectors in each part of the index, by the part's deployment."""
    has_words: bool
    """Whether the index has BM25 scores."""
    is_split: bool
    """Whether passages are parts of documents."""
    corpus: str | None
    """Folder or URI of its corpus; None without one."""
    corpus_fingerprint: str | None

    def described(self, info: VersionInfo) -> VersionInfo:
        """Return a copy of an encoder's description, with the fields of this index."""
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "app"}
        return replace(info, **own)


class Searcher(Protocol):
    """Interface of objects that search an index."""

    async def search(self, vectors: NDArray[np.float32], top_k: int, wanted: DocFilter | None) -> Found:
        """Find the k best passages of each query [Q, D] that pass the filter; None for no filter."""

    async def search_words(self, texts: Sequence[str], top_k: int, wanted: DocFilter | None) -> Found:
        """Find the k best passages of each text by BM25."""


class SharedEncoder(Backend, Protocol):
    """Interface of the version whose encoder all domains share."""

    async def prepare(self, source: DomainSource) -> None:
        """Load the factors of a domain into memory, unless they are there.

        Raises:
            DomainUnavailableError: its factors cannot be used.
        """


class DomainBackend:
    """One domain of a shared encoder, with the interface of a version.

    Args:
        shared: the version that encodes.
        source: where the domain's factors are.
        index: description of the domain's index; None without one.
        searcher: searches this index.

    Raises:
        FingerprintMismatchError: another encoder made the vectors of the index.
    """

    def __init__(
        self,
        shared: SharedEncoder,
        source: DomainSource,
        index: DomainIndex | None = None,
        searcher: Searcher | None = None,
    ) -> None:
        self.shared = shared
        self.source = source
        self._searcher = searcher or shared
        own = self.fingerprint_of(source.scales)
        scales = source.scales
        self.info: VersionInfo = replace(shared.info, fingerprint=own, encoder_fingerprint=own, knowledge_scales=scales)
        if index is not None:
            if index.encoder_fingerprint != own:
                raise FingerprintMismatchError(
                    f"the index of domain {source.name!r} has the vectors of another encoder ({index.encoder_fingerprint}) than "
                    f"the one that serves it ({own}): embed and index its corpus again with this server's encoding and dtype"
                )
            self.info = index.described(self.info)

    def fingerprint_of(self, scales: Sequence[float]) -> str:
        """Return the fingerprint of this domain's encoder with these scales of its adapters."""
        info = self.shared.info
        return domain_fingerprint(info.encoder_fingerprint, self.source, scales, info.encoding, info.dtype)

    async def encode(self, rows: list[Sequence[int]]) -> NDArray[np.float32]:
        """Return the vectors [N, D] of N rows, each encoded with the domain that the row names."""
        return await self.shared.encode(rows)

    async def search(self, vectors: NDArray[np.float32], top_k: int, wanted: DocFilter | None) -> Found:
        """Find the k best passages per query [Q, D] in this domain's index.

        Call it only if the domain has an index (`info.slices` is not empty).
        """
        return await self._searcher.search(vectors, top_k, wanted)

    async def search_words(self, texts: Sequence[str], top_k: int, wanted: DocFilter | None) -> Found:
        """Find the k best passages per text by BM25 in this domain's index.

        Call it only if the domain has an index with BM25 scores (`info.has_words`).
        """
        return await self._searcher.search_words(texts, top_k, wanted)

    async def check(self) -> float:
        """Check that the shared encoder answers; return the seconds that it took to encode.

        The domain's factors and index are not tested.
        """
        return await self.shared.check()

    async def num_reembedded(self) -> int | None:
        """Return None: the passages of a domain do not move to new vectors."""
        return None


def policy_of_domains(policy: LossPolicy) -> LossPolicy:
    """Return the policy for lost parts of a domain's index: `error` instead of `wait`; other policies are unchanged.

    Requests that wait for one domain would take the slots of other domains.
    """
    return policy if policy.lost_shards != "wait" else policy.model_copy(update={"lost_shards": "error"})


class DomainUnavailableError(Exception):
    """The factors of one domain cannot be used."""


def domain_down(error: DomainUnavailableError) -> RequestError:
    """Return the error for a request to a domain whose factors cannot be used.

    It has status 503, the code `domain_unavailable`, the message of `error`, and Retry-After 10 s.
    """
    return RequestError(str(error), status=503, code="domain_unavailable", retry_after_s=10)


def scales_of(backend: Backend, wanted: float | None, allowed: tuple[float, float] | None) -> tuple[float, ...]:
    """Return the scale of each knowledge adapter for a request; () for a version that is no domain.

    Args:
        backend: the domain or version that answers.
        wanted: scale that the request asks for, for all adapters; None for the ones that the domain is served with.
        allowed: smallest and largest scale that a request may ask for; None if requests cannot choose.

    Raises:
        RequestError: the request gives a scale that is not allowed, or asks for a version that is no domain.
    """
    if not isinstance(backend, DomainBackend):
        if wanted is not None:
            raise invalid("'knowledge_scale' is for domains, and this server has none", _SCALE)
        return ()
    if wanted is None:
        return backend.source.scales
    if allowed is None:
        raise invalid("'knowledge_scale' cannot be chosen here: start the server with --knowledge-scale", _SCALE)
    if not allowed[0] <= wanted <= allowed[1]:
        raise invalid(f"'knowledge_scale' is {wanted:g}; it may be from {allowed[0]:g} to {allowed[1]:g}", _SCALE)
    return (wanted,) * len(backend.source.scales)


def index_name_at_scale(
    versions: Mapping[str, Version], name: str, scales: Sequence[float], allowed: frozenset[str] | None
) -> str:
    """Return the name under which the index of a domain at these scales is served.

    It is `name` itself at the scales that the domain is served with; else another served domain with the same factors.

    Args:
        versions: all served versions.
        name: the domain that a request names. The name of a version that is no domain is returned unchanged.
        scales: scales that the request asks for.
        allowed: versions that the API key may use; None for all.

    Raises:
        RequestError: no index at these scales is served. Vectors of different scales cannot be compared.
    """
    asked = versions[name].backend
    if not isinstance(asked, DomainBackend) or tuple(scales) == asked.source.scales:
        return name
    wanted = asked.source.fingerprint, tuple(scales)
    for other, each in versions.items():
        its = each.backend.source if isinstance(each.backend, DomainBackend) else None
        if its is None or not each.info.slices or (its.fingerprint, its.scales) != wanted:
            continue
        if allowed is None or other in allowed:
            return other
    raise RequestError(
        f"no index of {name!r} has vectors at 'knowledge_scale' {scales[0]:g}, and vectors of other scales do not compare; serve one "
        f"beside it: NAME=FACTORS,knowledge_scale={scales[0]:g},index=INDEX",
        status=404,
        param=_SCALE,
        code="no_index",
    )


async def load_and_mark_rows(
    backend: Backend, rows: Sequence[Sequence[int]], scales: tuple[float, ...] | None = None
) -> Sequence[Sequence[int]]:
    """Load the factors of a domain, and return its rows as `DomainRow`; rows for a version are returned unchanged.

    Args:
        backend: the domain or the version.
        rows: token ids.
        scales: scales of the domain's adapters; None for the ones that it is served with.

    Raises:
        RequestError: the factors cannot be used.
    """
    if not isinstance(backend, DomainBackend):
        return rows
    try:
        await backend.shared.prepare(backend.source)
    except DomainUnavailableError as error:
        raise domain_down(error) from None
    return [DomainRow(row, backend.source, backend.source.scales if scales is None else scales) for row in rows]


def flow_of(backend: Backend) -> str | None:
    """Return the name of the flow that requests wait in: the domain's name, or None for a version."""
    return backend.source.name if isinstance(backend, DomainBackend) else None


class RequestSlots:
    """Limits the requests in progress per domain: a domain gets another slot only if it holds fewer than are free.

    So one busy domain takes half of the slots, two take a third each in the long run, and a domain without requests is
    refused only if all slots are taken. That takes at least log2(most + 1) busy domains, such as 10 for 512 slots.

    Args:
        most: number of slots: maximum number of requests in progress, of all domains together.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._held: Counter[str] = Counter()

    @contextlib.contextmanager
    def held_by(self, backend: Backend) -> Iterator[None]:
        """Hold a slot for a domain during the block; do nothing for a version that is no domain.

        Raises:
            RequestError: with status 429: the domain holds as many slots as are free.
        """
        name = flow_of(backend)
        if name is None:
            yield
            return
        if self._held[name] >= self._most - self._held.total():
            raise RequestError(
                f"{self._held[name]:,} requests for {name!r} are under way already, and {self._most:,} are shared by all domains; try "
                f"again after the seconds in Retry-After",
                status=429,
                code="too_many_requests",
                retry_after_s=1,
            )
        self._held[name] += 1
        try:
            yield
        finally:
            self._held[name] -= 1


def encoder_fingerprint_at(backend: Backend, scales: Sequence[float]) -> str:
    """Return the fingerprint of the encoder that makes vectors with these scales; a version that is no domain ignores
    the scales.
    """
    return backend.fingerprint_of(scales) if isinstance(backend, DomainBackend) else backend.info.encoder_fingerprint


_SCALE = "knowledge_scale"
