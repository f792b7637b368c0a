"""Start, update and stop a server on this Ray: the command `readapt serve`.

`serve` first checks all options and artifacts. Then it starts the versions, then the gateway, and waits until requests
can be answered. With `update` it changes a running server: new versions start beside the old ones, the gateway switches
to them between two requests, and then the versions stop that are no longer listed.
"""

import contextlib
import http.client
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import urllib.error
from collections.abc import Collection
from types import FrameType

import yaml

from readapt_ray.cluster import connection
from readapt_ray.errors import ArtifactConflictError, InputError, ReadaptError, first_line
from readapt_ray.retrieval.passage_store import PassageStore
from readapt_ray.serving import app, domain_app, haproxy, report_gate, rollout, room, server_file, updates
from readapt_ray.serving.keys import ApiKey, out_of_environment, read_keys
from readapt_ray.serving.local_http import open_url
from readapt_ray.serving.names import GATEWAY_APP, GATEWAY_DEPLOYMENT
from readapt_ray.serving.options import ServeConfig, is_loopback
from readapt_ray.serving.versions import shortened
from readapt_ray.storage import Location

logger = logging.getLogger("readapt_ray")

_ANSWER_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 30.0
_POLL_S = 0.1
_GIVE_UP_S = 5.0
_UPDATE_S = 600.0
"""Seconds within which the gateways of an update must start; otherwise the update is undone."""


def serve(config: ServeConfig, *, blocking: bool = True) -> str:
    """Start a server and serve until Ctrl-C or SIGTERM, then stop it; without `blocking`, return once it is ready.

    Without `blocking`, the caller stops it by `stop`. With `update`, change a running server and return when the change
    is complete; if it fails, the server is as before. With `write_config`, write the file and start nothing.

    Returns:
        The base URL, such as `http://127.0.0.1:8000`; with `write_config`, the path of the file.

    Raises:
        InputError: nothing was started. The port is taken; this Ray serves already (with `update`: serves nothing);
            other machines could ask without API keys; the exporter of traces is not installed; a retriever, index or
            corpus cannot be used or does not fit; the nodes have no room; or recall cannot be measured.
        ArtifactConflictError: the file of `write_config` exists, and `readapt serve` did not write it.
        ReadaptError: a replica could not start, or the server is not ready within a minute after all have started.
    """
    versions = config.each_version()
    keys = read_keys(config.api_keys)
    if config.write_config:
        file = Location(config.write_config)
        _refuse_foreign_config(file)
        file.write_text(yaml.safe_dump(app.serve_config(config), sort_keys=False))
        return config.write_config
    fingerprints = _checked(config, keys)
    # Open the corpora first: an unreadable one stops this before anything is deployed, and each is copied only once.
    searched = (versions | config.domain_indexes()).values()
    stores = [PassageStore.open(each.corpus) for each in searched if each.corpus]
    url = f"http://{_reachable(config.host)}:{config.port}"
    with out_of_environment():
        _deploy(config, keys, url, fingerprints)
        if not config.update:
            haproxy.watch(_reachable(config.host), config.port)
    stores.clear()
    who = f"{len(keys)} API keys" if keys else "no API keys: this machine alone is answered"
    logger.info("serving %s at %s (%s)", shortened(config.names()), url, "anybody" if config.allow_anonymous else who)
    if blocking and not config.update:
        try:
            _say_how_to_update(config.port)
            _wait_for_signal()
            server_file.remove(config.port)
            _end_where_ray_ends()
            _drain(config.drain_s)
        finally:  # a second Ctrl-C ends the wait for requests; gateways that refuse all requests must not stay
            server_file.remove(config.port)
            stop()
    return url


def _checked(config: ServeConfig, keys: tuple[ApiKey, ...]) -> dict[str, str]:
    """Check everything that can be checked before a start; return the fingerprint of each version."""
    versions = config.each_version()
    if not (keys or config.allow_anonymous or is_loopback(config.host)):
        raise InputError(
            f"host = {config.host!r} would answer other machines, and there are no API keys; give --api-keys FILE, "
            f"or --allow-anonymous where a proxy or a firewall controls access"
        )
    if config.traces:
        from readapt_ray.serving.spans import check_exporter

        check_exporter()
    if not config.update:
        _check_port(config.host, config.port)
    domain_app.check_indexes(config, domain_app.domain_records(config))
    fingerprints = {name: app.check_version(name, each) for name, each in versions.items()}
    app.check_probe(config)
    app.check_keys(config, keys)
    if config.require_report:
        report_gate.check_report(config.require_report, versions)
    return fingerprints


