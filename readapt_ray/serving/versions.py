"""Describe the served versions, choose the version that answers a request, and split searches among versions.

A version is an encoder and the index of the vectors that it made. One fingerprint identifies both. Each call carries
the fingerprint of the version that it is meant for, and a process that holds another version refuses the call. So a
query is never searched in the index of another encoder, not even during an update.
"""

import asyncio
import hashlib
import heapq
import itertools
import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from readapt_ray.catalog.encoding import Encoding
from readapt_ray.config import Config
from readapt_ray.errors import InputError
from readapt_ray.retrieval.passage_store import PassageStore
from readapt_ray.serving import schema
from readapt_ray.serving.batching import Batcher
from readapt_ray.serving.doc_filter import DocFilter
from readapt_ray.serving.request_tokens import InputTokenizer
from readapt_ray.serving.schema import RequestError

R = TypeVar("R")


class Ranked(NamedTuple):
    """A search result: the id of a passage, and its score; higher is better."""

    doc_id: str
    score: float


@dataclass(frozen=True)
class Found:
    """The passages found for each query, best first, and the parts of the index that did not answer."""

    ranked: list[list[Ranked]]
    missing: list[str]


@dataclass(frozen=True, kw_only=True)
class VersionInfo:
    """The description of a version, as its running encoder reports it."""

    fingerprint: str
    """Fingerprint of encoder, index and corpus together."""
    encoder_fingerprint: str
    encoding: Encoding
    dtype: str = "float32"
    """Data type that the model computes in."""
    tokenizer: Any
    """The transformers tokenizer."""
    dimension: int
    batch_tokens: int
    num_slots: int
    """Number of batches that its replicas can encode at once."""
    tokens_per_s: float = 0.0
    """Tokens per second of one replica, measured with a large batch when it started; 0 if unknown."""
    passages_by: str = ""
    """Name of the model that encoded the passages, if this version encodes only queries (it has a bridge, or a model
    for queries); else empty."""
    slices: Mapping[str, int] = field(default_factory=dict)
    """Number of vectors in each part of its index, by the name of the part; empty without an index."""
    is_moving: bool = False
    """Whether its passages move from old vectors, searched through a bridge, to new ones while it is served."""
    knowledge_scales: tuple[float, ...] = ()
    """Scale of each knowledge adapter of a domain; empty if this is no domain."""
    has_words: bool = False
    """Whether its index has BM25 scores."""
    is_split: bool = False
    """Whether passages are parts of documents; a search then returns documents."""
    corpus: str | None = None
    """Folder or URI with the titles and texts of its passages; None without them."""
    corpus_fingerprint: str | None = None
    """Fingerprint of that corpus. It shows whether another corpus has been put at the same place."""
    created: int = 0
    """Unix time in seconds at which the encoder started."""
    matryoshka: bool = False
    """Whether the model's config says that it was trained for fewer dimensions."""
    processes: Mapping[str, Any] = field(default_factory=dict)
    """Options of its processes, such as the number of replicas."""

    @property
    def num_vectors(self) -> int:
        """Count the vectors in the whole index."""
        return sum(self.slices.values())


class PartsDownError(Exception):
    """Some processes of a version do not answer, or fail."""

    def __init__(self, causes: Mapping[str, str]) -> None:
        super().__init__(f"not working: {'; '.join(f'{name} ({cause})' for name, cause in causes.items())}")


class Backend(Protocol):
    """Interface to the encoder and the index of a version, which are on Ray Serve, or in this process for a test."""

    info: VersionInfo

    async def encode(self, rows: list[Sequence[int]]) -> NDArray[np.float32]:
        """Return the vectors [N, D] of N rows of token ids."""

    async def search(self, vectors: NDArray[np.float32], top_k: int, wanted: DocFilter | None) -> Found:
        """Find the k best passages of each query [Q, D], best first; with a filter, of those that pass it."""

    async def search_words(self, texts: Sequence[str], top_k: int, wanted: DocFilter | None) -> Found:
        """Find the k best passages of each text by BM25, best first; with a filter, of those that pass it."""

    async def check(self) -> float:
        """Test encoder and index by encoding and searching; return the seconds that the encoder took.

        Raises:
            Exception: a part does not work.
        """

    async def num_reembedded(self) -> int | None:
        """Count the passages that have moved to new vectors; None if passages of this version do not move."""


