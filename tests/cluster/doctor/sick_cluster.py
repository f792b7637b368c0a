"""Lets doctor look at a Ray cluster of its own with sick nodes; for test_cluster.py.

python -m tests.cluster.doctor.sick_cluster FOLDER COMMAND...

Node 1 has another torch and a clock that is ahead, a disk of node 2 hangs, node 3 answers nobody. Prints, as JSON, the
nodes by name, the seconds that the command took and its exit code.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from readapt_ray import cli
from readapt_ray.cluster import nodes

_NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 100 << 20}
_SICK = {
    "ahead": """
import importlib.metadata, time
version, now = importlib.metadata.version, time.time
importlib.metadata.version = lambda name: "2.0.0" if name == "torch" else version(name)
time.time = lambda: now() + 100
""",
    "hangs": "import shutil, time; shutil.disk_usage = lambda folder: time.sleep(3600)",
}
_WORKERS_ONLY = "import sys\nif 'default_worker' in str(sys.orig_argv): exec({!r})\n"


def main(folder: Path, command: list[str]) -> None:
    """Start the nodes, and let doctor look."""
    cluster = Cluster(initialize_head=True, head_node_args={**_NODE, "include_dashboard": False})
    started = {"well": cluster.head_node}
    for sickness, code in _SICK.items():
        (folder / sickness).mkdir()
        (folder / sickness / "sitecustomize.py").write_text(_WORKERS_ONLY.format(code))
        path = os.pathsep.join([str(folder / sickness), os.environ["PYTHONPATH"]])
        started[sickness] = cluster.add_node(**_NODE, env_vars={"PYTHONPATH": path})
    started["silent"] = cluster.add_node(**_NODE)
    cluster.wait_for_nodes()
    os.environ["RAY_ADDRESS"] = cluster.address
    raylet = started["silent"].all_processes["raylet"][0].process.pid
    os.kill(raylet, signal.SIGSTOP)
    began_s = time.monotonic()
    try:
        code = cli.main(command)
        seconds = time.monotonic() - began_s
        names = {node["NodeID"]: nodes.name_of(node) for node in ray.nodes()}
    finally:
        os.kill(raylet, signal.SIGCONT)
    by_name = {sickness: names[node.node_id] for sickness, node in started.items()}
    print(json.dumps({"names": by_name, "seconds": seconds, "code": code}))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
