"""The options of `readapt serve`: one version, or several side by side, and how traffic reaches them."""

import ipaddress
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from readapt_ray.catalog.encoding import EncodingOption
from readapt_ray.config import Config, OptionError
from readapt_ray.serving.routing import Routing, parse_split
from readapt_ray.storage import Location
from readapt_ray.yaml_files import options_of, read_yaml


class VersionConfig(Config):
    """One (encoder, index) pair and the processes that hold it."""

    retriever: str = ""
    """The model to serve: catalog name, folder, URI or hub id."""
    index: str | None = None
    """Output folder of `readapt index`, made by this retriever. Without one there is no search."""
    corpus: str | None = None
    """Output folder of `readapt ingest`, for titles and texts in search results. Optional."""
    encoding: EncodingOption = None
    """How the retriever wants its text, as a JSON file; default: as the index was made, or what its folder says."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Type that the model computes in; default: as the index was made, or float32."""
    batch_tokens: int | None = Field(default=None, ge=1)
    """Tokens that go through the model at once at most; default: what suits the device."""
    num_replicas: int = Field(default=1, ge=1)
    """Processes that hold the model; with `max_replicas`, the fewest."""
    max_replicas: int | None = Field(default=None, ge=1)
    """Processes at most: Ray Serve starts more while batches wait, and stops them again. Default: `num_replicas`."""
    num_cpus_per_replica: float = Field(default=0.5, ge=0)
    """CPUs that Ray sets aside for a replica; how many it really uses is `num_threads`."""
    num_gpus_per_replica: float | None = Field(default=None, ge=0)
    """GPUs that Ray sets aside for a replica; 0.25 puts four on one. Default: 1 where the cluster has any, else 0."""
    num_threads: int | None = Field(default=None, ge=1)
    """Threads that a replica computes with; default: its share of this machine's CPUs."""
    index_actors: int = Field(default=1, ge=1)
    """Processes that the shards of the index are dealt out to."""
    index_replicas: int = Field(default=1, ge=1)
    """Copies of each of these processes."""
    num_cpus_per_index_actor: float = Field(default=0.25, ge=0)
    """CPUs that Ray sets aside for a process that holds shards."""

    def processes(self) -> dict[str, Any]:
        """The options that say how many processes there are, and with what; not what they serve."""
        served = {"retriever", "index", "corpus", "encoding", "dtype"}
        return {name: getattr(self, name) for name in VersionConfig.model_fields if name not in served}


def _from_file(value: object) -> object:
    if not isinstance(value, str):
        return value
    return options_of(read_yaml(Location(value), "versions by name"), repr(value), "versions by name")


class ServeConfig(VersionConfig):
    """Options of `readapt serve`. Those of a version hold for every version that does not say otherwise."""

    name: str = ""
    """What clients call the version; default: the last part of `retriever`."""
    versions: Annotated[dict[str, dict[str, Any]] | None, BeforeValidator(_from_file)] = None
    """Several versions by name, each with its retriever, index, corpus and so on; in a YAML file, or a file of its own."""
    default: str = ""
    """The version that answers requests that name none; default: the first."""
    split: tuple[str, ...] = ()
    """Shares of searches that name no version, such as base=0.1,adapted=0.9."""
    shadow: str = ""
    """A version that searches along, unseen by clients; how far it agrees is in the metrics."""
    shadow_share: float = Field(default=1.0, ge=0, le=1)
    """Share of searches that the shadow gets too."""
    recall_probe: float = Field(default=0.0, ge=0, le=1)
    """Share of searches that are made again exactly after the answer, one at a time; what the index found of the 10 best is in the metrics.
    For an index that holds its vectors as they were: of storage float32, with refine where it has codes."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all, which needs API keys."""
    port: int = Field(default=8000, ge=1, le=65535)
    """Port to listen on."""
    api_keys: str | None = None
    """YAML file of `name: key`, or `name: {key: ..., requests_per_minute: 600}`; default: $READAPT_API_KEYS, the same as text.
    Without keys only this machine is answered."""
    allow_anonymous: bool = False
    """Answer other machines without API keys, because something else guards the door."""
    num_gateways: int = Field(default=1, ge=1)
    """Processes that speak HTTP and form batches."""
    batch_wait_s: float = Field(default=0.0, ge=0, le=10)
    """Seconds that a batch waits for more rows at most while the encoder is free; while it is busy, rows gather anyhow."""
    max_requests: int = Field(default=256, ge=1)
    """Requests under way in a gateway at most; above that the answer is 429."""
    max_queued_tokens: int = Field(default=1 << 20, ge=1)
    """Tokens that wait for a version in a gateway at most; above that the answer is 429."""
    max_body_bytes: int = Field(default=16 << 20, ge=1024)
    """Bytes of a request at most."""
    max_inputs: int = Field(default=2048, ge=1, le=2048)
    """Texts in a request at most."""
    timeout_s: float = Field(default=60.0, gt=0)
    """Seconds until a request is given up with 504; a request may ask for less."""
    lost_shards: Literal["wait", "partial", "error"] = "wait"
    """When a part of the index does not answer: wait for its replacement until the request's time is up, answer without it and say so, or refuse."""
    shard_timeout_s: float = Field(default=2.0, gt=0)
    """Seconds that a part of the index has to answer before it counts as lost, unless the policy is to wait."""
    traces: bool = False
    """Send OpenTelemetry traces of requests over OTLP, to OTEL_EXPORTER_OTLP_ENDPOINT; needs the extra `traces`."""
    update: bool = False
    """Bring the server that this Ray already runs to this state, without a dropped request, instead of starting one."""
    write_config: str | None = None
    """Write the file that `serve deploy` and KubeRay's RayService read, and start nothing."""

    inputs: ClassVar[frozenset[str]] = frozenset(
        {"retriever", "index", "corpus", "encoding", "name", "versions", "host", "port", "write_config"}
    )
    operational: ClassVar[frozenset[str]] = frozenset(
        {"batch_tokens", "batch_wait_s", "num_gateways", "index_actors", "index_replicas", "num_threads"}
        | {"num_replicas", "max_replicas", "num_cpus_per_replica", "num_gpus_per_replica", "num_cpus_per_index_actor"}
    )
    safety: ClassVar[frozenset[str]] = frozenset(
        {"api_keys", "allow_anonymous", "max_requests", "max_queued_tokens", "max_body_bytes", "max_inputs"}
        | {"timeout_s", "lost_shards", "shard_timeout_s"}
    )

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if bool(self.retriever) == bool(self.versions):
            raise OptionError("give a {retriever}, or several {versions} with one each")
        self.routing().check(self.pairs())
        return self

    def pairs(self) -> dict[str, VersionConfig]:
        """Each version by its name, whole.

        Raises:
            InputError: an option of a version is unknown or wrong.
        """
        common = {name: getattr(self, name) for name in VersionConfig.model_fields}
        if not self.versions:
            return {self.name or self.retriever.rstrip("/").rsplit("/", 1)[-1]: VersionConfig.parse(common)}
        return {
            name: VersionConfig.parse(common | values, where=f"version {name!r}")
            for name, values in self.versions.items()
        }

    def routing(self) -> Routing:
        """How traffic reaches the versions."""
        return Routing.parse(
            {
                "default": self.default or next(iter(self.pairs())),
                "split": parse_split(self.split),
                "shadow": self.shadow,
                "shadow_share": self.shadow_share,
                "recall_probe": self.recall_probe,
            }
        )


def is_loopback(host: str) -> bool:
    """Whether an address or name means this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
