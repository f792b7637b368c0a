"""Define the gateway: the Ray Serve deployment that speaks HTTP and passes requests to the search service.

Its `user_config` says which versions it serves, and how. When an update, `serve deploy` or KubeRay changes this, Ray
Serve applies it in place, without a restart. Requests in progress end with the versions that they began with.
"""

import asyncio
import http.client
import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

import ray
from pydantic import Field
from ray import serve

from readapt_ray.config import Config
from readapt_ray.serving.domains import DomainBackend, DomainIndex, policy_of_domains
from readapt_ray.serving.guard import App, Guard, with_cors
from readapt_ray.serving.keys import ApiKey, KeyRing
from readapt_ray.serving.local_http import open_url
from readapt_ray.serving.names import ENCODER_DEPLOYMENT
from readapt_ray.serving.options import Limits, is_loopback
from readapt_ray.serving.ray_backend import RayBackend
from readapt_ray.serving.readiness import CachedCall
from readapt_ray.serving.routes import build_api
from readapt_ray.serving.search_service import SearchService
from readapt_ray.serving.telemetry import PREFIX, Telemetry
from readapt_ray.serving.versions import Backend, LossPolicy, Routing, VersionInfo
from readapt_ray.weights.domain_sources import DomainSource

logger = logging.getLogger("ray.serve")

_POLL_S = 0.5
_OTHERS_S = 30.0
"""Seconds to wait for other versions once the first is up. An encoder answers only between two batches."""
_SCRAPE_S = 5.0
_SCRAPING = ThreadPoolExecutor(8, thread_name_prefix="metrics")
"""A separate pool: nodes that do not answer must not delay the threads that read passages."""


class GatewayConfig(Config):
    """What a gateway serves; this is the `user_config` of its deployment."""

    versions: dict[str, str]
    """Name of the Ray Serve application of each version, by the version's name."""
    routing: Routing
    """Which versions answer the requests that name none."""
    domains: tuple[DomainSource, ...] = ()
    """The domains, if there are any. They share the encoder of the only version, and clients see them instead of it."""
    indexes: dict[str, DomainIndex] = Field(default_factory=dict)
    """The index of each domain that has one, by the domain's name."""
    policy: LossPolicy = LossPolicy()
    """What to do when a part of an index is lost."""
    whole_until_s: float = 0.0
    """Unix time in seconds. A gateway that starts before it belongs to an update, and fails if a version that is up
    cannot be served; then the update is undone. One that starts later replaces a dead one, and serves what it can."""


@dataclass(frozen=True, kw_only=True)
class GatewaySetup:
    """Fixed options of a gateway; to change them, its processes are replaced."""

    OPTIONS: ClassVar = ("allow_anonymous", "cors_origins", "num_gateways", "traces", "drain_s")
    """Fields that are options of `readapt serve` with the same names."""

    limits: Limits
    keys: tuple[ApiKey, ...]
    allow_anonymous: bool
    cors_origins: tuple[str, ...]
    num_gateways: int
    traces: bool
    drain_s: float


