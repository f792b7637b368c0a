"""Make Ray Serve applications from options: one for each version, and one for the gateway before them.

An application of its own for each version lets Ray Serve add, replace and remove one without touching the others. The
same builders serve `readapt serve`, and the config file that `serve deploy` and KubeRay's RayService read:
`readapt_ray.serving.app:version` and `readapt_ray.serving.app:gateway`, whose args are `ServeConfig`'s
options. What does not fit together is refused before anything starts.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from readapt_ray.artifacts import Artifact, open_artifact
from readapt_ray.catalog.encoding import Encoding
from readapt_ray.catalog.models import OpenModel, open_model, own_folder
from readapt_ray.catalog.query_models import passages_model
from readapt_ray.cluster import on_worker
from readapt_ray.errors import FingerprintMismatchError, InputError
from readapt_ray.retrieval.bridge import Bridge
from readapt_ray.retrieval.query_encoder import describe_encoder, query_encoder
from readapt_ray.serving.domain_app import (
    check_domain_encoder,
    domain_indexes,
    domain_records,
    domains_spec,
    index_app_name,
    index_spec,
)
from readapt_ray.serving.keys import ApiKey, read_keys
from readapt_ray.serving.names import ENCODER_DEPLOYMENT, GATEWAY_APP, GATEWAY_DEPLOYMENT
from readapt_ray.serving.options import DomainIndexConfig, DomainsConfig, Limits, ServeConfig, VersionConfig
from readapt_ray.serving.slice_plan import planned_slices
from readapt_ray.serving.versions import LossPolicy
from readapt_ray.storage import Location

if TYPE_CHECKING:
    from readapt_ray.serving.gateway import GatewayConfig, GatewaySetup
    from readapt_ray.serving.version_spec import VersionSpec

_MAX_PREPARING = 64
_MAX_SEARCHES = 64
"""Searches in an index process at once: as many as share one scan."""
_BUSY_SEARCHES = 16.0
"""Searches per index process, waiting or in work, above which another copy is started."""
_HEALTH_CHECK_PERIOD_S = 5
_HEALTH_CHECK_TIMEOUT_S = 30
_DRAIN_S = 20


def version_app_name(name: str) -> str:
    """Return the name of a version's Ray Serve application."""
    return f"{GATEWAY_APP}-{name}"


def applications(config: ServeConfig) -> dict[str, tuple[str, VersionConfig]]:
    """Return name and options of each version, and of the index of each domain, by its Ray Serve application.

    Raises:
        ArtifactMissingError: the index of a domain is not complete.
    """
    versions = {version_app_name(name): (name, each) for name, each in config.each_version().items()}
    indexes = config.domain_indexes().items()
    return versions | {index_app_name(each, index_spec(each)): (name, each) for name, each in indexes}


def version(args: dict[str, Any]) -> Any:
    """Make the application of one version or of a domain's index, from `ServeConfig`'s options for it and its `name`.

    Raises:
        InputError: an option is wrong; the index or the corpus is not complete.
    """
    values = dict(args)
    name = str(values.pop("name", ""))
    kind = DomainsConfig if "base" in values else DomainIndexConfig if "domain" in values else VersionConfig
    return bind_version(name, kind.parse(values, where=f"version {name!r}"))


def gateway(args: dict[str, Any]) -> Any:
    """Make the application that speaks HTTP, from `ServeConfig`'s options.

    Raises:
        InputError: an option is wrong, the file of API keys is, or recall cannot be probed.
    """
    config = ServeConfig.parse(args, where="gateway")
    return bind_gateway(*gateway_of(config, read_keys(config.api_keys)))


