"""Describe the nodes of the cluster, and run functions on each of them."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from readapt_ray import hardware

_ROUNDING = 1e-6
"""Ray counts resources in steps of 1e-4."""


def alive() -> list[dict[str, Any]]:
    """Return the nodes that are up, as dicts of `ray.nodes()`. Ray must be connected."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def room_for(each: Mapping[str, float]) -> int:
    """Return how many workers fit on the nodes that are up, if these were idle; 0 if a worker needs nothing.

    Args:
        each: resources of one worker, such as `{"CPU": 1, "GPU": 0.5}`.
    """
    return sum(room_on(node["Resources"], each) for node in alive())


def room_on(resources: Mapping[str, float], each: Mapping[str, float]) -> int:
    """Return how many workers fit on one idle node; ten workers of 0.1 GPU fit on one GPU.

    Args:
        resources: all resources of the node, such as `{"CPU": 8.0, "GPU": 1.0}`.
        each: resources of one worker; amounts of 0 are ignored. If none is left, the result is 0.
    """
    return min(
        (int(resources.get(name, 0.0) / amount + _ROUNDING) for name, amount in each.items() if amount), default=0
    )


def cores_per_process(num_processes: int) -> int:
    """Return the cores of this node per process, at least 1, if processes are spread evenly over the nodes with CPUs.

    Args:
        num_processes: number of processes on all nodes.
    """
    num_nodes = max(1, sum(bool(node["Resources"].get("CPU")) for node in alive()))
    return max(1, hardware.num_cores() // -(-num_processes // num_nodes))


def describe_nodes(nodes: Sequence[Mapping[str, Any]]) -> str:
    """Describe the nodes in one line, grouped by the resources of each node.

    Such as `2 nodes with 8 CPU and 1 GPU, 1 node with 4 CPU`, where each of the 2 nodes has 8 CPU. A node with neither
    CPU nor GPU is `with nothing for tasks`. Without nodes the text is `no node`.

    Args:
        nodes: nodes as `ray.nodes()` returns them; only `Resources` is read, so pass nodes that are alive.
    """
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


def name_of(node: Mapping[str, Any]) -> str:
    """Return a node's address and the start of its Ray id: "10.0.0.1 (1a2b3c4d)". Several nodes may share a machine."""
    return f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})"


def only_on(node: Mapping[str, Any]) -> Any:
    """Return Ray's scheduling strategy for a task or actor that must run on this node; it fails if the node is gone."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)


def start_on_each(
    nodes: Sequence[Mapping[str, Any]], function: Callable[..., Any], *args: Any, max_calls: int = 0
) -> dict[str, Any]:
    """Start a function on each node; return the Ray reference to each result, by `name_of(node)`.

    Each call is a task that is bound to its node, reserves no CPU, and is not retried. It does not wait for them.

    Args:
        nodes: nodes as `ray.nodes()` lists them.
        function: the function to call.
        args: its arguments.
        max_calls: end the worker process after this many calls, so that no other task reuses it; 0 for no limit.
    """
    import ray

    started = {}
    for node in nodes:
        options = {"num_cpus": 0, "max_retries": 0, "max_calls": max_calls, "scheduling_strategy": only_on(node)}
        task = ray.remote(**options)(function)
        started[name_of(node)] = task.remote(*args)
    return started


def answers(started: Mapping[str, Any], *, timeout_s: float) -> dict[str, Any]:
    """Wait for Ray references; return by name the value of each, or the error of Ray that it ended with.

    Errors are returned, not raised: RayTaskError if the function raised, others if the process or node was lost.

    Args:
        started: references by name.
        timeout_s: seconds to wait for all of them; a result that is late becomes a `GetTimeoutError`.
    """
    import ray

    if started:
        ray.wait(list(started.values()), num_returns=len(started), timeout=timeout_s)
    found: dict[str, Any] = {}
    for name, reference in started.items():
        try:
            found[name] = ray.get(reference, timeout=0)
        except ray.exceptions.RayError as error:
            found[name] = error
    return found
