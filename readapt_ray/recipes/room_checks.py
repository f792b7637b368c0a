"""Check before a run that its root is writable, the disk has enough space, and a batch is large enough for all workers.

Sizes are estimated from configs and manifests. No weights are read.
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
"""Bytes of packed blocks per byte of text."""
_CHECKPOINT_BYTES = 12
"""Checkpoint bytes per trained parameter: the float32 value and AdamW's two moments."""


def check_root(uri: str) -> None:
    """Check that the root can be used: write a file there, read it and delete it. New folders are removed again.

    Raises:
        StorageError: a file cannot be written, read or deleted there.
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
    """Check that the root's disk has space for the outputs of the run, as far as their sizes are known yet.

    Args:
        root: root of the run. An object store is not checked.
        left: the steps that will run.
        pretrained: gives the size of the adapted model; None if it could not be opened.
        dimension: numbers per vector; None if not known.
        corpora: manifests of the ingested corpora, by name ("corpus", "general/corpus"). If there are none, only models
            are counted.

    Raises:
        StorageError: the disk has too little free space.
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
    """Return the bytes of the adapted model, and of the adapter with its checkpoints, by name."""
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
    """Return the bytes of blocks, vectors and indexes of a corpus, by name."""
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
    """Check, before earlier stages run, that each batch has at least one block for every training worker.

    The number of workers is the option `num_workers`, else READAPT_NUM_GPUS, else the GPUs of the cluster of RAY_ADDRESS
    or of this machine. A batch size of "auto" is not checked.

    Args:
        train: options of train; None if nothing will be trained.

    Raises:
        PlacementError: the batch is too small. The message says which size is enough.
    """
    if train is None or train.batch_size == "auto":
        return
    num_workers = train.num_workers or environment.num_gpus()
    if num_workers is None and os.environ.get("RAY_ADDRESS"):
        batches.check_batch_feeds(train, train.batch_size, "blocks")
        return
    import torch

    batches.check_feeds(num_workers or torch.cuda.device_count(), train.batch_size, "blocks")
