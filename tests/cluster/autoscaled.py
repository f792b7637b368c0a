"""Embeds on a cluster of Ray's fake nodes, whose autoscaler (version 2) brings and takes them; for test_autoscaling.py.

RAY_AUTH_MODE=token RAY_AUTH_TOKEN=... python -m tests.cluster.autoscaled FOLDER

Writes FOLDER/said.json. Ray's own AutoscalingCluster wants a file that its wheel lacks, and stops every Ray of the machine.
The GPUs are made up: the nodes say that they have one each, encoders compute on CPUs, and workers do not look for GPUs.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from tests import factories
from tests.chaos import nodes as processes

_HEAD_ID = "f" * 51 + "00000"
_HEAD_TYPE = "ray.head.default"
_PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
_LISTS = (
    *(f"{part}setup_commands" for part in ("", "head_", "worker_")),
    *("initialization_commands", "head_start_ray_commands", "worker_start_ray_commands"),
    *("cluster_synced_files", "rsync_exclude", "rsync_filter"),
)
"""What Ray reads from every cluster file, and a fake node has no use for."""
_OBJECT_STORE_BYTES = 100 << 20
_WITHOUT_GPUS = """
import sys
if 'default_worker' in str(sys.orig_argv):
    from readapt_ray.cluster import gpus
    gpus.why_unusable = lambda wanted: ""
"""
_LET_GO_S = 120


def cluster_config(port: int) -> dict[str, Any]:
    """A head, and a group of at most two nodes with a GPU each, which end after 12 idle seconds."""
    provider = {
        "type": "external",
        "module": _PROVIDER,
        "gcs_address": f"127.0.0.1:{port}",
        "head_node_id": _HEAD_ID,
        **dict.fromkeys(
            ("disable_node_updaters", "disable_launch_config_check", "use_internal_ips", "launch_multiple"), True
        ),
    }
    resources = {"CPU": 1, "GPU": 1, "object_store_memory": _OBJECT_STORE_BYTES}
    return {
        **{name: {} for name in ("docker", "file_mounts")},
        **{name: [] for name in _LISTS},
        "cluster_name": "fake",
        "max_workers": 2,
        "idle_timeout_minutes": 0.2,
        "upscaling_speed": 1.0,
        "provider": provider,
        "auth": {"ssh_user": "x"},
        "head_node_type": _HEAD_TYPE,
        "available_node_types": {
            _HEAD_TYPE: {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
            "gpu": {"resources": resources, "node_config": {}, "min_workers": 0, "max_workers": 2},
        },
        "file_mounts_sync_continuously": False,
    }


def start_head(folder: Path, port: int, temp: str) -> "subprocess.Popen[bytes]":
    """Start the head with its autoscaler."""
    (folder / "cluster.json").write_text(json.dumps(cluster_config(port)))
    command = [
        Path(sys.executable).parent / "ray",
        "start",
        "--head",
        "--block",
        f"--port={port}",
        f"--temp-dir={temp}",
    ]
    command += ["--num-cpus=1", "--node-ip-address=127.0.0.1", "--include-dashboard=false"]
    command += [f"--object-store-memory={_OBJECT_STORE_BYTES}", f"--autoscaling-config={folder / 'cluster.json'}"]
    (folder / "sitecustomize.py").write_text(_WITHOUT_GPUS)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": _HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD_ID,
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    with (folder / "head.log").open("wb") as log:
        head = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    processes.wait_for(port)
    return head


class Watcher(threading.Thread):
    """Counts the GPU nodes twice a second, and kills the raylet of one once a shard is written."""

    def __init__(self, head: "subprocess.Popen[bytes]", vectors: Path) -> None:
        super().__init__(daemon=True)
        self.counts: list[int] = []
        self.killed_at: int | None = None
        self.done = threading.Event()
        self._head, self._vectors = head, vectors

    def run(self) -> None:
        """Watch until `done` is set."""
        while not self.done.wait(0.5):
            self.counts.append(num_gpu_nodes())
            if self.killed_at is None and self.counts[-1] == 2 and list(self._vectors.glob("part-*")):
                raylets = [each for each in processes.family(self._head) if each.name() == "raylet"]
                youngest = max(raylets, key=lambda each: each.create_time())
                processes.kill([youngest])
                self.killed_at = len(self.counts)


def num_gpu_nodes() -> int:
    """Count the nodes that are up and have a GPU."""
    import ray

    return sum(bool(node["Alive"] and node["Resources"].get("GPU")) for node in ray.nodes())


def main(folder: Path) -> None:
    """Embed, and tell how many GPU nodes there were before, meanwhile and afterwards."""
    import ray

    port = processes.free_port()
    os.environ.update(RAY_ADDRESS=f"127.0.0.1:{port}", READAPT_NUM_GPUS="2")
    retriever = factories.write_contract(
        factories.full_retriever(folder / "retriever", factories.tiny_decoder(folder / "b"))
    )
    corpus = factories.ingest_artifact(folder / "corpus", factories.small_corpus(3000))
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as temp:
        head = start_head(folder, port, temp)
        try:
            said = embedded(folder, head, retriever, corpus)
        finally:
            ray.shutdown()
            processes.kill([*processes.family(head), psutil.Process(head.pid)])
            head.wait()
    (folder / "said.json").write_text(json.dumps(said, indent=2) + "\n")


def embedded(folder: Path, head: "subprocess.Popen[bytes]", retriever: Path, corpus: Any) -> dict[str, Any]:
    """Embed and count; then let doctor start the GPU nodes once more."""
    from readapt_ray.cluster import connection, doctor, nodes
    from readapt_ray.stages.embed import EmbedConfig, embed

    connection.connect()
    before = num_gpu_nodes()
    watcher = Watcher(head, folder / "vectors" / "vectors")
    watcher.start()
    options = {"retriever": str(retriever), "corpus": str(folder / "corpus"), "output": str(folder / "vectors")}
    artifact = embed(EmbedConfig(**options, rows_per_shard=4, dtype="float32"))
    ended_s = time.monotonic()
    while num_gpu_nodes() and time.monotonic() - ended_s < _LET_GO_S:
        time.sleep(0.5)
    watcher.done.set()
    watcher.join(timeout=10)
    after = num_gpu_nodes()
    nodes.name_of = lambda node: str(node["NodeID"])  # ids of fake nodes begin alike
    report = doctor.examine(doctor.DoctorConfig(cluster=True, gpus=True))
    return {
        "before": before,
        "counts": watcher.counts,
        "killed_at": watcher.killed_at,
        "let_go_s": time.monotonic() - ended_s,
        "after": after,
        "doctor": report.text(),
        "num_vectors": artifact.manifest.counts["num_vectors"],
        "gpus": artifact.manifest.hardware["cluster"]["gpus"],
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
