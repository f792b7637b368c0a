"""Deploy applications on this Ray and wait until they are up; log what is pending, and raise what did not start."""

import logging
import time
from collections.abc import Collection, Mapping
from typing import Any

from readapt_ray.errors import ReadaptError
from readapt_ray.serving.names import GATEWAY_APP, GATEWAY_DEPLOYMENT

logger = logging.getLogger("readapt_ray")

_POLL_S = 0.2
_SAID_S = 30.0


def ray_serve() -> Any:
    """Return the module `ray.serve`, after setting its logger to errors alone: it would fill the user's terminal."""
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    return serve


def deploy(applications: Mapping[str, Any]) -> None:
    """Deploy these applications together, and wait without a limit until all are up; without any, do nothing.

    An application that runs under the same name is replaced; others keep running. A log line every 30 s says what is
    pending.

    Args:
        applications: bound applications, by name. The gateway gets the path `/`, others get none.

    Raises:
        ReadaptError: a process of an application did not start.
    """
    if not applications:
        return
    from ray.serve.api import RunTarget

    targets = [
        RunTarget(
            target=each,
            name=name,
            route_prefix="/" if name == GATEWAY_APP else None,
            logging_config={"enable_access_log": False},
        )
        for name, each in applications.items()
    ]
    ray_serve().run_many(targets, wait_for_applications_running=False)
    said_s = time.monotonic()
    while pending := _pending(applications):
        if time.monotonic() > said_s + _SAID_S:
            said_s = time.monotonic()
            logger.info("waiting for %s", "; ".join(pending))
        time.sleep(_POLL_S)


def wait_for_old_gateways(seconds: float) -> None:
    """Wait until the gateways that an update replaced have answered their requests, for at most `seconds`.

    If they end in time, nothing uses the versions that the update leaves out. Else it returns all the same.
    """
    deadline_s = time.monotonic() + seconds
    while time.monotonic() < deadline_s:
        gateways = ray_serve().status().applications[GATEWAY_APP].deployments[GATEWAY_DEPLOYMENT]
        if set(gateways.replica_states) <= {"RUNNING"}:
            return
        time.sleep(_POLL_S)


def delete(applications: Collection[str]) -> None:
    """Remove these applications from this Ray, if they exist, and wait until they are gone."""
    for each in applications:
        ray_serve().delete(each)


def _pending(applications: Collection[str]) -> list[str]:
    """Return the applications that are not up yet, each with Ray Serve's message about it.

    Raises:
        ReadaptError: an application failed to start.
    """
    pending = []
    found = ray_serve().status().applications
    for name in applications:
        there = found.get(name)
        if there is not None and there.status == "RUNNING":
            continue
        said = last_lines(there.deployments) if there is not None else {}
        if there is not None and there.status == "DEPLOY_FAILED":
            raise ReadaptError(f"the server could not start: {next(iter(said.values()), there.message)}")
        pending.append(", ".join([name, *(f"{part}: {line}" for part, line in said.items())]))
    return pending


def last_lines(deployments: Mapping[str, Any]) -> dict[str, str]:
    """Return the last line of Ray Serve's message about each deployment that has one, by the deployment's name.

    Args:
        deployments: as in the status of an application in `serve.status()`.
    """
    lines = {
        name: [line.strip() for line in each.message.splitlines() if line.strip()] for name, each in deployments.items()
    }
    return {name: each[-1] for name, each in lines.items() if each}
