"""Import FAISS from the package that is installed, and train and fill indexes on GPUs if it supports them.

Two packages contain the module `faiss`, and only one may be installed: faiss-cpu (the extra `cpu`), or faiss-gpu (the
extra `gpu`), which can do everything that faiss-cpu can.
"""

import contextlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from readapt_ray.errors import InputError

try:
    import faiss
except ModuleNotFoundError as missing:
    raise InputError(
        "vector indexes need FAISS, which is not installed; pip install 'readapt-ray[cpu]', or on machines with NVIDIA GPUs "
        "pip install 'readapt-ray[gpu]'"
    ) from missing

__all__ = ["adder", "faiss", "flat_vectors", "train"]

_GPU_WORK_BYTES = 256 << 20
"""Temporary GPU memory for k-means and searches, without the centroids. FAISS' default of 1.5 GB is too much if several
tasks share a GPU."""


def train(index: Any, vectors: NDArray[np.float32]) -> None:
    """Train an index in place. The k-means of its inverted lists runs on a GPU if FAISS can use one.

    At 4,096 dimensions k-means takes nearly all of the time. Tasks of one node spread over its GPUs by process id.

    Args:
        index: an untrained FAISS index, which may be wrapped (refined or transformed).
        vectors: [N, D] to train on; they are not added.
    """
    lists: Any = None
    if faiss.get_num_gpus():  # 0 in faiss-cpu
        with contextlib.suppress(RuntimeError):  # not an IVF index
            lists = faiss.extract_index_ivf(index)
    if lists is None:
        index.train(vectors)
        return
    resources, lists.clustering_index = _on_gpu(faiss.IndexFlat(lists.d, lists.metric_type))
    try:
        index.train(vectors)
    finally:
        lists.clustering_index = None
        del resources


Add = Callable[[NDArray[np.float32]], None]


def adder(index: Any) -> Add:
    """Return a function that adds vectors [N, D] to a trained index; it assigns them to lists on a GPU if possible.

    Assigning compares each vector with the centroid of every list, which is most of the work. The lists and codes stay
    in the memory of this process, so that FAISS can open the file without a GPU.
    """
    index = faiss.downcast_index(index)
    if faiss.get_num_gpus():
        if isinstance(index, faiss.IndexRefine):
            return _refined_adder(index)
        if isinstance(index, faiss.IndexPreTransform):
            return _transformed_adder(index)
        if isinstance(index, faiss.IndexIVF) and isinstance(faiss.downcast_index(index.quantizer), faiss.IndexFlat):
            return _list_adder(index)
    add: Add = index.add
    return add


def _refined_adder(index: Any) -> Add:
    parts = [adder(index.base_index), adder(index.refine_index)]

    def add(vectors: NDArray[np.float32]) -> None:
        for each in parts:
            each(vectors)
        index.ntotal = index.base_index.ntotal

    return add


def _transformed_adder(index: Any) -> Add:
    add_below = adder(index.index)

    def add(vectors: NDArray[np.float32]) -> None:
        for place in range(index.chain.size()):
            vectors = index.chain.at(place).apply(vectors)
        add_below(vectors)
        index.ntotal = index.index.ntotal

    return add


def _list_adder(lists: Any) -> Add:
    resources, centroids = _on_gpu(lists.quantizer)

    def add(vectors: NDArray[np.float32]) -> None:
        vectors = np.ascontiguousarray(vectors, np.float32)
        numbers = np.ascontiguousarray(centroids.search(vectors, 1)[1][:, 0], np.int64)
        lists.add_core(len(vectors), faiss.swig_ptr(vectors), None, faiss.swig_ptr(numbers))
        assert resources is not None  # keeps them alive, which the copy on the GPU does not

    return add


def _on_gpu(flat: Any) -> tuple[Any, Any]:
    """Copy a flat index to a GPU; return the GPU's resources, which must outlive the copy, and the copy."""
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(_GPU_WORK_BYTES)
    return resources, faiss.index_cpu_to_gpu(resources, os.getpid() % faiss.get_num_gpus(), flat)


def flat_vectors(index: Any) -> NDArray[np.float32] | NDArray[np.float16] | None:
    """Return the vectors [N, D] of a flat inner-product index as a view, not a copy.

    None for another kind, and for an empty index. Use the view only while the index exists.
    """
    index = faiss.downcast_index(index)
    if index.metric_type != faiss.METRIC_INNER_PRODUCT or not index.ntotal:
        return None
    shape = (index.ntotal, index.d)
    if type(index) in (faiss.IndexFlat, faiss.IndexFlatIP):
        whole: NDArray[np.float32] = faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d).reshape(shape)
        return whole
    if type(index) is faiss.IndexScalarQuantizer and index.sq.qtype == faiss.ScalarQuantizer.QT_fp16:
        codes = faiss.rev_swig_ptr(index.codes.data(), index.ntotal * index.code_size)
        halves: NDArray[np.float16] = codes.view(np.float16).reshape(shape)
        return halves
    return None