@serve.deployment
@serve.ingress()
class Gateway:
    """The deployment that answers HTTP requests."""

    def __init__(self, setup: GatewaySetup) -> None:
        self._setup = setup
        self._state: GatewayConfig | None = None
        self._telemetry = Telemetry()
        self._service = SearchService(setup.limits, self._telemetry)
        self._guard: Guard | None = None
        self._id = uuid.uuid4().hex
        self._versions: dict[str, RayBackend] = {}
        """Versions that are up, by the names of their applications."""
        self._completing: asyncio.Task[None] | None = None
        """Task that adds the versions that come up late."""

    def __serve_build_asgi_app__(self) -> App:
        """Build the ASGI app; Ray Serve calls this in the replica."""
        spans = None
        if self._setup.traces:
            from readapt_ray.serving.spans import RequestSpans

            spans = RequestSpans()
        guard = self._guard = Guard(
            build_api(self._service, CachedCall(gather_metrics).result),
            keys=KeyRing(self._setup.keys, share=1 / self._setup.num_gateways),
            allow_anonymous=self._setup.allow_anonymous,
            sees_clients=_sees_clients(),
            limits=self._setup.limits,
            telemetry=self._telemetry,
            spans=spans,
        )
        return with_cors(guard, self._setup.cors_origins) if self._setup.cors_origins else guard

    async def setup(self) -> tuple[GatewaySetup, GatewayConfig | None]:
        """Return the fixed options of this gateway, and its present state; None before it serves anything."""
        return self._setup, self._state

    async def stop_accepting(self, *, give_up: bool = False) -> tuple[str, int]:
        """Answer new requests with 503 from now on; with `give_up`, running requests too. See `Guard.stop_accepting`.

        Returns:
            The id of this gateway, and the number of its requests in progress.
        """
        return self._id, self._guard.stop_accepting(give_up=give_up) if self._guard else 0

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve what `user_config` says (a `GatewayConfig`); Ray Serve calls this at the start and at a change.

        It waits until at least one version is up. Versions that are not up 30 s after that are added later. During an
        update (`whole_until_s`) a new gateway raises the error of a version that cannot be served.
        """
        if self._completing is not None:
            self._completing.cancel()
            await asyncio.wait({self._completing})
            self._completing = None
        state = GatewayConfig.parse(user_config, where="user_config")
        if not await self._take_over(state):
            self._completing = asyncio.create_task(self._complete(state))

    async def _complete(self, state: GatewayConfig) -> None:
        """Add versions as they come up."""
        is_complete = False
        while not is_complete:
            try:
                is_complete = await self._take_over(state)
            except Exception:
                logger.exception("a version that came up cannot be added")
                await asyncio.sleep(_OTHERS_S)

    async def _take_over(self, state: GatewayConfig) -> bool:
        """Serve the versions that are up; return whether all are."""
        asked = {name: asyncio.create_task(self._version(app, state)) for name, app in state.versions.items()}
        try:
            await asyncio.wait(asked.values(), return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait(asked.values(), timeout=_OTHERS_S)
            up = {name: each.result() for name, each in asked.items() if each.done()}
        finally:
            for each in asked.values():
                each.cancel()
        missing = dict.fromkeys(asked.keys() - up.keys(), "its encoder does not answer")
        is_of_update = self._state is None and time.time() < state.whole_until_s
        await self._service.set_state(_backends(up, state), state.routing, missing, must_be_whole=is_of_update)
        self._state, self._versions = state, {state.versions[name]: each for name, each in up.items()}
        logger.info("serving %s, default %s", ", ".join(up), state.routing.default)
        if missing:
            logger.warning("not up yet: %s", ", ".join(sorted(missing)))
        return not missing

    async def _version(self, app: str, state: GatewayConfig) -> RayBackend:
        encoder, info = await _description(app)
        known = self._versions.get(app)
        if known and known.info.fingerprint == info.fingerprint and known.policy == state.policy:
            return known
        slices = {name: serve.get_deployment_handle(name, app) for name in info.slices}
        return RayBackend(info, encoder, slices, state.policy)


def _backends(versions: Mapping[str, RayBackend], state: GatewayConfig) -> Mapping[str, Backend]:
    """Return what clients can choose by name: the domains, or else the versions."""
    if not state.domains:
        return versions
    (shared,) = versions.values()
    found = {}
    for each in state.domains:
        index = state.indexes.get(each.name)
        searcher = None if index is None else _searcher(shared, index, state.policy)
        found[each.name] = DomainBackend(shared, each, index, searcher)
    return found


def _searcher(shared: RayBackend, index: DomainIndex, policy: LossPolicy) -> RayBackend:
    """Return the backend that searches the index of a domain. The application of the index may be down."""
    slices = {name: serve.get_deployment_handle(name, index.app, _check_exists=False) for name in index.slices}
    return shared.with_index(index.described(shared.info), slices, policy_of_domains(policy))


def _sees_clients() -> bool:
    """Return whether requests carry the address of their client.

    Behind HAProxy all requests carry HAProxy's address. This matters only if other machines can reach HAProxy.
    """
    from ray.serve._private.constants import RAY_SERVE_ENABLE_HA_PROXY
    from ray.serve.context import _get_global_client

    return not RAY_SERVE_ENABLE_HA_PROXY or is_loopback(str(_get_global_client().http_config.host))


async def _description(app: str) -> tuple[Any, VersionInfo]:
    """Wait until a version is up; return the handle of its encoder, and its description."""
    from ray.serve.exceptions import RayServeException

    while True:
        try:
            encoder = serve.get_deployment_handle(ENCODER_DEPLOYMENT, app)
            info: VersionInfo = await encoder.describe.remote()
            return encoder, info
        except (RayServeException, ray.exceptions.RayActorError, KeyError) as error:  # KeyError: there is no such app
            logger.info("waiting for %s: %s", app, error)
            await asyncio.sleep(_POLL_S)


async def gather_metrics() -> str:
    """Collect the metrics of this package from all nodes, in Prometheus' text format.

    A node that does not answer within 5 s is logged and left out.
    """
    urls = [
        f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        for node in await asyncio.to_thread(ray.nodes)
        if node["Alive"] and node["MetricsExportPort"]
    ]
    loop = asyncio.get_running_loop()
    pages = await asyncio.gather(*(loop.run_in_executor(_SCRAPING, _read, url) for url in urls))
    described: dict[str, None] = {}
    samples = []
    for line in (line for page in pages for line in page.splitlines()):
        if line.startswith(("# HELP " + PREFIX, "# TYPE " + PREFIX)):
            described[line] = None
        elif line.startswith(PREFIX):
            samples.append(line)
    return _by_family(list(described), samples)


def _read(url: str) -> str:
    try:
        with open_url(url, timeout=_SCRAPE_S) as answer:
            return str(answer.read().decode())
    except (OSError, http.client.HTTPException) as error:  # HTTPException: a node died while it answered
        logger.warning("no metrics from %s: %s", url, error)
        return ""


def _by_family(described: Sequence[str], samples: Sequence[str]) -> str:
    """Group the samples of each metric below its description, which the format allows only once."""
    lines: list[str] = []
    for family in dict.fromkeys(line.split(" ", 3)[2] for line in described):
        lines += [line for line in described if line.split(" ", 3)[2] == family]
        names = {family, *(f"{family}_{part}" for part in ("bucket", "sum", "count", "total"))}
        lines += [line for line in samples if line.split("{", 1)[0].split(" ", 1)[0] in names]
    return "\n".join(lines) + "\n"
