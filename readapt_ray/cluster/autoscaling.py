"""Ask Ray's autoscaler for GPU nodes while a stage needs them, and release them afterwards.

READAPT_NUM_GPUS says how many GPUs the cluster may grow to; without it, only nodes that are up are used. The request
lasts as long as the stage, so that the autoscaler replaces a lost spot node. Afterwards idle nodes end after the
autoscaler's idle_timeout_minutes.
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
"""Seconds to wait for all workers before a stage starts with fewer. Workers that come later cost a restart."""

_POLL_S = 1.0
_SAID_S = 20.0
_requests: dict[object, list[dict[str, float]]] = {}
"""Current requests of this process: the resources of each worker, by request."""
_REQUESTING = threading.Lock()


def may_grow(each: Mapping[str, float]) -> bool:
    """Return whether the autoscaler may add nodes for such workers: they need GPUs and READAPT_NUM_GPUS is set.

    Args:
        each: resources of one worker, such as `{"CPU": 1, "GPU": 1}`.
    """
    return bool(each.get("GPU")) and environment.num_gpus() is not None


@contextlib.contextmanager
def requested(
    num_workers: int, each: Mapping[str, float], *, least: int, patience_s: float = 0.0, check_versions: bool = True
) -> Iterator[None]:
    """Request nodes for these workers from the autoscaler while the block runs; wait for them before the block starts.

    Without an autoscaler (see `may_grow`), the block starts at once, also without room for the workers. When the block
    ends, the request is withdrawn, and idle nodes end later.

    Args:
        num_workers: number of workers that are wanted.
        each: resources of one worker, such as `{"CPU": 1, "GPU": 1}`.
        least: fewest workers that the block can start with.
        patience_s: seconds to wait for all workers before the block starts with at least `least`; 0 starts as soon as
            these fit.
        check_versions: refuse new nodes whose package versions differ from the driver's, or whose GPUs cannot be used.

    Raises:
        PlacementError: nodes for `least` did not come within READAPT_WAIT_S seconds, or are refused.
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
    """Add or remove a request, and send the largest of all to the autoscaler.

    The autoscaler only keeps the last request of a process, but several stages may run at the same time.

    Args:
        request: key of the request.
        bundles: resources of each worker; None to remove the request.
    """
    from ray.autoscaler.sdk import request_resources

    with _REQUESTING:
        _requests.pop(request, None)
        if bundles is not None:
            _requests[request] = bundles
        request_resources(bundles=max(_requests.values(), key=len, default=[]))


def _wait(num_workers: int, each: Mapping[str, float], least: int, patience_s: float) -> None:
    """Wait until there is room for all workers, or after `patience_s` for `least` of them."""
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
