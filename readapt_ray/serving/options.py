"""Define the options of `readapt serve`: one version, or several side by side, and how requests are routed to them."""

import ipaddress
import itertools
import math
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from readapt_ray.catalog.encoding import EncodingOption
from readapt_ray.config import Config, OptionError
from readapt_ray.filesystems import last_part
from readapt_ray.generations import with_folders
from readapt_ray.serving.domain_options import VERSION_NAME, DomainOptions, parse_domains, parse_scales
from readapt_ray.serving.versions import SUFFIXES, LossPolicy, Routing, SideOptions, parse_split
from readapt_ray.storage import Location
from readapt_ray.yaml_files import options_of, read_yaml


def _checked_scales(text: str | None) -> str | None:
    parse_scales(text)
    return text


class Limits(Config):
    """Limits per request and per gateway."""

    batch_wait_s: float = Field(default=0.0, ge=0, le=10)
    """Seconds that an incomplete batch waits for more texts while the encoder is free. Raise it to get larger batches
    at the cost of latency. While the encoder is busy, texts gather anyway."""
    max_requests: int = Field(default=256, ge=1)
    """Maximum number of requests in progress per gateway. Above it the answer is 429. One domain may have at most as
    many as are free, which is half if no other domain is busy."""
    max_queued_tokens: int = Field(default=1 << 20, ge=1)
    """Maximum number of tokens that wait per version and gateway. Above it the answer is 429. Lower it to refuse early
    instead of answering late. One domain may have at most as many as are free, which is half if no other is busy."""
    max_body_bytes: int = Field(default=16 << 20, ge=1024)
    """Maximum size of a request in bytes. Above it the answer is 413."""
    max_inputs: int = Field(default=2048, ge=1, le=2048)
    """Maximum number of texts per request."""
    truncate: bool = False
    """Cut texts that are too long, unless the request says `"truncate": false`. Without it they are refused. Set it for
    clients that cannot ask for it."""
    accept_token_ids: bool = False
    """Accept token ids in place of texts. Only ids of the model's own tokenizer give the right vectors. OpenAI's ids,
    which LangChain sends by default, mean other texts here and give wrong vectors."""
    knowledge_scale: Annotated[str | None, AfterValidator(_checked_scales)] = None
    """Range of scales that a request for a domain may ask for by `knowledge_scale`, such as 0.0..1.0. If omitted,
    requests cannot choose, and each domain has the scale that it was merged with, or its own `knowledge_scale`."""
    timeout_s: float = Field(default=60.0, gt=0)
    """Seconds until a request is given up with 504. A request can ask for less. Raise it if clients send many texts per
    request to a slow encoder."""

    @property
    def knowledge_scales(self) -> tuple[float, float] | None:
        """Return the smallest and the largest scale that a request may ask for; None if requests cannot choose."""
        return parse_scales(self.knowledge_scale)


