"""Refuse versions that do not fit on the nodes, before anything is deployed; Ray would let them wait forever."""

import time
from collections.abc import Mapping, Sequence

from readapt_ray.cluster import nodes
from readapt_ray.errors import InputError
from readapt_ray.serving import app
from readapt_ray.serving.options import VersionConfig
from readapt_ray.serving.slice_plan import planned_slices

_SETTLED_S = 10.0
_POLL_S = 0.2
_LAUNCHED = "ray.io/node-group"
"""Label of nodes that a cluster launcher or KubeRay started; these may start more nodes."""

Resources = Mapping[str, float]


def check_room(added: Sequence[VersionConfig]) -> None:
    """Check that each process of new versions fits on a node, beside the processes that run already.

    It retries for up to 10 s, since processes that have just ended release their resources late. A cluster that may
    start more nodes is not checked: `rollout.deploy` logs what waits.

    Args:
        added: options of the versions to start; of each, the minimum number of processes is counted.

    Raises:
        InputError: a process fits on no node.
    """
    from ray._private.state import available_resources_per_node

    asked = [each for config in added for each in _processes(config)]
    deadline_s = time.monotonic() + _SETTLED_S
    while True:
        up, available = nodes.alive(), available_resources_per_node()
        whole = {nodes.name_of(node): dict(node["Resources"]) for node in up}
        free = {nodes.name_of(node): available.get(node["NodeID"], {}) for node in up}
        homeless = _without_place(asked, free)
        if not homeless or any(_LAUNCHED in (node.get("Labels") or {}) for node in up):
            return
        # Processes that have just ended release their resources soon, so try again for a while.
        if _without_place(asked, whole) or time.monotonic() > deadline_s:
            raise InputError(_refusal(homeless[0], asked, free, whole))
        time.sleep(_POLL_S)


def _processes(config: VersionConfig) -> list[Resources]:
    """Return the resources that each process of a version asks for."""
    encoder: Resources = {"CPU": config.num_cpus_per_replica, "GPU": app.num_gpus(config)}
    slices: list[Resources] = [
        {
            "CPU": config.num_cpus_per_index_actor,
            "GPU": config.num_gpus_per_index_actor,
            "memory": float(part.num_bytes),
        }
        for part in planned_slices(config)
    ]
    return [encoder] * config.num_replicas + slices * config.index_replicas


def _without_place(asked: Sequence[Resources], free: Mapping[str, Resources]) -> list[Resources]:
    """Place each process on a node, largest first; return the processes that fit on none."""
    left = [dict(node) for node in free.values()]
    homeless = []
    for each in sorted(asked, key=lambda process: [process.get(name, 0.0) for name in ("GPU", "memory", "CPU")])[::-1]:
        node = next((node for node in left if _fits(each, node)), None)
        if node is None:
            homeless.append(each)
            continue
        for name, amount in each.items():
            node[name] = node.get(name, 0.0) - amount
    return homeless


def _fits(process: Resources, node: Resources) -> bool:
    return all(amount <= node.get(name, 0.0) + 1e-6 for name, amount in process.items())


def _refusal(
    process: Resources, asked: Sequence[Resources], free: Mapping[str, Resources], whole: Mapping[str, Resources]
) -> str:
    """Return an error message that says what is lacking: in total, or on each node for one process."""
    options = (
        "num_cpus_per_replica, num_gpus_per_replica, num_cpus_per_index_actor or num_gpus_per_index_actor, serve fewer versions, "
        "or take"
    )
    for name in ("CPU", "GPU", "memory"):
        total, left, there = (
            sum(each.get(name, 0.0) for each in every) for every in (asked, free.values(), whole.values())
        )
        if total > left + 1e-6:
            return (
                f"the new versions ask for {_amount(name, total)} {name}, and {_amount(name, left)} of {_amount(name, there)} are "
                f"free beside what runs already; lower {options} a machine with more"
            )
    per_node = "; ".join(f"{name} has {_described(process, node)}" for name, node in free.items())
    return (
        f"the new versions have a process of {_described(process, process)}, and no node has that free beside the others: "
        f"{per_node}; raise index_actors, which makes parts of an index smaller, lower {options} larger machines"
    )


def _described(names: Resources, amounts: Resources) -> str:
    return ", ".join(f"{_amount(name, amounts.get(name, 0.0))} {name}" for name, wanted in names.items() if wanted)


def _amount(resource: str, number: float) -> str:
    return f"{number / 2**30:.1f} GiB" if resource == "memory" else f"{number:g}"
