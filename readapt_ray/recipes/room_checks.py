"""Check before a run that the disk has room for what it writes, this machine the memory for a training step, and that a batch
feeds every training worker.

Room and memory are estimates from configs and manifests; no weight is read. On a cluster the workers check their memory
themselves.
"""

import os
import shutil
import sys
from collections.abc import Mapping
from typing import Any

from readapt_ray import artifacts, environment
from readapt_ray.catalog.models import OpenModel
from readapt_ray.catalog.shapes import shape_of
from readapt_ray.cluster import batches
from readapt_ray.errors import StorageError
from readapt_ray.recipes.chain import RunConfig
from readapt_ray.recipes.standing import Standing
from readapt_ray.storage import Location

_NUMBER_BYTES = {"float32": 4, "float16": 2, "int8": 1}


def check_disk(
    config: RunConfig, found: Mapping[str, Standing], pretrained: OpenModel | None, dimension: int | None
) -> None:
    """Check that the disk of the root has room for the adapted model and, once the corpus is there, for the vectors.

    Args:
        config: the run.
        found: the artifact at each step's output.
        pretrained: as large as the adapted model; None if it is not known.
        dimension: numbers of a vector; None if it is not known.

    Raises:
        StorageError: it has not.
    """
    root = Location(config.root)
    if not root.is_local:
        return
    needed = {}
    if pretrained is not None and _is_due(found.get("adapted")):
        needed["the adapted model"] = sum(file.stat().st_size for file in pretrained.folder.glob("*.safetensors"))
    corpus = artifacts.read_manifest(f"{config.root}/corpus")
    vectors = [each for name, each in found.items() if name.startswith("vectors/") and _is_due(each)]
    if corpus is not None and vectors and dimension is not None:
        number = corpus.counts.get("num_passages", 0)
        options: Any = vectors[0].step.config
        size = len(vectors) * dimension * _NUMBER_BYTES[options.vector_dtype]
        needed[f"vectors of {number:,} passages"] = number * size
    folder = root.local_path.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < sum(needed.values()):
        terms = " and ".join(f"{what} {size / 1e9:.1f} GB" for what, size in needed.items())
        raise StorageError(
            f"the disk of {root.uri!r} has {free / 1e9:.1f} GB free, and the run writes {terms}; make room, or give another --root"
        )


def _is_due(standing: Standing | None) -> bool:
    return standing is not None and (not standing.is_complete or standing.is_stale)


def check_batch(train: Any) -> None:
    """Check that a batch feeds every training worker, before the stages that come first cost anything.

    Their number is an option, that of the GPUs which the autoscaler may bring, or what the cluster of RAY_ADDRESS or this
    machine has.

    Args:
        train: options of train; None if nothing is to be trained.

    Raises:
        PlacementError: it does not; the message has the number that would.
    """
    if train is None or train.batch_size == "auto":
        return
    num_workers = train.num_workers or environment.num_gpus()
    if num_workers is None and os.environ.get("RAY_ADDRESS"):
        batches.check_batch_feeds(train, train.batch_size, "blocks")
        return
    import torch

    batches.check_feeds(num_workers or torch.cuda.device_count(), train.batch_size, "blocks")


def check_memory(train: Any, block_tokens: int, pretrained: OpenModel) -> None:
    """Check that a training step fits into the memory of this machine, where the run starts Ray on it.

    Args:
        train: options of train.
        block_tokens: longest block.
        pretrained: the model that is trained.

    Raises:
        PlacementError: it does not; the message shows the arithmetic.
    """
    ray = sys.modules.get("ray")
    if not train.check_memory or os.environ.get("RAY_ADDRESS") or (ray and ray.is_initialized()):
        return
    import torch

    from readapt_ray import hardware
    from readapt_ray.cluster.optimization import adapter_shape, worker_setup
    from readapt_ray.stages.train import resolve
    from readapt_ray.training import memory

    _, options = resolve(train, pretrained)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    num_workers = options.num_workers or (torch.cuda.device_count() if device.type == "cuda" else 1)
    is_low = options.dtype == "bfloat16" or (
        options.dtype == "auto" and (device.type == "cuda" or hardware.has_bfloat16_units())
    )
    setup = worker_setup(
        options,
        adapter_shape(options, options.target_modules),
        num_workers=num_workers,
        micro_batch_tokens=max(options.micro_batch_tokens, block_tokens),
        dtype=torch.bfloat16 if is_low else torch.float32,
        device_type=device.type,
    )
    shape = shape_of(pretrained.config, pretrained.name, options.objective)
    memory.check_fits(
        memory.estimate_memory(shape, setup),
        free_bytes=memory.free_bytes(device, num_workers if device.type == "cpu" else 1),
    )