class VersionConfig(Config):
    """Options of one version: an encoder with its index, and their processes."""

    retriever: str = ""
    """Model to serve: a catalog name, a folder, a GGUF file, a URI or a hub id. Required, unless `versions` lists
    several."""
    index: str | None = None
    """Output folder of `readapt index`, with vectors of this retriever (with `bridge`, of an older model). If omitted,
    there is no search."""
    bridge: str | None = None
    """Output folder of `readapt bridge`, if an older model made the vectors of the index. Such a version encodes only
    queries."""
    new_vectors: str | None = None
    """Output folder of `readapt embed` for this retriever, finished or still running. As its files appear, their
    passages are searched by these vectors, and no longer by old vectors through the `bridge`."""
    corpus: str | None = None
    """Output folder of `readapt ingest`. If omitted, search results have no titles and texts."""
    encoding: EncodingOption = None
    """JSON file with prompts, special tokens, pooling and maximum lengths of the retriever. If omitted, they are read
    from the index, or from the model's folder."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Data type that the model computes in. It must be the type that the index was made with. If omitted, that type, or
    float32 without an index."""
    batch_tokens: int | None = Field(default=None, ge=1)
    """Maximum number of tokens per batch. If omitted, 1,024 on a CPU, and on a GPU by the model's size and the free
    memory. Lower it if a GPU runs out of memory."""
    num_replicas: int = Field(default=1, ge=1)
    """Number of encoder processes; with `max_replicas`, the minimum. Raise it for more requests per second."""
    max_replicas: int | None = Field(default=None, ge=1)
    """Maximum number of encoder processes. Ray Serve starts more while batches wait, and stops them again. If omitted,
    `num_replicas`."""
    num_cpus_per_replica: float = Field(default=0.5, ge=0)
    """CPUs that Ray reserves per encoder process. `num_threads` sets how many threads it uses."""
    num_gpus_per_replica: float | None = Field(default=None, ge=0)
    """GPUs that Ray reserves per encoder process; 0.25 puts four on one GPU. If omitted, 1 if the cluster has GPUs,
    else 0."""
    num_threads: int | None = Field(default=None, ge=1)
    """CPU threads per encoder process. If omitted, its share of this machine's CPUs. Lower it if other work runs
    there."""
    index_actors: int = Field(default=1, ge=1)
    """Number of processes that share the shards of the index. Raise it if the index does not fit one machine's
    memory."""
    index_replicas: int = Field(default=1, ge=1)
    """Number of copies of each index process; with `max_index_replicas`, the minimum. With 2 or more, searches continue
    when one dies."""
    max_index_replicas: int | None = Field(default=None, ge=1)
    """Maximum number of copies of each index process. Ray Serve starts more while searches wait, and stops them again.
    If omitted, `index_replicas`."""
    num_cpus_per_index_actor: float = Field(default=0.25, ge=0)
    """CPUs that Ray reserves per index process."""
    num_gpus_per_index_actor: float = Field(default=0.0, ge=0, le=1)
    """GPUs that Ray reserves per index process; 0.25 puts four on one GPU. Above 0 the vectors of a flat index (float32
    or float16) are held and searched in the GPU's memory. With 0 the CPU searches."""

    @model_validator(mode="after")
    def _maximum_is_over_minimum(self) -> Self:
        for most, least in (("max_replicas", "num_replicas"), ("max_index_replicas", "index_replicas")):
            if (getattr(self, most) or math.inf) < getattr(self, least):
                raise OptionError(
                    f"{{{most}}} = {{most}} is less than {{{least}}} = {{least}}; raise it",
                    most=getattr(self, most),
                    least=getattr(self, least),
                )
        return self

    def processes(self) -> dict[str, Any]:
        """Return the options of the processes: their number, threads, CPUs and GPUs, but not what they serve."""
        served = {"retriever", "index", "bridge", "new_vectors", "corpus", "encoding", "dtype"}
        return {name: getattr(self, name) for name in VersionConfig.model_fields if name not in served}


class DomainsConfig(VersionConfig):
    """Options of the version whose encoder all domains share."""

    base: str
    """Pretrained model that the domains were merged with. If empty, the one that the first factors name."""
    indexes: tuple[str, ...] = ()
    """Index of one domain, if any domain has one. It sets the data type to compute in."""
    bundles: tuple[str, ...]
    """Factors of some of the domains. The retriever is read from the first that can be opened."""
    max_domain_bytes: int = Field(ge=1)
    """Maximum memory for the factors of all domains, in bytes."""

    def processes(self) -> dict[str, Any]:
        """Return the options of the processes, which an update cannot change."""
        return super().processes() | {"max_domain_bytes": self.max_domain_bytes}


class DomainIndexConfig(VersionConfig):
    """Options of the index of one domain; the encoder is shared with other domains."""

    domain: str
    """Name of the domain."""
    num_replicas: int = 0
    """Number of encoder processes; none belongs to the index."""


_DOMAIN_BYTES = 1 << 30
_SPARE_BUNDLES = 8
"""Maximum number of domains in `bundles`: a replica that restarts reads the retriever from any that still exists."""


def _from_file(value: object) -> object:
    if not isinstance(value, str):
        return value
    return options_of(read_yaml(Location(value), "versions by name"), repr(value), "versions by name")


