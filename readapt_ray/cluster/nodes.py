"""The nodes of the cluster that this process has joined, and how messages name them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from readapt_ray import hardware


def alive() -> list[dict[str, Any]]:
    """Return the nodes that are up, as Ray describes them."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def room_for(each: Mapping[str, float]) -> int:
    """Return how many workers that ask for so much the nodes that are up hold when they are idle."""
    return sum(room_on(node["Resources"], each) for node in alive())


def room_on(resources: Mapping[str, float], each: Mapping[str, float]) -> int:
    """Return how many of such workers a node holds."""
    return min((int(resources.get(name, 0.0) // amount) for name, amount in each.items() if amount), default=0)


def cores_per_process(num_processes: int) -> int:
    """Return the cores of this node that each of so many processes has, spread evenly over the nodes that have CPUs."""
    num_nodes = max(1, sum(bool(node["Resources"].get("CPU")) for node in alive()))
    return max(1, hardware.num_cores() // -(-num_processes // num_nodes))


def describe_nodes(nodes: Sequence[Mapping[str, Any]]) -> str:
    """The nodes by what they have, such as `2 nodes with 8 CPU and 1 GPU`."""
    kinds = Counter(
        " and ".join(
            f"{node['Resources'].get(name, 0):g} {name}" for name in ("CPU", "GPU") if node["Resources"].get(name)
        )
        or "nothing for tasks"
        for node in nodes
    )
    return (
        ", ".join(f"{count} {'node' if count == 1 else 'nodes'} with {what}" for what, count in kinds.items())
        or "no node"
    )
