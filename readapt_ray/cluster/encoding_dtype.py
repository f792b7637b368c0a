"""Choose the data type that encoders compute in, the same for all vectors of an output."""

import os

from readapt_ray.artifacts import read_lease, read_manifest
from readapt_ray.cluster import autoscaling, connection
from readapt_ray.config import StageConfig


def encoding_dtype(config: StageConfig, asked: str) -> str:
    """Return the data type asked for; for `auto`, the type of an earlier start of the output, else one that suits the
    devices of the cluster or machine.
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