def _say_how_to_update(port: int) -> None:
    import ray

    variables = server_file.write(port, ray.get_runtime_context().gcs_address)
    named = " ".join(f"{name}={value}" for name, value in variables.items())
    logger.info(
        "to change it: %s readapt serve --update --port %d ... (on this machine the port is enough)", named, port
    )


def _refuse_foreign_config(file: Location) -> None:
    """Refuse to overwrite a file that `readapt serve` did not write.

    Raises:
        ArtifactConflictError: the file exists, and is no config of our applications.
    """
    if not file.exists():
        return
    try:
        imports = [each["import_path"] for each in yaml.safe_load(file.read_bytes())["applications"]]
        is_ours = bool(imports) and all(each.startswith(f"{app.__name__}:") for each in imports)
    except (OSError, yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError):
        is_ours = False
    if not is_ours:
        raise ArtifactConflictError(
            f"write_config = {str(file)!r} is there, and `readapt serve` did not write it; give another file"
        )


def _deploy(config: ServeConfig, keys: tuple[ApiKey, ...], url: str, fingerprints: dict[str, str]) -> None:
    import ray

    if config.update and not ray.is_initialized():
        server_file.join(config.port)
    if not sys.stderr.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # no colour codes in a file of logs
    with haproxy.preferred(config.host, config.timeout_s):
        connection.connect()
    if config.update:
        with updates.alone():
            running = set(rollout.ray_serve().status().applications)
            _deploy_update(config, keys, url, running, fingerprints)
        return
    if rollout.ray_serve().status().applications:
        raise InputError(
            "this Ray cluster serves an app already; change it with --update, stop it, or use another cluster"
        )
    try:
        wanted = app.applications(config)
        room.check_room([each for _, each in wanted.values()])
        _start_proxies(config)
        versions = {name: app.bind_version(*given) for name, given in wanted.items()}
        rollout.deploy(versions | {GATEWAY_APP: app.bind_gateway(*app.gateway_of(config, keys))})
        _wait_until_ready(url)
    except BaseException as error:
        found = _described(error)
        stop()
        raise found from None


def _start_proxies(config: ServeConfig) -> None:
    """Start the HTTP proxies of Ray Serve on the port.

    Raises:
        ReadaptError: a proxy did not start in time.
    """
    from ray.exceptions import RayError
    from ray.serve.config import HTTPOptions

    try:
        rollout.ray_serve().start(http_options=HTTPOptions(host=config.host, port=config.port))
    except RayError as error:
        raise ReadaptError(
            f"the server could not start: Ray Serve's HTTP proxy did not come up ({connection.cause_of(error)}); "
            f"where the machine is busy with other work, try again when it is not"
        ) from None


def _deploy_update(
    config: ServeConfig, keys: tuple[ApiKey, ...], url: str, running: set[str], fingerprints: dict[str, str]
) -> None:
    """Change a running server to these options; if that fails, undo it."""
    wanted = app.applications(config)
    updates.check_server(config, running)
    former = updates.served_gateway()
    updates.check_options(config, keys, *former)
    kept = {each: wanted[each] for each in {app.version_app_name(name) for name in fingerprints} & running}
    updates.check_same_versions(kept, fingerprints)
    added = [each for each in wanted if each not in running]
    room.check_room([wanted[each][1] for each in added])
    is_gateway_changed = False
    try:
        with updates.sigterm_ends_it():
            setup, state = app.gateway_of(config, keys)
            rollout.deploy({each: app.bind_version(*wanted[each]) for each in added})
            is_gateway_changed = True
            state = state.model_copy(update={"whole_until_s": time.time() + _UPDATE_S})
            rollout.deploy({GATEWAY_APP: app.bind_gateway(setup, state)})
            _wait_until_ready(url, [name for name, _ in kept.values()])
    except BaseException as error:
        found = _described(error)
        logger.warning(
            "the update is undone: %s", first_line(found) if isinstance(found, Exception) else "it was ended"
        )
        try:
            rollout.deploy({GATEWAY_APP: app.bind_gateway(*former)} if is_gateway_changed else {})
        finally:
            rollout.delete(added)
        raise found from None
    rollout.wait_for_old_gateways(former[0].limits.timeout_s)
    rollout.delete(running - set(wanted) - {GATEWAY_APP})


def _described(error: BaseException) -> BaseException:
    """Return the error to show to the user when a start failed."""
    if not isinstance(error, Exception) or isinstance(error, ReadaptError):
        return error
    return ReadaptError(f"the server could not start: {connection.cause_of(error)}")