def bind_version(name: str, config: VersionConfig) -> Any:
    """Bind an encoder and the slices of its index; of a domain the slices of its index alone."""
    from readapt_ray.serving.workers import EncoderReplica, IndexReplica

    spec = version_spec(name, config)
    planned = planned_slices(config)
    slices: list[Any] = []
    for number, each in reversed(list(enumerate(planned))):
        # An application needs one deployment that leads to all others.
        others = slices if number == 0 and isinstance(config, DomainIndexConfig) else []
        bound = IndexReplica.options(  # type: ignore[attr-defined]
            name=each.deployment,
            max_ongoing_requests=_MAX_SEARCHES,
            ray_actor_options={
                "num_cpus": config.num_cpus_per_index_actor,
                "num_gpus": config.num_gpus_per_index_actor,
                "memory": each.num_bytes,
            },
            **_LIFE,
            **_scale(config.index_replicas, config.max_index_replicas, _BUSY_SEARCHES),
        ).bind(spec, each.shards, len(planned), *others)
        slices = [bound, *slices]
    if isinstance(config, DomainIndexConfig):
        return slices[0]
    encoder = EncoderReplica.options(  # type: ignore[attr-defined]
        name=ENCODER_DEPLOYMENT,
        # One batch in work and one on its way; batches are formed in the gateway. Domains are brought into memory besides.
        max_ongoing_requests=_MAX_PREPARING if spec.base else 2,
        ray_actor_options={"num_cpus": config.num_cpus_per_replica, "num_gpus": num_gpus(config)},
        **_LIFE,
        # The gateway sends a batch for each replica that there may be: where fewer work, batches wait for them.
        **_scale(config.num_replicas, config.max_replicas, 1.0),
    )
    return encoder.bind(spec, *slices)


def version_spec(name: str, config: VersionConfig) -> "VersionSpec":
    """Return what the processes of a version are started with, by names that mean the same on every node.

    Raises:
        InputError: there is no retriever.
        ArtifactMissingError: the index or the corpus is not complete.
    """
    from readapt_ray.serving.version_spec import VersionSpec

    if isinstance(config, DomainsConfig):
        return domains_spec(name, config)
    if isinstance(config, DomainIndexConfig):
        return index_spec(config)
    if not config.retriever:
        raise InputError(f"version {name!r} has no retriever; give it one")
    num_replicas = max(config.num_replicas, config.max_replicas or 1)
    index = open_artifact(config.index, "index") if config.index else None
    corpus = open_artifact(config.corpus, "ingest") if config.corpus else None
    bridge = _bridge_of(config)
    asked_by = _asked_by(config, index, bridge)
    recorded = Encoding.parse(asked_by["encoding"], where=str(config.index)) if asked_by else None
    folder = own_folder(config.retriever)
    return VersionSpec(
        name=name,
        retriever=str(folder) if folder is not None else config.retriever,
        encoding=config.encoding or recorded,
        dtype=config.dtype or asked_by.get("dtype", "float32"),
        encoder_fingerprint=asked_by.get("fingerprint"),
        bridge=on_worker.absolute(bridge.artifact.location).uri if bridge else None,
        bridge_fingerprint=bridge.artifact.fingerprint if bridge else None,
        new_vectors=on_worker.absolute(Location(config.new_vectors)).uri if config.new_vectors else None,
        index=on_worker.absolute(index.location).uri if index else None,
        index_fingerprint=index.fingerprint if index else None,
        index_encoder=index.manifest.details["encoder"]["fingerprint"] if index else None,
        slices={each.deployment: each.num_vectors for each in planned_slices(config)},
        has_words="bm25" in index.manifest.details if index else False,
        is_split=bool(index and index.manifest.details.get("is_split")),
        corpus=on_worker.absolute(corpus.location).uri if corpus else None,
        corpus_fingerprint=corpus.fingerprint if corpus else None,
        batch_tokens=config.batch_tokens,
        num_slots=num_replicas,
        num_threads=config.num_threads,
        processes=config.processes(),
    )


def _bridge_of(config: VersionConfig) -> Bridge | None:
    return Bridge.open(config.bridge) if config.bridge else None


def _asked_by(config: VersionConfig, index: Artifact | None, bridge: Bridge | None) -> dict[str, Any]:
    """Return what the index, or the bridge to it, says of the encoder of queries; a model for queries speaks for itself."""
    if bridge is not None:
        return bridge.new_encoder
    made_by = dict(index.manifest.details["encoder"]) if index else {}
    if not made_by or passages_model(open_model(config.retriever, with_weights=False)) is None:
        return made_by
    model = open_model(config.retriever)
    return describe_encoder(model, config.encoding or model.encoding, made_by["dtype"])


_LIFE: dict[str, Any] = {
    "health_check_period_s": _HEALTH_CHECK_PERIOD_S,
    "health_check_timeout_s": _HEALTH_CHECK_TIMEOUT_S,
    "graceful_shutdown_timeout_s": _DRAIN_S,
    "graceful_shutdown_wait_loop_s": 0.2,
}


