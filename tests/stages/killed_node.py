"""Trains on a Ray cluster of its own, one of whose nodes is killed; for test_train_nodes.py.

python -m tests.stages.killed_node FOLDER replaced|lost
"""

import os
import sys
import threading
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

from readapt_ray.stages.pack import PackConfig, pack
from readapt_ray.stages.train import TrainConfig, train
from tests import factories

_NODE = {"num_cpus": 1, "object_store_memory": 100 << 20}


def main(folder: Path, then: str) -> None:
    """Train undisturbed into `calm`, and into `hit` with a node killed after the first checkpoint."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "object_store_memory": 100 << 20, "include_dashboard": False},
    )
    victims = [cluster.add_node(**_NODE) for _ in range(2)]
    cluster.wait_for_nodes()
    os.environ["RAY_ADDRESS"] = cluster.address
    base = factories.tiny_decoder(folder / "base")
    factories.ingest_artifact(folder / "corpus", factories.small_corpus(160))
    pack(
        PackConfig(
            pretrained=str(base),
            corpus=str(folder / "corpus"),
            output=str(folder / "blocks"),
            mode="packed",
            block_tokens=64,
        )
    )
    options: dict[str, Any] = {
        "pretrained": str(base),
        "corpus": str(folder / "blocks"),
        "num_workers": 2,
        "num_cpus_per_worker": 1,
        "checkpoint_every_steps": 5,
        "lora_dropout": 0.1,
        "learning_rate": 5e-3,
        "dtype": "float32",
        "num_epochs": 3,
    }
    train(TrainConfig(**options, output=str(folder / "calm")))

    def kill() -> None:
        while not list((folder / "hit" / "checkpoints").glob("step-*")):
            if done.wait(0.02):
                return
        cluster.remove_node(victims[1], allow_graceful=False)
        (folder / "killed").touch()
        if then == "replaced":
            cluster.add_node(**_NODE)

    done = threading.Event()
    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    train(TrainConfig(**options, output=str(folder / "hit"), min_workers=1 if then == "lost" else None))
    done.set()
    killer.join(timeout=60)
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
