"""Trains on a Ray cluster of its own, one of whose nodes is killed; for test_train_nodes.py.

python -m tests.stages.killed_node FOLDER replaced|lost|returned
"""

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from readapt_ray.stages.train import TrainConfig, train
from tests import factories

NUM_EPOCHS = {"replaced": 3, "lost": 3, "returned": 20}
"""The last takes so long that a node can start meanwhile."""
_NODE = {"num_cpus": 1, "object_store_memory": 100 << 20}


def main(folder: Path, then: str) -> None:
    """Train undisturbed into `calm`, unless a node is to return, and into `hit` with a node killed after the sixth checkpoint."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "object_store_memory": 100 << 20, "include_dashboard": False},
    )
    victims = [cluster.add_node(**_NODE) for _ in range(2)]
    cluster.wait_for_nodes()
    os.environ["RAY_ADDRESS"] = cluster.address
    base, blocks = factories.packed_corpus(folder)
    options: dict[str, Any] = {
        "pretrained": str(base),
        "corpus": str(blocks),
        "num_workers": 2,
        "num_cpus_per_worker": 1,
        "checkpoint_every_s": 0,
        "keep_checkpoints": 1000,
        # Dropout is drawn for each worker, so with another number of workers it is another one.
        "lora_dropout": 0.1 if then == "replaced" else 0.0,
        "learning_rate": 5e-3,
        "dtype": "float32",
        "num_epochs": NUM_EPOCHS[then],
    }
    if then != "returned":
        train(TrainConfig(**options, output=str(folder / "calm")))

    def kill() -> None:
        while not (folder / "hit" / "checkpoints" / "step-000000006.safetensors").exists():
            if done.wait(0.02):
                return
        cluster.remove_node(victims[1], allow_graceful=False)
        (folder / "killed").touch()
        while then == "returned" and not _has_row_of_one_worker(folder / "hit") and not done.wait(0.2):
            pass
        if then != "lost":
            replacements.append(_started_node(cluster.address))

    replacements: list[subprocess.Popen[bytes]] = []
    done = threading.Event()
    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    train(TrainConfig(**options, output=str(folder / "hit"), min_workers=None if then == "replaced" else 1))
    done.set()
    killer.join(timeout=60)
    for node in replacements:
        node.terminate()
        node.wait(timeout=60)
    ray.shutdown()
    cluster.shutdown()


def _has_row_of_one_worker(output: Path) -> bool:
    """Return whether a step was taken by one worker and kept."""
    return any('"num_workers": 1' in file.read_text() for file in sorted(output.glob("metrics/*.jsonl"))[-1:])


def _started_node(address: str) -> "subprocess.Popen[bytes]":
    """A node in a process of its own: Cluster.add_node sets signal handlers, which a thread may not."""
    command = ["ray", "start", "--block", "--address", address, "--num-cpus", str(_NODE["num_cpus"])]
    command += ["--object-store-memory", str(_NODE["object_store_memory"])]
    return subprocess.Popen(
        [str(Path(sys.executable).parent / command[0]), *command[1:]],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