@dataclass(frozen=True)
class Version:
    """What a gateway holds of one version: encoder and index, tokenizer, queue and passage texts."""

    backend: Backend
    tokenizer: InputTokenizer
    batcher: Batcher
    store: PassageStore | None
    """Titles and texts of its corpus; None without a corpus."""

    @property
    def info(self) -> VersionInfo:
        """Return what the encoder reports about this version."""
        return self.backend.info


class LossPolicy(Config):
    """What to do when a part of the index is lost."""

    lost_shards: Literal["wait", "partial", "error"] = "wait"
    """What to do when a part of the index does not answer: wait for its replacement until the request's time is up,
    answer without it and say so, or return an error."""
    shard_timeout_s: float = Field(default=2.0, gt=0)
    """Seconds until a part of the index counts as lost. Unused if `lost_shards` is wait."""


class SideOptions(Config):
    """Options of extra searches that no client waits for: by a shadow version, and to measure recall."""

    shadow: str = ""
    """Version that also searches, unseen by clients; metrics say how far it agrees. Set it to try a version on real
    traffic."""
    shadow_share: float = Field(default=1.0, ge=0, le=1)
    """Share of searches that the shadow also gets. Lower it if the shadow takes too much of the machine."""
    recall_probe: float = Field(default=0.0, ge=0, le=1)
    """Share of searches that are repeated by exact search after the answer, one at a time. Metrics say how many of the
    10 best passages the index had found. The index must hold its float32 vectors (--storage float32; ivf-pq and rabitq
    with --refine)."""


class Routing(SideOptions):
    """Which versions answer the requests that name none. An update replaces the whole routing between two requests."""

    default: str
    """Version that answers embedding requests, and searches if `split` is empty."""
    split: dict[str, float] = Field(default_factory=dict)
    """Weight of each version among the searches that name none. If empty, the default version answers all of them."""

    @model_validator(mode="after")
    def _weights_are_positive(self) -> Self:
        if self.split and (min(self.split.values()) < 0 or sum(self.split.values()) <= 0):
            raise ValueError("the weights of a split must be 0 or more, and one of them over 0")
        return self

    def check(self, names: Iterable[str]) -> None:
        """Check that every version in this routing is served.

        Raises:
            InputError: a version is not in `names`.
        """
        used = [("default", self.default), ("shadow", self.shadow), *(("split", each) for each in self.split)]
        for option, name in used:
            if name and name not in names:
                raise InputError(f"{option} names {name!r}, which is not served; the versions are {shortened(names)}")

    def among(self, names: Collection[str]) -> "Routing":
        """Return a copy whose split and shadow have only versions in `names`; the default stays as it is."""
        split = {name: weight for name, weight in self.split.items() if name in names and weight}
        return self.model_copy(update={"split": split, "shadow": self.shadow if self.shadow in names else ""})

    def choose_version(self, user: str | None) -> str:
        """Choose the version for a search that names none: always the same per user; without a user at random."""
        if not self.split:
            return self.default
        place = _place(user) if user else random.random()
        total = sum(self.split.values())
        for name, weight in self.split.items():
            place -= weight / total
            if place < 0:
                return name
        return max(self.split, key=self.split.__getitem__)

    def draw_probe(self) -> bool:
        """Decide at random whether a search is repeated by exact search, to measure recall."""
        return random.random() < self.recall_probe

    def draw_shadow(self, answered_by: str) -> str | None:
        """Decide at random whether the shadow version repeats a search; return its name, or None."""
        if self.shadow and self.shadow != answered_by and random.random() < self.shadow_share:
            return self.shadow
        return None


