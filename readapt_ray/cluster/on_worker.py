"""Help code on Ray workers: absolute paths, the driver's model, limits on threads."""

import os
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from readapt_ray.catalog.encoding import Encoding
from readapt_ray.catalog.models import OpenModel, open_model, own_folder
from readapt_ray.cluster import gpus, software
from readapt_ray.errors import FingerprintMismatchError, PlacementError
from readapt_ray.quick_imports import import_for_models
from readapt_ray.storage import Location

if TYPE_CHECKING:
    from readapt_ray.retrieval.encoder import Encoder


def absolute(location: Location) -> Location:
    """Return the same place by a name that does not depend on the current folder."""
    return Location(location.path) if location.is_local else location


def model_name(model: OpenModel) -> str:
    """Return a name by which a worker finds the same model: its folder where the user named one, else what the user
    called it, at this commit.
    """
    folder = own_folder(model.name)
    return str(folder) if folder is not None else model.pinned_name


def base_name(model: OpenModel) -> str:
    """Return a name by which a worker finds the base of factors; empty for other models."""
    return model_name(model.base) if model.is_factors else ""


def this_node() -> str:
    """Return Ray's id of the node that this process runs on."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


def check_node() -> None:
    """Check that this node runs what the driver runs, and that torch can use the GPUs of this worker.

    A node that came after the driver joined was not compared then.

    Raises:
        PlacementError: it has other versions, lacks a package, or a GPU cannot be used.
    """
    import ray

    if text := software.difference_here():
        raise PlacementError(
            f"node {ray.util.get_node_ip_address()} {text}; install the same versions on all nodes, or remove this node"
        )
    check_gpus()


def check_gpus() -> int:
    """Check that torch can use the GPUs that Ray gave to this worker: without them it would compute on the CPU.

    Returns:
        How many Ray gave, parts of one counted as one.

    Raises:
        PlacementError: it cannot; the message says why.
    """
    import ray

    num_gpus = len(ray.get_runtime_context().get_accelerator_ids()["GPU"])
    if text := gpus.why_unusable(num_gpus):
        raise PlacementError(f"node {ray.util.get_node_ip_address()}: {text}")
    return num_gpus


def gpu_share() -> float:
    """Return the part of a GPU's memory that this worker may take: what Ray gave it, where several share the GPU."""
    import ray
    import torch

    if not torch.cuda.is_available() or not ray.is_initialized():
        return 1.0
    context = ray.get_runtime_context()
    if context.worker.mode != ray.WORKER_MODE:
        return 1.0
    return min(1.0, float(context.get_assigned_resources().get("GPU") or 1.0))


def check_same_model(name: str, fingerprint: Callable[[], str], due: Collection[str], *, driver_node: str) -> None:
    """Check on another node that a name means the same model as on the driver.

    Args:
        name: of the model.
        fingerprint: of what is found here; reading all weights takes a while.
        due: what the driver found.
        driver_node: `this_node` where the driver runs, and where there is nothing to see.

    Raises:
        FingerprintMismatchError: it is another one.
    """
    if this_node() != driver_node and fingerprint() not in due:
        import ray

        raise FingerprintMismatchError(
            f"{name!r} has other weights on node {ray.util.get_node_ip_address()} than where the stage was started; "
            f"put the same files on all nodes, or give a URI"
        )


def load_encoder(
    name: str,
    encoding: Encoding,
    dtype: str,
    *,
    base: str = "",
    due: str,
    driver_node: str,
    num_threads: int,
    batch_tokens: int | None,
) -> "Encoder":
    """Load the encoder of a worker, and check that it is the driver's model.

    Args:
        base: see `base_name`.
        due: the fingerprint of the encoder, as the driver found it.

    Raises:
        FingerprintMismatchError: there are other weights on this node.
        PlacementError: the node differs from the driver's.
    """
    import_for_models(freeze=True)
    import torch

    from readapt_ray.retrieval.encoder import Encoder
    from readapt_ray.retrieval.encoder_fingerprint import encoder_fingerprint

    check_node()
    torch.set_num_threads(num_threads)
    model = open_model(name, base=base)
    check_same_model(name, lambda: encoder_fingerprint(model, encoding, dtype), {due}, driver_node=driver_node)
    return Encoder.load(model, encoding=encoding, dtype=dtype, batch_tokens=batch_tokens, gpu_share=gpu_share())


def faiss_on_threads(num_threads: int) -> Any:
    """Return FAISS for a task of some CPUs. Its BLAS takes all cores and busy-waits unless told before it is loaded."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", str(num_threads))
    from readapt_ray.retrieval.faiss_build import faiss

    faiss.omp_set_num_threads(num_threads)
    return faiss
