"""Embeds on a Ray cluster of two nodes, and kills one of them halfway. Its argument is JSON: config, done."""

import json
import sys
import threading
import time
from pathlib import Path


def main() -> None:
    """Print, as JSON, which files of vectors were there when the node was killed, and their times."""
    import ray
    from ray.cluster_utils import Cluster

    from readapt_ray.stages.embed import EmbedConfig, embed

    values = json.loads(sys.argv[1])
    head = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    doomed = cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
    cluster.wait_for_nodes()
    cluster.connect()
    folder = Path(values["config"]["output"]) / "vectors"
    before: dict[str, int] = {}

    def there() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in folder.glob("part-*.parquet")}

    def kill() -> None:
        while len(there()) < values["done"]:
            time.sleep(0.05)
        before.update(there())
        cluster.remove_node(doomed, allow_graceful=False)

    thread = threading.Thread(target=kill)
    thread.start()
    embed(EmbedConfig.parse(values["config"]))
    thread.join()
    print(json.dumps({"before": before}), flush=True)
    # In this order, before Python ends: the driver's Ray would end it with 1 where it finds its node gone.
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