def parse_split(entries: tuple[str, ...]) -> dict[str, float]:
    """Parse `("base=0.1", "adapted=0.9")` into weights by version name, unchecked; the last of a repeated name wins.

    Raises:
        InputError: an entry is not NAME=WEIGHT.
    """
    split = {}
    for entry in entries:
        name, _, weight = entry.partition("=")
        try:
            split[name] = float(weight)
        except ValueError:
            raise InputError(f"split entry {entry!r} is not NAME=WEIGHT, such as adapted=0.9") from None
    return split


def _place(user: str) -> float:
    """Hash a user to a number in [0, 1)."""
    return int.from_bytes(hashlib.sha256(user.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64


INLINE_HITS = 500
"""Maximum number of hits that are handled in the event loop; more are handled in a thread."""
_NUM_NAMED = 10
SUFFIXES: dict[schema.Kind, str] = {"query": "", "passage": "-passage", "raw": "-raw"}
"""Suffixes of a version's name that say the kind of text, for clients that can choose only a model."""


@dataclass(frozen=True)
class Registry:
    """The served versions by name, and the routing. An update replaces both at once."""

    versions: Mapping[str, Version] = field(default_factory=dict)
    routing: Routing = field(default_factory=lambda: Routing(default=""))
    missing: Mapping[str, str] = field(default_factory=dict)
    """Reason for each version that should be served and is not up, by name."""

    def models(self, allowed: frozenset[str] | None = None) -> schema.ModelList:
        """List the versions for each kind of text, the default first; with `allowed`, only those in it."""
        names = sorted(
            (each for each in self.versions if allowed is None or each in allowed),
            key=lambda name: name != self.routing.default,
        )
        data = [
            self._described(name, kind)
            for name in names
            for kind in SUFFIXES
            if kind != "passage" or not self.versions[name].info.passages_by
        ]
        return schema.ModelList(data=[each for each in data if each.id == each.version or each.id not in self.versions])

    def model(self, model: str, allowed: frozenset[str] | None = None) -> schema.ServedModel:
        """Describe the version of this name, for the kind of text that the suffix of the name says.

        Raises:
            RequestError: no version has this name, it is not in `allowed`, or it is not up.
        """
        name, _, kind = self.resolve_model(model, allowed)
        return self._described(name, kind)

    def _described(self, name: str, kind: schema.Kind) -> schema.ServedModel:
        info, store = self.versions[name].info, self.versions[name].store
        return schema.ServedModel(
            id=name + SUFFIXES[kind],
            created=info.created,
            default=name == self.routing.default and kind == "query",
            version=name,
            input_type=kind,
            dimension=info.dimension,
            matryoshka=info.matryoshka,
            fingerprint=info.fingerprint,
            encoder_fingerprint=info.encoder_fingerprint,
            passages_by=info.passages_by,
            knowledge_scales=list(info.knowledge_scales),
            num_vectors=info.num_vectors,
            columns=dict(store.columns) if store and info.num_vectors else {},
            modes=_modes(info),
            **{each: getattr(info.encoding, each) for each in schema.SHOWN_OF_ENCODING},
        )

    def resolve_model(
        self, model: str | None, allowed: frozenset[str] | None = None
    ) -> tuple[str, Version, schema.Kind]:
        """Return the name, the version and the kind of text that a model name of a request means.

        Args:
            model: name with or without suffix, such as `adapted-passage`; None or `default` for the default version.
            allowed: versions that the API key may use; None for all. Errors name no others.

        Raises:
            RequestError: no version has this name, it is not in `allowed`, or it is not up.
        """
        asked, kind = self._without_suffix(model or schema.DEFAULT_MODEL)
        name = self.routing.default if asked == schema.DEFAULT_MODEL and asked not in self.versions else asked
        if allowed is not None and name not in allowed:
            message = f"no model {asked[:200]!r} for this API key; it has {shortened(map(repr, sorted(allowed)))}"
            raise RequestError(message, status=404, param="model", code="model_not_found")
        if name in self.versions:
            return name, self.versions[name], kind
        if name in self.missing:
            message = f"version {name!r} is not up: {self.missing[name]}; try again, or ask another version"
            raise RequestError(message, status=503, code="version_down", retry_after_s=1)
        if not self.versions:
            raise RequestError("no version is up yet; try again soon", status=503, retry_after_s=1)
        known = shortened([repr(each) for each in self.versions])
        message = f"no model {name[:200]!r} here; this server has {known}"
        raise RequestError(message, status=404, param="model", code="model_not_found")

    def _without_suffix(self, model: str) -> tuple[str, schema.Kind]:
        for kind, suffix in SUFFIXES.items():
            if suffix and model.endswith(suffix) and model not in self.versions:
                return model.removesuffix(suffix), kind
        return model, "query"

    def for_search(self, body: schema.SearchRequest, allowed: frozenset[str] | None = None) -> tuple[str, Version]:
        """Return name and version that answer a search: what it names, or what the split chooses among `allowed`.

        A search by vectors is answered only by a version whose encoder made the vectors.

        Raises:
            RequestError: there is no such version, it is not in `allowed`, or its encoder did not make the vectors.
        """
        if body.vector is None:
            return self.resolve_model(body.model or self._chosen(body.user, allowed), allowed)[:2]
        made_by = [
            name
            for name, each in self.versions.items()
            if each.info.encoder_fingerprint == body.fingerprint and (allowed is None or name in allowed)
        ]
        if body.model:
            name, *_ = self.resolve_model(body.model, allowed)
            made_by = [each for each in made_by if each == name]
        if not made_by:
            raise RequestError(
                "the vectors were not made by this model: its 'encoder_fingerprint' in /v1/models is not the 'fingerprint' "
                "that came with them",
                param="fingerprint",
                code="fingerprint_mismatch",
            )
        chosen = self.routing.among(made_by).choose_version(body.user)
        return self.resolve_model(chosen if chosen in made_by else made_by[0])[:2]

    def _chosen(self, user: str | None, allowed: frozenset[str] | None) -> str | None:
        """Return the version that the split chooses among `allowed`; None if the default is not in it."""
        routing = self.routing if allowed is None else self.routing.among(allowed)
        name = routing.choose_version(user)
        return name if allowed is None or name in allowed else None


def shortened(names: Iterable[str]) -> str:
    """Join names by commas; of more than ten, show the first ten and the number of the others."""
    listed = list(names)
    more = f" and {len(listed) - _NUM_NAMED:,} more" if len(listed) > _NUM_NAMED else ""
    return ", ".join(listed[:_NUM_NAMED]) + more


def _modes(info: VersionInfo) -> list[schema.Mode]:
    """Return the modes in which a version can be searched."""
    if not info.slices:
        return []
    return ["dense", "bm25", "hybrid"] if info.has_words else ["dense"]


async def in_thread_if_large(num_hits: int, function: Callable[..., R], *given: Any) -> R:
    """Call a function; in a thread if it handles over 500 hits, which would block the event loop."""
    return function(*given) if num_hits <= INLINE_HITS else await asyncio.to_thread(function, *given)


def merge_ranked(parts: Sequence[Sequence[Sequence[Ranked]]], num_queries: int, top_k: int) -> list[list[Ranked]]:
    """Merge the results of all parts of an index, each per query and best first, into the k best, ties by doc_id."""
    return [
        list(itertools.islice(heapq.merge(*(part[query] for part in parts), key=_best_first), top_k))
        for query in range(num_queries)
    ]


def _best_first(each: Ranked) -> tuple[float, str]:
    return -each.score, each.doc_id