def _drain(seconds: float) -> None:
    """Refuse new requests with 503, and wait for the running ones; after `seconds`, answer these with 503 too."""
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    deadline_s = time.monotonic() + seconds
    ended: set[str] = set()
    # Ray or the gateway may end meanwhile.
    with contextlib.suppress(RayError, RayServeException, TimeoutError, KeyError):
        deployment = rollout.ray_serve().status().applications[GATEWAY_APP].deployments[GATEWAY_DEPLOYMENT]
        gateways = rollout.ray_serve().get_deployment_handle(GATEWAY_DEPLOYMENT, GATEWAY_APP)
        # A call reaches any one gateway, so repeat it until each has reported that nothing runs.
        while len(ended) < sum(deployment.replica_states.values()) and time.monotonic() < deadline_s + _GIVE_UP_S:
            is_over = time.monotonic() > deadline_s
            gateway, num_under_way = gateways.stop_accepting.remote(give_up=is_over).result(timeout_s=_GIVE_UP_S)
            if not num_under_way:
                ended.add(gateway)
            time.sleep(_POLL_S)


def stop() -> None:
    """Stop serving and free the port; do nothing if nothing is served. Ray itself keeps running.

    All applications of this Ray Serve are stopped. Requests in progress are not drained first, as `serve` does.
    """
    import ray

    haproxy.unwatch()
    if not ray.is_initialized():
        return
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    serve_quietly = rollout.ray_serve()
    # serve.shutdown() alone waits inside a task of the controller, which dies while that task runs: Ray then prints an
    # error that nobody can act on. So stop the controller first, and call serve.shutdown() when it is gone.
    deadline_s = time.monotonic() + _STOP_TIMEOUT_S
    with contextlib.suppress(ValueError, ray.exceptions.RayActorError):
        ray.get(ray.get_actor(SERVE_CONTROLLER_NAME, SERVE_NAMESPACE).graceful_shutdown.remote(wait=False))
        while time.monotonic() < deadline_s:
            ray.get_actor(SERVE_CONTROLLER_NAME, SERVE_NAMESPACE)
            time.sleep(_POLL_S)
    serve_quietly.shutdown()


def _reachable(host: str) -> str:
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def _check_port(host: str, port: int) -> None:
    """Check that this machine can listen on the port; for a remote cluster, do nothing."""
    if os.environ.get("RAY_ADDRESS"):
        return
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(
                f"port {port} on {host} cannot be used: {error.strerror or error}; stop what listens there, or give another --port"
            ) from None


def _wait_until_ready(url: str, former: Collection[str] = ()) -> None:
    """Wait until every version works; after a minute, versions in `former` that do not work are only logged.

    Raises:
        ReadaptError: a new version does not work, or the server does not answer.
    """
    deadline_s = time.monotonic() + _ANSWER_TIMEOUT_S
    while broken := _not_ready(url):
        if time.monotonic() > deadline_s:
            named = "; ".join(f"{name}: {reason}" if name else reason for name, reason in broken.items())
            if set(broken) - set(former):
                raise ReadaptError(f"the server runs, but {url}/readyz does not say that it is ready: {named}")
            logger.warning("what was served before does not work: %s", named)
            return
        time.sleep(_POLL_S)


def _not_ready(url: str) -> dict[str, str]:
    """Return the reason of each version that is not ready, from /readyz; the name "" means the whole server."""
    try:
        with open_url(f"{url}/readyz", timeout=_ANSWER_TIMEOUT_S):
            return {}
    except urllib.error.HTTPError as error:
        with contextlib.suppress(ValueError, LookupError, AttributeError):
            versions = json.loads(error.read())["versions"]
            return {name: each["reason"] for name, each in versions.items() if not each["ready"]} or {"": str(error)}
        return {"": str(error)}
    except (OSError, http.client.HTTPException) as error:
        return {"": str(error)}


def _wait_for_signal() -> None:
    """Return on Ctrl-C or SIGTERM."""
    told = threading.Event()

    def tell(_: int, __: FrameType | None) -> None:
        told.set()

    before = {each: signal.signal(each, tell) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        while not told.wait(1.0):
            continue
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _end_where_ray_ends() -> None:
    """Watch Ray in a thread, and exit this process once Ray's processes on this machine have ended.

    A signal to a whole process group or service ends Ray too. An orderly stop, which needs Ray, is then impossible.
    """
    import ray

    node = ray._private.worker._global_node

    def watch() -> None:
        while not connection.has_ended():
            time.sleep(_POLL_S)
        node.kill_all_processes(check_alive=False)
        haproxy.remove_folders()
        os._exit(0)

    if node is not None:
        threading.Thread(target=watch, daemon=True).start()
