"""Choose the data type that encoders compute in, the same for all vectors of an output."""

import os

from readapt_ray.artifacts import read_lease, read_manifest
from readapt_ray.cluster import autoscaling, connection
from readapt_ray.config import StageConfig


def encoding_dtype(config: StageConfig, asked: str) -> str:
    """Return the data type that encoders compute in: float32, float16 or bfloat16.

    For `auto` it is the type with which the output was begun, unless `overwrite` is set; else the type that suits a GPU
    of the cluster, or without GPUs a CPU. On a cluster of several nodes, a Ray task on one node finds it, which may
    wait for the autoscaler. Without RAY_ADDRESS, Ray is not started for this: the type suits this machine.

    Args:
        config: options of the stage, with `output` and `overwrite`.
        asked: the user's option; any value but `auto` is returned as it is.
    """
    if asked != "auto":
        return asked
    if not config.overwrite:
        manifest, lease = read_manifest(config.output), read_lease(config.output)
        begun = (manifest.config if manifest else (lease or {}).get("config", {})).get("dtype")
        if begun in ("float32", "float16", "bfloat16"):
            return str(begun)
    import ray

    from readapt_ray.retrieval.encoder import suitable_dtype

    if not (ray.is_initialized() or os.environ.get("RAY_ADDRESS")):
        return suitable_dtype()
    total = connection.connect()
    device = "cuda" if total.num_gpus else "cpu"
    each = {"CPU": 1, "GPU": 1 if total.num_gpus else 0}
    if total.num_nodes == 1 and not autoscaling.may_grow(each):
        return suitable_dtype(device)
    there = ray.remote(num_cpus=each["CPU"], num_gpus=each["GPU"])(suitable_dtype)
    with autoscaling.requested(1, each, least=1):
        return str(ray.get(there.remote(device)))
