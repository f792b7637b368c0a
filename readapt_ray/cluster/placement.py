"""Decide where workers and actors run: how many, with which resources, and what happens while there is no room.

In: what the user asked for, and the nodes. Out: a count and the resources of each, or an error before anything starts.
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
"""Cores per actor where several share a GPU: one launches kernels, three tokenise."""
_SETTLE_S = 3.0
"""What a stage held is free again a second or two after it ends."""


@dataclass(frozen=True)
class Placement:
    """What the user asked for; None leaves the choice to us."""

    num_workers: int | None
    num_cpus_per_worker: int | None
    num_gpus_per_worker: float | None = None
    actors_per_gpu: int = 1
    """At most, where the user leaves the choice to us: as many as keep a GPU busy."""

    def gpu_share(self, num_cpus: int, num_gpus: int) -> float:
        """Return the part of a GPU that an actor takes: one alone, unless small models share it; 0 without GPUs.

        Each actor of a GPU needs some cores that tokenise for it.

        Args:
            num_cpus: of all nodes.
            num_gpus: of all nodes.
        """
        if not num_gpus:
            return 0.0
        if self.num_gpus_per_worker is not None:
            return self.num_gpus_per_worker
        fed = num_cpus // num_gpus // _CORES_PER_ACTOR
        return 1.0 / max(1, min(self.actors_per_gpu, fed))


def place_actors(wanted: Placement, num_pending: int) -> tuple[int, int, float]:
    """Return the number of actors, and the CPUs and GPUs of each.

    Raises:
        PlacementError: the cluster does not have that much.
    """
    total = connection.connect()
    num_cpus = wanted.num_cpus_per_worker or 1
    num_gpus = wanted.gpu_share(total.num_cpus, total.num_gpus)
    each = {"CPU": num_cpus, "GPU": num_gpus}
    num_workers = wanted.num_workers or max(1, min(room_for(each), num_pending))
    check_placement(num_workers, each, who="actors")
    return num_workers, num_cpus, num_gpus


def place_training(num_workers: int | None, num_cpus_per_worker: int | None) -> tuple[int, dict[str, float], bool]:
    """Return the number of workers, the resources of each, and whether each has a GPU.

    Raises:
        PlacementError: the cluster does not have that much.
    """
    count, resources = _training_workers(num_workers, num_cpus_per_worker)
    check_placement(count, resources, who="workers")
    return count, resources, "GPU" in resources


def num_training_workers(num_workers: int | None, num_cpus_per_worker: int | None) -> int:
    """Return the number of workers that `place_training` would place."""
    return _training_workers(num_workers, num_cpus_per_worker)[0]


def _training_workers(num_workers: int | None, num_cpus_per_worker: int | None) -> tuple[int, dict[str, float]]:
    """Return the number of workers and the resources of each.

    Default: one worker a GPU; without GPUs one worker that has all the cores of a machine to itself,
    since threads share weights and need no messages.
    """
    if connection.connect().num_gpus:
        resources = {"GPU": 1.0, "CPU": float(num_cpus_per_worker or 1)}
        return num_workers or max(1, room_for(resources)), resources
    most, share = largest_share(num_workers, [int(node["Resources"].get("CPU", 0)) for node in nodes.alive()])
    resources = {"CPU": float(num_cpus_per_worker or share)}
    return num_workers or max(1, min(most, room_for(resources))), resources


def room_for(each: Mapping[str, float]) -> int:
    """Return how many workers with these resources the idle nodes hold, with those that the autoscaler may add."""
    room = nodes.room_for(each)
    return (
        max(room, nodes.room_on({"GPU": environment.num_gpus() or 0}, {"GPU": each["GPU"]}))
        if autoscaling.may_grow(each)
        else room
    )


def check_placement(num_workers: int, each: Mapping[str, float], *, who: str) -> None:
    """Check before a stage starts that its workers fit on the nodes; log when they must wait for others to end.

    Where nodes were lost it waits 45 seconds for others in their place.

    Args:
        each: what a worker asks for, such as `{"CPU": 4, "GPU": 1}`.
        who: what to call them.

    Raises:
        PlacementError: the nodes do not have that much, even when idle.
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
            logger.warning(
                "%s each are asked for, and %s free: waiting for what else runs on this cluster", asked, have
            )
            return
        time.sleep(_FREE_POLL_S)


def check_asked(wanted: Placement, *, who: str) -> None:
    """Check what options ask for before anything else: on the cluster of RAY_ADDRESS or the Ray that runs, else on this machine.

    Args:
        wanted: nothing is checked of a choice that is left to us.
        who: what to call the workers.

    Raises:
        PlacementError: there is no room for so many, even on idle nodes.
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
def said_when_too_small(num_workers: int, each: Mapping[str, float], *, who: str) -> Iterator[None]:
    """Log once per minute, while the block runs, what is waited for if the remaining nodes lack room for it.

    Args:
        num_workers: how many the block cannot do without.
        each: what a worker asks for.
        who: what to call them.
    """
    stop = threading.Event()
    thread = threading.Thread(target=_watch_room, args=(num_workers, each, who, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(_ROOM_JOIN_S)  # where Ray has ended, what asks it for its nodes waits for a minute


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


def largest_share(num_workers: int | None, cpus: Sequence[int]) -> tuple[int, int]:
    """Return the number of workers (one per node with CPUs unless given) and the most CPUs that each can have.

    Args:
        num_workers: what the user asked for.
        cpus: of each node.
    """
    count = num_workers or max(1, sum(each > 0 for each in cpus))
    fits = (share for share in range(max(cpus, default=0), 1, -1) if sum(each // share for each in cpus) >= count)
    return count, next(fits, 1)
