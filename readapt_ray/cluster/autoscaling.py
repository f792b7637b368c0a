"""Ask Ray's autoscaler for GPU nodes when a stage needs them, and release them when none does.

READAPT_NUM_GPUS says how many GPUs the cluster may grow to; without it the cluster is what is up. While a stage
runs, what it asked for is requested, so that a lost spot node is replaced; afterwards nothing is, and idle nodes end after
the autoscaler's idle_timeout_minutes.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Mapping

from readapt_ray import environment
from readapt_ray.cluster import connection, launcher, nodes
from readapt_ray.errors import PlacementError
from readapt_ray.progress import amount

logger = logging.getLogger("readapt_ray")

PATIENCE_S = 300.0
"""Seconds to wait for all workers before a stage begins with fewer. Workers that come later cost a restart."""

_POLL_S = 1.0
_SAID_S = 20.0
_requests: dict[object, list[dict[str, float]]] = {}
"""Resources that this process requests now, by request."""
_REQUESTING = threading.Lock()


def may_grow(each: Mapping[str, float]) -> bool:
    """Return whether the autoscaler may add nodes for workers with these resources."""
    return bool(each.get("GPU")) and environment.num_gpus() is not None


@contextlib.contextmanager
def requested(
    num_workers: int, each: Mapping[str, float], *, least: int, patience_s: float = 0.0, check_versions: bool = True
) -> Iterator[None]:
    """Ask the autoscaler for room for these workers while the block runs; enter the block once there is enough.

    Args:
        num_workers: how many are wanted; the block begins at once where all have room.
        each: what a worker asks for.
        least: how many the block can begin with.
        patience_s: how long to wait for all of them before it begins with fewer.
        check_versions: refuse nodes that do not run what the driver runs.

    Raises:
        PlacementError: nodes for `least` did not come within READAPT_WAIT_S seconds, or have other versions.
    """
    if not may_grow(each):
        yield
        return
    before = {node["NodeID"] for node in nodes.alive()}
    request = object()
    _note(request, [{name: size for name, size in each.items() if size}] * num_workers)
    try:
        _wait(num_workers, each, least, min(patience_s, environment.wait_s()))
        if check_versions:
            connection.check_alike([node for node in nodes.alive() if node["NodeID"] not in before])
        connection.connect()  # notes the new nodes for manifests
        yield
    finally:
        _note(request, None)


def _note(request: object, bundles: list[dict[str, float]] | None) -> None:
    """Tell the autoscaler the largest of all requests: it knows the last one only, and stages run side by side.

    Args:
        request: the key of one request.
        bundles: resources of each of its workers; None where it ends.
    """
    from ray.autoscaler.sdk import request_resources

    with _REQUESTING:
        _requests.pop(request, None)
        if bundles is not None:
            _requests[request] = bundles
        request_resources(bundles=max(_requests.values(), key=len, default=[]))


def _wait(num_workers: int, each: Mapping[str, float], least: int, patience_s: float) -> None:
    """Wait until there is room."""
    started_s, said_s = time.monotonic(), 0.0
    while (room := nodes.room_for(each)) < num_workers:
        waited_s = time.monotonic() - started_s
        if room >= least and waited_s >= patience_s:
            break
        if waited_s > environment.wait_s():
            raise PlacementError(
                f"{amount(least, 'GPUs')} {'is' if least == 1 else 'are'} needed and the autoscaler brought {room} within "
                f"{environment.wait_s():g} s (READAPT_WAIT_S): look at `ray status` for quota and capacity, or lower READAPT_NUM_GPUS"
                f"{launcher.described_failures()}"
            )
        if waited_s - said_s > _SAID_S:
            said_s = waited_s
            logger.info(
                "waiting for GPU nodes: room for %d of %d workers after %.0f s%s",
                room,
                num_workers,
                waited_s,
                launcher.described_failures(),
            )
        time.sleep(_POLL_S)
