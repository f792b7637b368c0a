"""Decide how many workers or actors run, and with which CPUs and GPUs; fail or wait if the cluster has no room.

In: the user's options, and the nodes. Out: the number of workers and the resources of each, or an error before anything
starts.
"""

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from readapt_ray import environment, hardware
from readapt_ray.cluster import autoscaling, connection, nodes
from readapt_ray.errors import PlacementError

logger = logging.getLogger("readapt_ray")

_POLL_S = 1.0
_FREE_POLL_S = 0.05
_REPLACEMENT_S = 45.0
_ROOM_POLL_S = 5.0
_ROOM_SAID_S = 20.0
_ROOM_LOG_S = 60.0
_ROOM_JOIN_S = 2.0
_CORES_PER_ACTOR = 4
"""Cores per actor if several actors share a GPU: one launches kernels, three tokenise."""
_SETTLE_S = 3.0
"""Wait this long for resources of an earlier stage: Ray frees them one or two seconds after it ends."""


@dataclass(frozen=True)
class Placement:
    """The user's options for workers; None lets the package choose."""

    num_workers: int | None
    num_cpus_per_worker: int | None
    num_gpus_per_worker: float | None = None
    actors_per_gpu: int = 1
    """Most actors on one GPU, if the package chooses: as many as a small model needs to keep a GPU busy."""

    def gpu_share(self, num_cpus: int, num_gpus: int) -> float:
        """Return how many GPUs each actor reserves: `num_gpus_per_worker` if set, else at most 1.0; 0.0 without GPUs.

        By default up to `actors_per_gpu` actors share a GPU, as long as the cluster has four cores for each of them:
        one core launches kernels, three tokenise.

        Args:
            num_cpus: CPUs of the cluster.
            num_gpus: GPUs of the cluster.
        """
        if not num_gpus:
            return 0.0
        if self.num_gpus_per_worker is not None:
            return self.num_gpus_per_worker
        fed = num_cpus // num_gpus // _CORES_PER_ACTOR
        return 1.0 / max(1, min(self.actors_per_gpu, fed))


def place_actors(wanted: Placement, num_pending: int) -> tuple[int, int, float]:
    """Return the number of actors, and the CPUs and GPUs (may be a fraction) of each; connect to Ray if needed.

    Without the option `num_workers`, as many actors as fit on idle nodes, including GPUs that the autoscaler may add.

    Args:
        wanted: the user's options. `num_workers` is returned as it is.
        num_pending: number of pieces of work; no more actors than this are chosen, but at least one.

    Raises:
        PlacementError: the cluster has no room for them, even when idle.
    """
    total = connection.connect()
    num_cpus = wanted.num_cpus_per_worker or 1
    num_gpus = wanted.gpu_share(total.num_cpus, total.num_gpus)
    each = {"CPU": num_cpus, "GPU": num_gpus}
    num_workers = wanted.num_workers or max(1, min(room_for(each), num_pending))
    check_placement(num_workers, each, who="actors")
    return num_workers, num_cpus, num_gpus


def place_training(num_workers: int | None, num_cpus_per_worker: int | None) -> tuple[int, dict[str, float], bool]:
    """Return the number of training workers, the resources of each, and whether each has a GPU.

    It connects to Ray if needed.

    Args:
        num_workers: the user's option; None for one per GPU, or without GPUs one per node.
        num_cpus_per_worker: the user's option; None for 1 with a GPU, else the node's CPUs divided by its workers.

    Raises:
        PlacementError: the cluster has no room for them, even when idle.
    """
    count, resources = _training_workers(num_workers, num_cpus_per_worker)
    check_placement(count, resources, who="workers")
    return count, resources, "GPU" in resources


def num_training_workers(num_workers: int | None, num_cpus_per_worker: int | None) -> int:
    """Return the number of training workers that `place_training` would choose, without a check of the room.

    It connects to Ray if needed.
    """
    return _training_workers(num_workers, num_cpus_per_worker)[0]


def _training_workers(num_workers: int | None, num_cpus_per_worker: int | None) -> tuple[int, dict[str, float]]:
    """Return the number of workers and the resources of each.

    Default: one worker per GPU; without GPUs one worker per node that has all its cores, since threads share weights
    and send no messages.
    """
    if connection.connect().num_gpus:
        resources = {"GPU": 1.0, "CPU": float(num_cpus_per_worker or 1)}
        return num_workers or max(1, room_for(resources)), resources
    most, share = workers_and_cpus(num_workers, [int(node["Resources"].get("CPU", 0)) for node in nodes.alive()])
    resources = {"CPU": float(num_cpus_per_worker or share)}
    return num_workers or max(1, min(most, room_for(resources))), resources


def room_for(each: Mapping[str, float]) -> int:
    """Return how many workers fit on idle nodes, including GPUs that the autoscaler may add.

    Args:
        each: resources of one worker, such as `{"CPU": 1, "GPU": 0.5}`.
    """
    room = nodes.room_for(each)
    return (
        max(room, nodes.room_on({"GPU": environment.num_gpus() or 0}, {"GPU": each["GPU"]}))
        if autoscaling.may_grow(each)
        else room
    )


