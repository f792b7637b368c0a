"""Check that the nodes' clocks agree and that nodes reach each other; measure an all-reduce over all workers."""

import time
from collections.abc import Mapping
from typing import Any

from readapt_ray import leases
from readapt_ray.cluster.doctor.findings import Finding, Problem, failed
from readapt_ray.cluster.doctor.inspector import Exchange
from readapt_ray.cluster.nodes import answers
from readapt_ray.errors import first_line
from readapt_ray.progress import amount

CLOCK_S = 2.0
CONNECT_S = 3.0
READY_S = 3.0
EXCHANGE_S = 15.0

_NUM_QUESTIONS = 3
_LARGE_OFFSET_S = 2.0
_SLOW_BYTES_PER_S = 0.1e9
_CLOCK_ADVICE = "start chrony or ntpd there: heartbeats of leases and signatures of S3 requests are timed"


def check_clock(inspector: Any) -> Finding:
    """Compare a node's clock with the driver's: warn from 2 s of difference, fail from 30 s (`leases.STALE_S`).

    The difference is the smallest of three tries, without the time of the round trip. A node fails that answers none
    of the three within 2 s.

    Args:
        inspector: an `Inspector` actor on the node.
    """
    import ray

    offsets, reason = [], ""
    for _ in range(_NUM_QUESTIONS):
        asked_s = time.time()
        try:
            there_s = ray.get(inspector.now.remote(), timeout=CLOCK_S)
        except ray.exceptions.RayError as error:
            reason = first_line(error)
            continue
        answered_s = time.time()
        offsets.append(max(there_s - answered_s, 0.0) + min(there_s - asked_s, 0.0))
    if not offsets:
        return failed(f"its clock was not told: {reason}; run doctor again")
    offset = min(offsets, key=abs)
    shown = f"{offset:+.1f} s" if offset else "ok"
    if abs(offset) < _LARGE_OFFSET_S:
        return Finding(shown)
    text = f"its clock is {abs(offset):.0f} s {'ahead of' if offset > 0 else 'behind'} the driver's; {_CLOCK_ADVICE}"
    return Finding(shown, (Problem(text, fails=abs(offset) >= leases.STALE_S),))


def check_network(inspectors: Mapping[str, Any], gpu_workers: Mapping[str, Any]) -> dict[str, Finding]:
    """Connect every node with every other node, then measure an all-reduce over all workers.

    If a connection fails, the all-reduce is left out. Workers that do not answer within 3 s take no part.

    Args:
        inspectors: one inspector per node, by the node's name.
        gpu_workers: one inspector per GPU, by GPU number and node. Empty on a cluster without GPUs: then `inspectors`
            are the workers.

    Returns:
        Findings by name: "connections" (with several nodes), "all-reduce" (with several workers, or a GPU), and "GPUs"
        if some GPUs gave no worker.
    """
    found = {}
    if len(inspectors) > 1:
        found["connections"] = _check_connections(inspectors)
        if found["connections"].problems:
            return found
    workers = _ready(gpu_workers or inspectors)
    late = sorted(set(gpu_workers) - set(workers))
    if len(workers) > bool(not gpu_workers):  # one worker without a GPU has nothing to try
        found["all-reduce"] = _check_all_reduce(list(workers.values()), is_on_gpus=bool(gpu_workers))
    if late:
        text = (
            f"{', '.join(late)} gave no worker: in use by another job, or failed; wait, or look with nvidia-smi there"
        )
        found["GPUs"] = Finding(f"{len(workers)} of {len(gpu_workers)} free", (Problem(text, fails=False),))
    return found


def _ready(workers: Mapping[str, Any]) -> dict[str, Any]:
    said = answers({name: worker.now.remote() for name, worker in workers.items()}, timeout_s=READY_S)
    return {name: worker for name, worker in workers.items() if isinstance(said[name], float)}


def _check_connections(inspectors: Mapping[str, Any]) -> Finding:
    said = answers({name: each.listen.remote() for name, each in inspectors.items()}, timeout_s=READY_S)
    addresses = {name: address for name, address in said.items() if isinstance(address, tuple)}
    asked = {name: inspectors[name].unreachable.remote(list(addresses.values()), CONNECT_S) for name in addresses}
    blind: dict[str, list[str]] = {}
    for name, places in answers(asked, timeout_s=CONNECT_S + READY_S).items():
        for place in places if isinstance(places, list) else []:
            blind.setdefault(list(addresses)[place], []).append(name)
    problems = [
        Problem(
            f"{target} cannot be reached on TCP port {addresses[target][1]} from {', '.join(sources)}; open all TCP ports "
            f"between the nodes (security group, NetworkPolicy, firewall)"
        )
        for target, sources in blind.items()
    ]
    return Finding("fails" if problems else f"each of {len(addresses)} nodes reaches each other", tuple(problems))


def _check_all_reduce(workers: list[Any], *, is_on_gpus: bool) -> Finding:
    import ray

    advice = (
        "set NCCL_SOCKET_IFNAME to the nodes' network, see to shared memory, and look into it with NCCL_DEBUG=INFO"
        if is_on_gpus
        else "set GLOO_SOCKET_IFNAME to the nodes' network"
    )
    count = len(workers)
    try:
        meeting = ray.get(workers[0].open_store.remote(count, EXCHANGE_S), timeout=READY_S + EXCHANGE_S)
    except ray.exceptions.RayError as error:
        return failed(f"workers cannot meet: {_last_line(error)}; {advice}")
    started = {
        str(rank): worker.all_reduce.remote(rank, count, meeting, EXCHANGE_S) for rank, worker in enumerate(workers)
    }
    said = answers(started, timeout_s=EXCHANGE_S)
    measured = [each for each in said.values() if isinstance(each, Exchange)]
    if len(measured) < count:
        errors = [each for each in said.values() if not isinstance(each, Exchange)]
        told = [each for each in errors if not isinstance(each, ray.exceptions.GetTimeoutError)]
        reason = _last_line(told[0]) if told else f"no answer within {EXCHANGE_S:g} s"
        return failed(f"{count - len(measured)} of {amount(count, 'workers')} did not finish: {reason}; {advice}")
    slowest = min(each.bytes_per_s for each in measured)
    shown = f"{amount(count, 'workers')} by {measured[0].backend}, {slowest / 1e9:.2f} GB/s"
    if count > 1 and slowest < _SLOW_BYTES_PER_S:
        text = f"{slowest / 1e6:.0f} MB/s is slow: gradients wait for the network; use nodes of one zone with 10 Gbit/s"
        return Finding(shown, (Problem(text, fails=False),))
    return Finding(shown)


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].strip()