def _scale(minimum: int, maximum: int | None, ongoing: float) -> dict[str, Any]:
    """Return the options that keep a number of replicas, or let Ray Serve choose one.

    Args:
        minimum: replicas that there always are.
        maximum: replicas that there may be; if None, the minimum.
        ongoing: calls waiting or in work per replica, above which Ray Serve starts another one.
    """
    if maximum is None or maximum <= minimum:
        return {"num_replicas": minimum}
    return {
        "autoscaling_config": {
            "min_replicas": minimum,
            "max_replicas": maximum,
            "target_ongoing_requests": ongoing,
            "upscale_delay_s": 10.0,
            "downscale_delay_s": 300.0,
        }
    }


def num_gpus(config: VersionConfig) -> float:
    """Return how many GPUs each encoder process of a version asks for."""
    import ray

    if config.num_gpus_per_replica is not None:
        return config.num_gpus_per_replica
    return float(ray.cluster_resources().get("GPU", 0) > 0)


def gateway_of(config: ServeConfig, keys: tuple[ApiKey, ...]) -> "tuple[GatewaySetup, GatewayConfig]":
    """Return what the gateway of these versions is started with, and what it serves.

    Raises:
        InputError: recall cannot be probed.
    """
    from readapt_ray.serving.gateway import GatewayConfig, GatewaySetup

    check_probe(config)
    setup = GatewaySetup(
        limits=Limits(**{name: getattr(config, name) for name in Limits.model_fields}),
        keys=keys,
        **{name: getattr(config, name) for name in GatewaySetup.OPTIONS},
    )
    state = GatewayConfig(
        domains=tuple(each.source for each in domain_records(config)),
        indexes=domain_indexes(config),
        versions={name: version_app_name(name) for name in config.each_version()},
        routing=config.routing(),
        policy=LossPolicy(**{name: getattr(config, name) for name in LossPolicy.model_fields}),
    )
    return setup, state


def bind_gateway(setup: "GatewaySetup", state: "GatewayConfig") -> Any:
    """Bind the gateway that speaks HTTP."""
    from ray.serve.config import BackpressureConfig
    from ray.serve.schema import LoggingConfig

    from readapt_ray.serving.gateway import Gateway

    # What a gateway refuses itself, in OpenAI's words, comes before Ray's own limit.
    most = 2 * setup.limits.max_requests + 64
    return Gateway.options(  # type: ignore[attr-defined]
        name=GATEWAY_DEPLOYMENT,
        num_replicas=setup.num_gateways,
        max_ongoing_requests=most,
        max_queued_requests=most,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        # A new gateway is up before an old one goes.
        max_surge_percent=100,
        user_config=state.model_dump(mode="json"),
        ray_actor_options={"num_cpus": 0},
        logging_config=LoggingConfig(encoding="JSON", enable_access_log=False).model_dump(),
        # One that an update replaces answers what it has; `readapt serve` bounds an end by drain_s itself.
        **_LIFE | {"graceful_shutdown_timeout_s": max(setup.drain_s, setup.limits.timeout_s)},
    ).bind(setup)


def serve_config(config: ServeConfig) -> dict[str, Any]:
    """Write the same applications as a Ray Serve config file, for `serve deploy` and KubeRay's RayService."""
    given = config.model_dump(
        mode="json", exclude_defaults=True, exclude={"write_config", "update", "host", "port", "root", "as_of"}
    )
    written: list[dict[str, Any]] = [
        {
            "name": application,
            "route_prefix": None,
            "import_path": f"{__name__}:version",
            "args": {"name": name, **each.model_dump(mode="json", exclude_defaults=True)},
        }
        for application, (name, each) in applications(config).items()
    ]
    gateway = {"name": GATEWAY_APP, "route_prefix": "/", "import_path": f"{__name__}:gateway", "args": given}
    return {"http_options": {"host": config.host, "port": config.port}, "applications": [*written, gateway]}


