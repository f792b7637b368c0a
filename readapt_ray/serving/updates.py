"""Check that an update of a running server is possible before it changes anything, and run one update at a time."""

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence, Set
from types import FrameType
from typing import TYPE_CHECKING, Any

from readapt_ray import termination
from readapt_ray.cluster import connection
from readapt_ray.errors import InputError, ReadaptError
from readapt_ray.serving.keys import ApiKey
from readapt_ray.serving.names import ENCODER_DEPLOYMENT, GATEWAY_APP, GATEWAY_DEPLOYMENT
from readapt_ray.serving.options import ServeConfig, VersionConfig

if TYPE_CHECKING:
    from readapt_ray.serving.gateway import GatewayConfig, GatewaySetup

logger = logging.getLogger("readapt_ray")

_ANSWER_S = 60.0
_LOCK_NAME = "readapt-update"


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Hold the lock for updates of this server during the block: two updates would delete each other's versions.

    The lock is a named actor. It ends with the process that created it, even if that is killed.

    Raises:
        ReadaptError: another update runs.
    """
    import ray
    from ray.serve._private.constants import SERVE_NAMESPACE

    try:
        lock = ray.remote(num_cpus=0)(_Lock).options(name=_LOCK_NAME, namespace=SERVE_NAMESPACE).remote()
    except ValueError:
        raise ReadaptError(
            "another update of this server runs; wait until it has ended, and run this one again"
        ) from None
    try:
        yield
    finally:
        ray.kill(lock)


class _Lock:
    """An actor that holds the lock as long as it lives."""


def check_server(config: ServeConfig, running: Set[str]) -> None:
    """Check that this Ray runs a server at the port and host of the update.

    Args:
        config: options of the update.
        running: names of the Ray Serve applications on this Ray.

    Raises:
        InputError: it runs no server, or one at another port or host.
    """
    if GATEWAY_APP not in running:
        raise InputError("--update changes a server that runs, and this Ray runs none; start one without it")
    from ray.serve.context import _get_global_client

    fixed = _get_global_client().http_config
    for option, served, asked in (("port", fixed.port, config.port), ("host", fixed.host, config.host)):
        if served != asked:
            raise InputError(
                f"the server runs with {option} = {served}, not {asked}, and an update cannot change that; give --{option} {served}, "
                f"or start another server"
            )


def served_gateway() -> "tuple[GatewaySetup, GatewayConfig]":
    """Ask the running gateway for its fixed options and its state (what it serves now).

    A gateway must be running: call `check_server` first.

    Raises:
        InputError: the gateway does not answer within a minute, or its answer is an error.
    """
    setup, state = _answer(GATEWAY_DEPLOYMENT, GATEWAY_APP, "setup")
    return setup, state


def check_options(config: ServeConfig, keys: Sequence[ApiKey], setup: "GatewaySetup", state: "GatewayConfig") -> None:
    """Refuse an update that would drop the API keys, and log options that it omits, which fall back to defaults.

    Args:
        config: options of the update.
        keys: API keys of the update.
        setup, state: what `served_gateway` returned.

    Raises:
        InputError: the server has keys, and neither keys nor `allow_anonymous` are given.
    """
    if setup.keys and not (keys or config.allow_anonymous):
        raise InputError(
            "the server has API keys, and this update has none, so it would answer without; give --api-keys FILE, or "
            "--allow-anonymous if it shall have none"
        )
    served = setup.limits.model_dump() | {name: getattr(setup, name) for name in setup.OPTIONS}
    served |= state.policy.model_dump() | state.routing.model_dump(exclude={"default", "split"})
    lost = {name: old for name, old in served.items() if name not in config.model_fields_set}
    changes = [
        f"{name} from {old} to {getattr(config, name)}" for name, old in lost.items() if old != getattr(config, name)
    ]
    if changes:
        logger.warning(
            "options that this update does not give fall back: %s; give them again to keep them", ", ".join(changes)
        )


def _answer(deployment: str, application: str, method: str) -> Any:
    """Call a method of a running deployment, and return its result.

    Raises:
        InputError: the deployment does not answer.
    """
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    handle = serve.get_deployment_handle(deployment, application)
    try:
        return getattr(handle, method).remote().result(timeout_s=_ANSWER_S)
    except (TimeoutError, RayError, RayServeException) as error:
        raise InputError(
            f"{deployment} of {application} does not answer ({connection.cause_of(error)}), so nothing was changed; see what "
            f"GET /readyz says, and try again once it runs"
        ) from None


def check_same_versions(kept: Mapping[str, tuple[str, VersionConfig]], fingerprints: Mapping[str, str]) -> None:
    """Refuse an update that would change a running version under its old name.

    Args:
        kept: name and options of each version of the update whose Ray Serve application already runs, by the name of
            the application.
        fingerprints: fingerprint of each version of the update, by the version's name.

    Raises:
        InputError: the retriever, index or corpus of a version changed, an option of its processes (such as
            num_replicas) changed, or it does not answer within a minute.
    """
    for each, (name, version) in kept.items():
        served = _answer(ENCODER_DEPLOYMENT, each, "describe")
        if served.fingerprint != fingerprints[name]:
            raise InputError(
                f"version {name!r} is served with another retriever, index or corpus; give the new one a name of its own"
            )
        asked = {option: value for option, value in version.processes().items() if served.processes[option] != value}
        other = [f"{option} = {served.processes[option]}, not {value}" for option, value in asked.items()]
        if other:
            raise InputError(
                f"version {name!r} runs with {'; '.join(other)}, and its processes would all start again; "
                f"leave that as it is, or give the same version under another name and let this one go"
            )


@contextlib.contextmanager
def sigterm_ends_it() -> Iterator[None]:
    """Make SIGTERM raise `Terminated` in the block, as Ctrl-C raises, so that an update that it ends is undone.

    The former handler is set again after the block. Outside the main thread, which alone gets signals, do nothing.
    """

    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(_: int, __: FrameType | None) -> None:
        raise termination.Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
