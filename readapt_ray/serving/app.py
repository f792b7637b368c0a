"""Build the Ray Serve applications from options: one per version, and one for the gateway that speaks HTTP.

Each version is a separate application, so Ray Serve can add, replace and remove one without touching the others.
`readapt serve` calls these builders. A config file for `serve deploy` or KubeRay's RayService names two of them,
`readapt_ray.serving.app:version` and `readapt_ray.serving.app:gateway`; their args are the options of `ServeConfig`.
The functions `check_...` refuse options and artifacts that do not fit together, before anything starts.
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
"""Maximum number of searches in an index process at once: as many as share one scan."""
_BUSY_SEARCHES = 16.0
"""Searches per index process, waiting or running, above which Ray Serve starts another copy."""
_HEALTH_CHECK_PERIOD_S = 5
_HEALTH_CHECK_TIMEOUT_S = 30
_DRAIN_S = 20


def version_app_name(name: str) -> str:
    """Return the name of a version's Ray Serve application, such as readapt-adapted."""
    return f"{GATEWAY_APP}-{name}"


def applications(config: ServeConfig) -> dict[str, tuple[str, VersionConfig]]:
    """Return name and options of each version and of each domain's index, by the name of its Ray Serve application.

    Raises:
        ArtifactMissingError: the index of a domain is not complete.
    """
    versions = {version_app_name(name): (name, each) for name, each in config.each_version().items()}
    indexes = config.domain_indexes().items()
    return versions | {index_app_name(each, index_spec(each)): (name, each) for name, each in indexes}


def version(args: dict[str, Any]) -> Any:
    """Build the application of one version or of one domain's index, from its options and `name`.

    With the option `base` it is the encoder that domains share; with `domain`, the index of a domain.

    Raises:
        InputError: an option is wrong; the index or the corpus is not complete.
    """
    values = dict(args)
    name = str(values.pop("name", ""))
    kind = DomainsConfig if "base" in values else DomainIndexConfig if "domain" in values else VersionConfig
    return bind_version(name, kind.parse(values, where=f"version {name!r}"))


def gateway(args: dict[str, Any]) -> Any:
    """Build the application of the gateway, which speaks HTTP, from the options of `ServeConfig`.

    Raises:
        InputError: an option or the file of API keys is wrong, or `recall_probe` cannot be used (`check_probe`).
    """
    config = ServeConfig.parse(args, where="gateway")
    return bind_gateway(*gateway_of(config, read_keys(config.api_keys)))


def bind_version(name: str, config: VersionConfig) -> Any:
    """Bind the deployments of a version: encoder and index slices. A domain's index has only slices. Nothing starts."""
    from readapt_ray.serving.workers import EncoderReplica, IndexReplica

    spec = version_spec(name, config)
    planned = planned_slices(config)
    slices: list[Any] = []
    for number, each in reversed(list(enumerate(planned))):
        # An application has one root deployment, and all others are bound to it.
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
        # One batch runs and one waits; the gateway forms batches. With domains, calls of prepare() come on top.
        max_ongoing_requests=_MAX_PREPARING if spec.base else 2,
        ray_actor_options={"num_cpus": config.num_cpus_per_replica, "num_gpus": num_gpus(config)},
        **_LIFE,
        # The gateway sends one batch per possible replica. While fewer run, waiting batches make Ray Serve add some.
        **_scale(config.num_replicas, config.max_replicas, 1.0),
    )
    return encoder.bind(spec, *slices)


def version_spec(name: str, config: VersionConfig) -> "VersionSpec":
    """Return the specification that a version's processes start from, with paths that are valid on every node.

    Raises:
        InputError: the version has no retriever.
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
    required = _required_query_encoder(config, index, bridge)
    recorded = Encoding.parse(required["encoding"], where=str(config.index)) if required else None
    folder = own_folder(config.retriever)
    return VersionSpec(
        name=name,
        retriever=str(folder) if folder is not None else config.retriever,
        encoding=config.encoding or recorded,
        dtype=config.dtype or required.get("dtype", "float32"),
        encoder_fingerprint=required.get("fingerprint"),
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


def _required_query_encoder(config: VersionConfig, index: Artifact | None, bridge: Bridge | None) -> dict[str, Any]:
    """Return the description of the query encoder: of the bridge, a model for queries, or the index; else {}."""
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
    """Return Ray Serve's options for a fixed number of replicas, or for autoscaling between two numbers.

    Args:
        minimum: minimum number of replicas.
        maximum: maximum number of replicas; if None, the minimum.
        ongoing: calls per replica, waiting or running, above which Ray Serve starts another one.
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
    """Return the GPUs that Ray reserves per encoder process: as the option says, else 1 if the cluster has GPUs."""
    import ray

    if config.num_gpus_per_replica is not None:
        return config.num_gpus_per_replica
    return float(ray.cluster_resources().get("GPU", 0) > 0)