def check_version(name: str, config: VersionConfig) -> str:
    """Check before anything starts that retriever, index, bridge and corpus can be used and fit together.

    Returns:
        The fingerprint of the version that they make.

    Raises:
        ModelError: the retriever is not a model, or nothing says how it wants its text.
        ArtifactMissingError: the index or the corpus is not complete.
        FingerprintMismatchError: the index was made by another model, or encoded otherwise, or the bridge leads elsewhere.
        InputError: there is a bridge, and no index that it leads to.
    """
    from readapt_ray.retrieval.encoder_fingerprint import encoder_fingerprint
    from readapt_ray.retrieval.tokenization import TextTokenizer
    from readapt_ray.serving.new_vectors import check_new_vectors

    if isinstance(config, DomainsConfig):
        return check_domain_encoder(name, config)
    if config.bridge and not config.index:
        raise InputError(
            f"version {name!r} has the bridge {config.bridge!r} and no index; give the index of its old vectors"
        )
    check_new_vectors(name, config)
    spec = version_spec(name, config)
    model = open_model(config.retriever)
    encoding = spec.encoding or model.encoding
    TextTokenizer(model.tokenizer, encoding)
    encoder = encoder_fingerprint(model, encoding, spec.dtype)
    if spec.encoder_fingerprint not in (None, encoder):
        recorded = _asked_by(config, open_artifact(str(config.index), "index"), _bridge_of(config))
        raise _mismatch(model, encoding, spec.dtype, config, recorded)
    if config.index:
        bridge = _bridge_of(config)
        query_encoder(model, open_artifact(config.index, "index"), encoding=encoding, bridge=bridge)
        if bridge is not None:
            bridge.warn_if_not_worth_it()
    return spec.fingerprint(encoder)


def check_probe(config: ServeConfig) -> None:
    """Check before anything starts that recall can be measured where that is asked for.

    Raises:
        InputError: an index does not hold its vectors as they were.
        ArtifactMissingError: an index is not complete.
    """
    from readapt_ray.retrieval.vector_index import VectorIndex
    from readapt_ray.serving.index_slice import holds_vectors_whole

    for name, each in config.each_version().items() if config.recall_probe else ():
        for record in VectorIndex.open(each.index).records if each.index else ():
            if record.measured is not None and not holds_vectors_whole(record.factory):  # what is exact is not measured
                raise InputError(
                    f"recall_probe = {config.recall_probe:g}, but the index of version {name!r} ({record.factory}) does not hold "
                    f"its vectors as they were, so what it misses cannot be told; leave recall_probe out, or serve an index of "
                    f"--storage float32 (for ivf-pq and rabitq with --refine)"
                )


def check_keys(config: ServeConfig, keys: Sequence[ApiKey]) -> None:
    """Check before anything starts that every version can be restricted as the API keys ask.

    Raises:
        InputError: a corpus has no such column, or there is none.
    """
    from readapt_ray.retrieval.kept_columns import KeptColumns, kept_columns

    for key in keys:
        unknown = sorted(set(key.domains or ()) - set(config.names()))
        if unknown:
            raise InputError(
                f"the API key {key.name!r} names {unknown[0]!r}, which is not served; the names are {', '.join(config.names())}"
            )
    for name, each in (
        (config.each_version() | config.domain_indexes()).items() if any(key.within for key in keys) else ()
    ):
        if not each.index:
            continue
        files = (open_artifact(each.corpus, "ingest").location / "passages").files(".parquet") if each.corpus else []
        columns = KeptColumns(pa.schema(list(kept_columns(files).items())).empty_table())
        for key in keys:
            if key.domains is not None and name not in key.domains:
                continue
            try:
                columns.passing(key.within.conditions if key.within else ())
            except InputError as error:
                raise InputError(f"the API key {key.name!r} cannot search in version {name!r}: {error}") from None


def _mismatch(
    model: OpenModel, encoding: Encoding, dtype: str, config: VersionConfig, recorded: dict[str, Any]
) -> FingerprintMismatchError:
    wanted = {**encoding.model_dump(mode="json"), "dtype": dtype}
    there = {**recorded["encoding"], "dtype": recorded["dtype"]}
    other = {key: value for key, value in wanted.items() if there.get(key) != value}
    differing = [f"{key} is {there.get(key)!r} there and {value!r} here" for key, value in other.items()]
    what = "; ".join(differing) or f"its vectors were made with other weights ({recorded['model']!r})"
    if config.bridge:
        return FingerprintMismatchError(
            f"bridge {config.bridge!r} is not for {model.name!r}: {what}; serve the model that it was fitted with, or run "
            f"`readapt bridge` with this one"
        )
    return FingerprintMismatchError(
        f"index {config.index!r} does not fit {model.name!r}: {what}; serve the model that made the index, or "
        f"run `readapt embed` and `readapt index` with this one"
    )