class ServeConfig(LossPolicy, SideOptions, Limits, VersionConfig):
    """Options of `readapt serve`. Options of a version are defaults for every version in `versions`."""

    name: str = ""
    """Name of the version for clients. If omitted, the last part of `retriever`."""
    versions: Annotated[dict[str, dict[str, Any]] | None, BeforeValidator(_from_file)] = None
    """YAML file of several versions by name, each with its retriever, index, corpus and so on. The file of --config can
    also hold them as a section."""
    base: str | None = None
    """Pretrained model (before retrieval training) that the `domains` were merged with. If omitted, the one that the
    factors name."""
    domains: Annotated[dict[str, str | dict[str, str | float]] | None, BeforeValidator(parse_domains)] = None
    """Domains that share one encoder: NAME=FACTORS, separated by commas, or a YAML file of `name: factors`. Factors are
    the output of `readapt merge --factors`, all with the same retriever. Give it instead of `retriever`. Options of a
    domain follow it, as in `legal=FACTORS,index=INDEX,corpus=CORPUS,knowledge_scale=0`; in the file they are
    `name: {factors: ..., index: ...}`. At scale 0 the index must have the retriever's own vectors."""
    max_domain_bytes: int = Field(default=_DOMAIN_BYTES, ge=1)
    """Memory for the factors of all domains, in bytes, in each encoder process. When it is full, the factors that were
    not used for longest are dropped, and read again when they are needed."""
    default: str = ""
    """Version that answers requests that name none. If omitted, the first."""
    split: tuple[str, ...] = ()
    """Weights that split the searches that name no version, such as base=0.1,adapted=0.9. If omitted, the default
    version answers all of them."""
    host: str = "127.0.0.1"
    """Address to listen on. 0.0.0.0 means all addresses, and needs API keys."""
    port: int = Field(default=8000, ge=1, le=65535)
    """Port to listen on."""
    api_keys: str | None = None
    """YAML file of API keys: `name: key`, or `name: {key: ..., requests_per_minute: 600}`. If omitted, the same text in
    $READAPT_API_KEYS. Without keys only clients on this machine are answered."""
    allow_anonymous: bool = False
    """Answer other machines without API keys. Use it only behind a gateway that checks who asks."""
    cors_origins: tuple[str, ...] = ()
    """Origins of web pages that may call this server from a browser, such as https://app.example; * for all. If
    omitted, none."""
    drain_s: float = Field(default=30.0, ge=0)
    """Seconds that requests in progress may still take when the server is told to stop. New ones get 503 meanwhile. Set
    it below the time after which your supervisor kills the process."""
    num_gateways: int = Field(default=1, ge=1)
    """Number of processes that speak HTTP and form batches. Raise it if one keeps a CPU core busy."""
    traces: bool = False
    """Send OpenTelemetry traces of requests over OTLP to OTEL_EXPORTER_OTLP_ENDPOINT. Needs the extra `traces`."""
    update: bool = False
    """Change the server that runs on this Ray to these options, without dropping a request, instead of starting one."""
    require_report: str | None = None
    """Output of `readapt evaluate --require`. The server starts only if all its requirements hold, and if it measured
    each version."""
    root: str | None = None
    """Root of `readapt refresh`: serve the retriever, index and corpus of its present generation. `retriever`, `index`
    and `corpus` override it."""
    as_of: int | None = Field(default=None, ge=1)
    """Number of the generation of `root` to serve. If omitted, the present one."""
    write_config: str | None = None
    """Write the file that `serve deploy` and KubeRay's RayService read, and start nothing."""

    inputs: ClassVar[frozenset[str]] = frozenset(
        {"retriever", "index", "bridge", "corpus", "encoding", "name", "versions", "host", "port", "write_config"}
        | {"new_vectors", "base", "domains"}
    )
    operational: ClassVar[frozenset[str]] = frozenset(
        {"batch_tokens", "batch_wait_s", "num_gateways", "index_actors", "index_replicas", "num_threads"}
        | {
            "max_index_replicas",
            "max_domain_bytes",
            "num_replicas",
            "max_replicas",
            "num_cpus_per_replica",
            "num_gpus_per_replica",
            "num_cpus_per_index_actor",
            "num_gpus_per_index_actor",
        }
    )
    safety: ClassVar[frozenset[str]] = frozenset(
        {
            "api_keys",
            "require_report",
            "allow_anonymous",
            "accept_token_ids",
            "cors_origins",
            "max_requests",
            "max_queued_tokens",
            "max_body_bytes",
            "max_inputs",
        }
        | {"timeout_s", "drain_s", "lost_shards", "shard_timeout_s"}
    )

    @model_validator(mode="before")
    @classmethod
    def _of_generation(cls, values: Any) -> Any:
        return with_folders(values, ("retriever", "index", "corpus")) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if sum(map(bool, (self.retriever, self.versions, self.domains))) != 1:
            raise OptionError("give a {retriever}, or several {versions} with one each, or {domains}")
        if self.domains:
            self._check_domains()
        elif self.base or self.knowledge_scale or self.max_domain_bytes != _DOMAIN_BYTES:
            raise OptionError("{base}, {knowledge_scale} and {max_domain_bytes} are for {domains}; give these")
        if self.versions and self.name:
            raise OptionError("{name} is of the only version, and {versions} have names of their own; leave one out")
        if self.update and self.write_config:
            raise OptionError("{update} changes a running server, and {write_config} starts none; leave one out")
        self._check_names()
        self.routing().check(self.names())
        return self

    def _check_names(self) -> None:
        """Refuse empty names, and names that differ from another one only by a suffix such as `-passage`."""
        names = set(self.names())
        if "" in names:
            raise ValueError("a name of a version or domain is empty; give it one")
        for name, suffix in itertools.product(sorted(names), filter(None, SUFFIXES.values())):
            if f"{name}{suffix}" in names:
                raise ValueError(
                    f"clients ask {name!r} for another kind of text by '{name}{suffix}', which is the name of another version "
                    f"or domain; rename that"
                )

    def _check_domains(self) -> None:
        given = [name for name in ("index", "bridge", "new_vectors", "name", "shadow", "split") if getattr(self, name)]
        if given or self.recall_probe or self.require_report:
            unused = given or ["recall_probe" if self.recall_probe else "require_report"]
            raise OptionError(
                f"{{domains}} cannot have {{{unused[0]}}}; leave it out (an index is given to each: index=INDEX)"
            )
        each_domain = self.each_domain()
        idle = [name for name, each in each_domain.items() if each.corpus and not each.index]
        if idle or (self.corpus and not any(each.index for each in each_domain.values())):
            whose = f"domain {idle[0]!r}" if idle else "no domain"
            raise OptionError(
                f"a {{corpus}} holds the texts of what an index finds, and {whose} has {'no' if idle else 'an'} index; give it "
                f"index=INDEX, or leave the corpus out"
            )

    def names(self) -> list[str]:
        """Return the names that clients can give as `model`, without suffixes: the domains, or else the versions."""
        return list(self.domains or self.each_version())

    def each_version(self) -> dict[str, VersionConfig]:
        """Return the options of each version by name, with defaults filled in; with domains, of their one version.

        Raises:
            InputError: an option of a version is unknown or wrong.
        """
        common = {name: getattr(self, name) for name in VersionConfig.model_fields}
        if self.domains:
            domains = self.each_domain().values()
            bundles = tuple(each.factors for each in domains)
            indexes = tuple(each.index for each in domains if each.index)
            own = {"base": self.base or "", "bundles": bundles[:_SPARE_BUNDLES], "indexes": indexes[:1], "corpus": None}
            return {VERSION_NAME: DomainsConfig.parse(common | own | {"max_domain_bytes": self.max_domain_bytes})}
        if not self.versions:
            return {self.name or last_part(self.retriever): VersionConfig.parse(common)}
        return {
            name: VersionConfig.parse(common | values, where=f"version {name!r}")
            for name, values in self.versions.items()
        }

    def each_domain(self) -> dict[str, DomainOptions]:
        """Return the options of each domain by name: factors, index, corpus and scale; {} without domains.

        Raises:
            InputError: an option of a domain is unknown or wrong.
        """
        return {
            name: DomainOptions.parse(
                {"factors": given} if isinstance(given, str) else dict(given), where=f"domain {name!r}"
            )
            for name, given in (self.domains or {}).items()
        }

    def domain_indexes(self) -> dict[str, DomainIndexConfig]:
        """Return the options of the index of each domain that has one, by the domain's name; {} without domains.

        A domain without a corpus gets the server's `corpus`.
        """
        encodes = {"num_replicas", "max_replicas", "bridge", "new_vectors"}
        common = {name: getattr(self, name) for name in VersionConfig.model_fields if name not in encodes}
        return {
            name: DomainIndexConfig.parse(
                common
                | {"domain": name, "retriever": each.factors, "index": each.index, "corpus": each.corpus or self.corpus}
            )
            for name, each in self.each_domain().items()
            if each.index
        }

    def routing(self) -> Routing:
        """Return how requests are routed to the versions; without `default`, the first name is the default.

        Raises:
            InputError: an entry of `split` is not NAME=WEIGHT, or no weight is over 0. Names are not checked.
        """
        same = {name: getattr(self, name) for name in SideOptions.model_fields}
        default = self.default or self.names()[0]
        return Routing.parse(same | {"default": default, "split": parse_split(self.split)})


def is_loopback(host: str) -> bool:
    """Return whether a host is `localhost` or a loopback address (127.0.0.1, ::1), which only this machine can reach.

    Other names give False; they are not looked up.
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