def check_placement(num_workers: int, each: Mapping[str, float], *, who: str) -> None:
    """Check that the workers of a stage fit on the nodes; log a warning if they must wait for other work to end.

    If nodes were lost, wait up to 45 seconds for replacements. If the nodes lack room and the autoscaler may add enough
    GPUs, return at once. The check does not reserve anything.

    Args:
        num_workers: number of workers.
        each: resources of one worker, such as `{"CPU": 4, "GPU": 1}`.
        who: name of the workers in messages ("actors").

    Raises:
        PlacementError: the nodes have no room for the workers, even when idle.
    """
    import ray

    if autoscaling.may_grow(each) and nodes.room_for(each) < num_workers <= room_for(each):
        return
    asked = _asked(num_workers, each, who)
    lost_s: float | None = None
    while True:
        known = ray.nodes()
        up = [node for node in known if node["Alive"]]
        room = sum(nodes.room_on(node["Resources"], each) for node in up)
        if room >= num_workers:
            break
        lost_s = lost_s or time.monotonic()
        if len(up) == len(known) or time.monotonic() - lost_s > _REPLACEMENT_S:
            raise PlacementError(
                f"{asked} each cannot be placed: there is room for {room} on {nodes.describe_nodes(up)}; lower num_workers or "
                f"num_cpus_per_worker, or add nodes"
            )
        time.sleep(_POLL_S)
    wanted = {name: num_workers * amount for name, amount in each.items() if amount}
    settled_s = time.monotonic() + _SETTLE_S
    while any((free := ray.available_resources()).get(name, 0.0) < amount for name, amount in wanted.items()):
        if time.monotonic() > settled_s:
            have = " and ".join(f"{free.get(name, 0.0):g} {name}" for name in wanted)
            logger.warning("%s each are asked for, and %s free: waiting for other jobs to end", asked, have)
            return
        time.sleep(_FREE_POLL_S)


def check_user_placement(wanted: Placement, *, who: str) -> None:
    """Check early that the workers that the user's options ask for fit on the cluster, or else on this machine.

    The cluster is that of RAY_ADDRESS (which is joined for this), or the Ray that this process has joined. Otherwise it
    is this machine, and Ray is not started.

    Args:
        wanted: the user's options; without a number of workers or CPUs, nothing is checked.
        who: name of the workers in messages ("actors").

    Raises:
        PlacementError: the workers do not fit, even on idle nodes.
    """
    if wanted.num_workers is None and wanted.num_cpus_per_worker is None:
        return
    num_workers, num_cpus = wanted.num_workers or 1, wanted.num_cpus_per_worker or 1
    ray = sys.modules.get("ray")
    if os.environ.get("RAY_ADDRESS") or (ray and ray.is_initialized()):
        total = connection.connect()
        num_gpus = wanted.gpu_share(total.num_cpus, total.num_gpus)
        check_placement(num_workers, {"CPU": num_cpus, "GPU": num_gpus}, who=who)
        return
    import torch

    here = {"CPU": environment.num_cpus() or hardware.num_cores(), "GPU": torch.cuda.device_count()}
    each = {"CPU": num_cpus, "GPU": (wanted.num_gpus_per_worker or 1) if here["GPU"] else 0}
    if (room := nodes.room_on(here, each)) < num_workers:
        raise PlacementError(
            f"{_asked(num_workers, each, who)} each cannot be placed: there is room for {room} on this machine with "
            f"{nodes.describe_nodes([{'Resources': here}]).removeprefix('1 node with ')}; lower num_workers or num_cpus_per_worker, "
            f"or join a cluster (RAY_ADDRESS)"
        )


@contextlib.contextmanager
def warn_while_too_small(num_workers: int, each: Mapping[str, float], *, who: str) -> Iterator[None]:
    """While the block runs, log once per minute if the remaining nodes lack room for the workers that it needs.

    The first line comes after 20 s without room. The block is not stopped.

    Args:
        num_workers: fewest workers that the block needs.
        each: resources of one worker.
        who: name of the workers in messages ("actors").
    """
    stop = threading.Event()
    thread = threading.Thread(target=_watch_room, args=(num_workers, each, who, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(_ROOM_JOIN_S)  # if Ray has ended, the thread's request for nodes blocks for a minute


def _watch_room(num_workers: int, each: Mapping[str, float], who: str, stop: threading.Event) -> None:
    import ray

    small_s = 0.0
    while not stop.wait(_ROOM_POLL_S):
        try:
            up = nodes.alive()
        except (ray.exceptions.RayError, ConnectionError) as error:
            logger.debug("no answer about nodes: %s", error)
            continue
        room = sum(nodes.room_on(node["Resources"], each) for node in up)
        small_s = small_s + _ROOM_POLL_S if room < num_workers else 0.0
        if small_s and small_s % _ROOM_LOG_S == _ROOM_SAID_S:
            logger.warning(
                "%s each are needed and nodes were lost: there is room for %d on %s; waiting for others in their place",
                _asked(num_workers, each, who),
                room,
                nodes.describe_nodes(up),
            )


def _asked(num_workers: int, each: Mapping[str, float], who: str) -> str:
    return f"{num_workers} {who} of " + " and ".join(f"{amount:g} {name}" for name, amount in each.items() if amount)


def workers_and_cpus(num_workers: int | None, cpus: Sequence[int]) -> tuple[int, int]:
    """Return the number of workers, and the largest number of CPUs that each of them can have (1 if they do not fit).

    Workers do not span nodes: 3 workers on nodes of 8 and 4 CPUs get 4 each.

    Args:
        num_workers: the user's option; None for one worker per node with CPUs.
        cpus: CPUs of each node.
    """
    count = num_workers or max(1, sum(each > 0 for each in cpus))
    fits = (share for share in range(max(cpus, default=0), 1, -1) if sum(each // share for each in cpus) >= count)
    return count, next(fits, 1)