def gateway_of(config: ServeConfig, keys: tuple[ApiKey, ...]) -> "tuple[GatewaySetup, GatewayConfig]":
    """Return the arguments of the gateway: its fixed setup (limits, API keys), and the state that an update replaces.

    The state is versions, domains with their indexes, routing and loss policy.

    Raises:
        InputError: `recall_probe` is set, but an index does not hold its exact vectors.
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
    """Bind the deployment of the gateway, which speaks HTTP."""
    from ray.serve.config import BackpressureConfig
    from ray.serve.schema import LoggingConfig

    from readapt_ray.serving.gateway import Gateway

    # Ray's limit is above the gateway's own, so that clients get the gateway's 429 in OpenAI's form.
    most = 2 * setup.limits.max_requests + 64
    return Gateway.options(  # type: ignore[attr-defined]
        name=GATEWAY_DEPLOYMENT,
        num_replicas=setup.num_gateways,
        max_ongoing_requests=most,
        max_queued_requests=most,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        # An update starts a new gateway before it stops an old one.
        max_surge_percent=100,
        user_config=state.model_dump(mode="json"),
        ray_actor_options={"num_cpus": 0},
        logging_config=LoggingConfig(encoding="JSON", enable_access_log=False).model_dump(),
        # A gateway that an update replaces answers its requests first. At a stop, `readapt serve` applies drain_s.
        **_LIFE | {"graceful_shutdown_timeout_s": max(setup.drain_s, setup.limits.timeout_s)},
    ).bind(setup)


def serve_config(config: ServeConfig) -> dict[str, Any]:
    """Return the content of a Ray Serve config file with these applications, for `serve deploy` and KubeRay."""
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
    """Check that retriever, index, bridge and corpus of a version can be used and fit together.

    Returns:
        The fingerprint of the version.

    Raises:
        ModelError: the retriever is not a model, or its encoding is not known.
        ArtifactMissingError: the index or the corpus is not complete.
        FingerprintMismatchError: the index or the bridge was made with another model, encoding or dtype.
        InputError: a bridge is given without an index, or new vectors without a bridge.
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
        recorded = _required_query_encoder(config, open_artifact(str(config.index), "index"), _bridge_of(config))
        raise _mismatch(model, encoding, spec.dtype, config, recorded)
    if config.index:
        bridge = _bridge_of(config)
        query_encoder(model, open_artifact(config.index, "index"), encoding=encoding, bridge=bridge)
        if bridge is not None:
            bridge.warn_if_not_worth_it()
    return spec.fingerprint(encoder)


def check_probe(config: ServeConfig) -> None:
    """Refuse approximate indexes from which `recall_probe` (unless it is 0) could not read back exact vectors.

    Raises:
        InputError: an approximate index of a version holds only compressed vectors. Exact indexes always pass.
        ArtifactMissingError: an index is not complete.
    """
    from readapt_ray.retrieval.vector_index import VectorIndex
    from readapt_ray.serving.index_slice import gives_exact_vectors

    for name, each in config.each_version().items() if config.recall_probe else ():
        for record in VectorIndex.open(each.index).records if each.index else ():
            if record.measured is not None and not gives_exact_vectors(record.factory):  # an exact index misses nothing
                raise InputError(
                    f"recall_probe = {config.recall_probe:g}, but the index of version {name!r} ({record.factory}) does not hold "
                    f"its vectors as they were, so what it misses cannot be told; leave recall_probe out, or serve an index of "
                    f"--storage float32 (for ivf-pq and rabitq with --refine)"
                )


def check_keys(config: ServeConfig, keys: Sequence[ApiKey]) -> None:
    """Check that the names in API keys are served, and that each index that a key may search can apply its filter.

    Raises:
        InputError: a name is not served, a corpus lacks a column of a filter, or there is no corpus.
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
