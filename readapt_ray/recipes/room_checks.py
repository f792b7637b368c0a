"""Check before a run that its root can be written, that the disk has room for what it writes, and that a batch feeds every
training worker.

Sizes are estimates from configs and manifests; no weight is read.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from readapt_ray import environment
from readapt_ray.artifacts import Manifest
from readapt_ray.catalog.models import OpenModel
from readapt_ray.catalog.shapes import shape_of
from readapt_ray.cluster import batches
from readapt_ray.cluster.doctor import root as doctor
from readapt_ray.cluster.optimization import adapter_shape
from readapt_ray.errors import StorageError
from readapt_ray.progress import amount, size_text
from readapt_ray.recipes.chain import Step
from readapt_ray.recipes.option_checks import index_kind
from readapt_ray.retrieval.index_kinds import vector_bytes
from readapt_ray.storage import Location

_NUMBER_BYTES = {"float32": 4, "float16": 2, "int8": 1}
_BLOCK_BYTES = 0.55
"""Bytes of a block per byte of text."""
_CHECKPOINT_BYTES = 12
"""Bytes of a trained number in a checkpoint: itself and the two moments of AdamW."""


def check_root(uri: str) -> None:
    """Write a file under the root, read and delete it; folders that had to be made are removed again.

    Raises:
        StorageError: that cannot be done.
    """
    if wrong := doctor.why_unusable(Location(uri)):
        raise StorageError(wrong)


def check_disk(
    root: str,
    left: Sequence[Step],
    pretrained: OpenModel | None,
    dimension: int | None,
    corpora: Mapping[str, Manifest | None],
) -> None:
    """Check that the disk of the root has room for what the run writes, as far as that is known by now.

    Args:
        root: of the run; object stores have room.
        left: the steps that are to be made.
        pretrained: as large as the adapted model; None if it is not known.
        dimension: numbers of a vector; None if it is not known.
        corpora: those that are there, by name; without any only models are counted.

    Raises:
        StorageError: it has not.
    """
    location = Location(root)
    if not location.is_local:
        return
    needed: dict[str, float] = {}
    if pretrained is not None:
        needed |= _of_models(_configs(left, is_general=False), pretrained)
    for name, corpus in corpora.items():
        if corpus is not None:
            is_own = name == "corpus"
            sizes = _of_corpus(_configs(left, is_general=not is_own), corpus, dimension)
            needed |= {what if is_own else f"general {what}": size for what, size in sizes.items()}
    folder = location.local_path.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < sum(needed.values()):
        terms = " and ".join(f"{what} {size_text(size)}" for what, size in needed.items())
        raise StorageError(
            f"the disk of {location.uri!r} has {size_text(free)} free, and the run writes {terms}; make room, or give another --root"
        )


def _configs(steps: Sequence[Step], *, is_general: bool) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for step in steps:
        if step.is_general == is_general:
            found.setdefault(step.stage, []).append(step.config)
    return found


def _of_models(due: Mapping[str, list[Any]], pretrained: OpenModel) -> dict[str, float]:
    """Return the bytes of the adapted model, and of the adapter with its checkpoints."""
    found: dict[str, float] = {}
    if "merge" in due:
        found["the adapted model"] = sum(file.stat().st_size for file in pretrained.folder.glob("*.safetensors"))
    for train in due.get("train", []):
        from readapt_ray.stages.train import resolve
        from readapt_ray.training.memory import num_trained

        _, options = resolve(train, pretrained)
        shape = shape_of(pretrained.config, pretrained.name, options.objective)
        trained = num_trained(shape, adapter_shape(options, options.target_modules))
        found[f"{amount(train.keep_checkpoints, 'checkpoints')} and the adapter"] = trained * (
            4.0 + _CHECKPOINT_BYTES * train.keep_checkpoints
        )
    return found


def _of_corpus(due: Mapping[str, list[Any]], corpus: Manifest, dimension: int | None) -> dict[str, float]:
    """Return the bytes of blocks, vectors and indexes."""
    number = corpus.counts.get("num_passages", 0)
    found: dict[str, float] = {}
    if "pack" in due:
        found["blocks"] = _BLOCK_BYTES * corpus.counts.get("num_bytes", 0)
    if dimension is None:
        return found
    if vectors := due.get("embed", []):
        each = number * dimension * _NUMBER_BYTES[vectors[0].vector_dtype]
        found[f"vectors of {number:,} passages"] = float(len(vectors) * each)
    for index in due.get("index", [])[:1]:
        dtype = vectors[0].vector_dtype if vectors else None
        kind = index_kind(index, dtype, dimension, number)
        each_vector = 4.0 * dimension if kind.factory is not None else vector_bytes(kind, dimension)
        found["indexes of them"] = len(due["index"]) * number * each_vector
    return found


def check_batch(train: Any) -> None:
    """Check that a batch feeds every training worker, before the stages that come first cost anything.

    Their number is an option, the number of GPUs that the autoscaler may bring, or what the cluster of RAY_ADDRESS or this
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
