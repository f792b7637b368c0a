"""Functions for code on Ray workers: absolute paths, checks of the node and the model, thread limits."""

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
    """Return a local location with an absolute path; a URI stays as it is.

    Workers run in another current folder than the driver.
    """
    return Location(location.path) if location.is_local else location


def model_name(model: OpenModel) -> str:
    """Return a name by which a worker can open the same model.

    It is the model's folder if the user gave one, else its name with the commit.
    """
    folder = own_folder(model.name)
    return str(folder) if folder is not None else model.pinned_name


def base_name(model: OpenModel) -> str:
    """Return a name by which a worker finds the base model of factors; empty if the model is not factors.

    Factors are the output of `readapt merge --factors`: a small change of a base model.
    """
    return model_name(model.base) if model.is_factors else ""


def this_node() -> str:
    """Return the Ray node id of this process."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


def check_node() -> None:
    """Check that this node has the driver's package versions, and that torch can use the GPUs of this worker.

    The driver compares all nodes when it joins the cluster; this also covers nodes that come later.

    Raises:
        PlacementError: the node has other versions, lacks a package, or torch cannot use a GPU.
    """
    import ray

    if text := software.difference_here():
        raise PlacementError(
            f"node {ray.util.get_node_ip_address()} {text}; install the same versions on all nodes, or remove this node"
        )
    check_gpus()


def check_gpus() -> int:
    """Check that torch can use the GPUs that Ray gave to this worker; else it would silently compute on the CPU.

    Returns:
        Number of GPUs that Ray gave; a fraction of a GPU counts as one.

    Raises:
        PlacementError: torch cannot use them; the message says why.
    """
    import ray

    num_gpus = len(ray.get_runtime_context().get_accelerator_ids()["GPU"])
    if text := gpus.why_unusable(num_gpus):
        raise PlacementError(f"node {ray.util.get_node_ip_address()}: {text}")
    return num_gpus


def gpu_share() -> float:
    """Return the fraction of its GPU's memory that this worker may use; less than 1.0 if workers share a GPU.

    1.0 on the driver, and where torch sees no GPU.
    """
    import ray
    import torch

    if not torch.cuda.is_available() or not ray.is_initialized():
        return 1.0
    context = ray.get_runtime_context()
    if context.worker.mode != ray.WORKER_MODE:
        return 1.0
    return min(1.0, float(context.get_assigned_resources().get("GPU") or 1.0))


def check_same_model(name: str, fingerprint: Callable[[], str], expected: Collection[str], *, driver_node: str) -> None:
    """Check that a model name means the same model on this node as on the driver's node.

    On the driver's own node nothing is checked.

    Args:
        name: name of the model.
        fingerprint: returns the fingerprint of the model on this node; it is called only on other nodes, because it
            reads all weights.
        expected: fingerprints, one of which must match.
        driver_node: `this_node` of the driver.

    Raises:
        FingerprintMismatchError: the model differs.
    """
    if this_node() != driver_node and fingerprint() not in expected:
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
    expected: str,
    driver_node: str,
    num_threads: int,
    batch_tokens: int | None,
) -> "Encoder":
    """Load an encoder on a worker, and check that it is the same as the driver's.

    Args:
        name: name of the model, from `model_name`.
        encoding: prompts, pooling and so on.
        dtype: data type that the model computes in.
        base: name of the base model of factors, from `base_name`.
        expected: the encoder's fingerprint that the driver found.
        driver_node: `this_node` of the driver.
        num_threads: number of threads of torch, set for the whole process.
        batch_tokens: most tokens per batch; None lets the encoder choose.

    Raises:
        FingerprintMismatchError: this node has other weights.
        PlacementError: the node differs from the driver's.
    """
    import_for_models(freeze=True)
    import torch

    from readapt_ray.retrieval.encoder import Encoder
    from readapt_ray.retrieval.encoder_fingerprint import encoder_fingerprint

    check_node()
    torch.set_num_threads(num_threads)
    model = open_model(name, base=base)
    check_same_model(name, lambda: encoder_fingerprint(model, encoding, dtype), {expected}, driver_node=driver_node)
    return Encoder.load(model, encoding=encoding, dtype=dtype, batch_tokens=batch_tokens, gpu_share=gpu_share())


def faiss_on_threads(num_threads: int) -> Any:
    """Import FAISS and limit its threads; return the module.

    Its BLAS must be limited before it is loaded: else it takes all cores and busy-waits. So the first call in a process
    decides for BLAS (unless OPENBLAS_NUM_THREADS is set); a later one only changes the threads of FAISS.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", str(num_threads))
    from readapt_ray.retrieval.faiss_build import faiss

    faiss.omp_set_num_threads(num_threads)
    return faiss
